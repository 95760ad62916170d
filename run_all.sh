#!/usr/bin/env bash
# From a fresh clone to every figure: finds or makes the Python environment, then hands over to companion/run/cli.py.
# See ./run_all.sh --help. Runs with the bash 3.2 of macOS.
set -Eeuo pipefail

export COMPANION_CALLER="$PWD" # folders given as flags count from here
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() {
  echo "run_all.sh: $1" >&2
  exit 2
}

# The Python that made the results here comes first.
supported="3.11 3.12 3.13 3.14"
made_with="$(sed -n 's/^ "python": "\(.*\)".*/\1/p' results/smollm2-refuser/manifest.json 2>/dev/null || true)"

is_python() { # of these versions, or of any supported one; a shim may be there and not start, so ask the interpreter itself
  "$1" -I -S -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1].split())' "${2:-$supported}" >/dev/null 2>&1
}

find_python() {
  local version name
  for version in $made_with $supported; do
    for name in "python$version" python3 python; do
      if is_python "$name" "$version"; then
        command -v "$name"
        return
      fi
    done
  done
  fail "Python ${supported// / or } is needed and was not found ($(python3 -V 2>&1 || true)); install one, or use conda and environment.yml"
}

# The stamp says with which lock an environment was filled. Hashed with Python: macOS has no sha256sum.
stamp() { # check or write
  "$python" -I -S -c 'if True:
    import hashlib, pathlib, sys
    action, lock, stamp = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    if action == "write":
        stamp.write_text(digest)
    sys.exit(not stamp.is_file() or stamp.read_text() != digest)' "$1" requirements.lock "$place/companion-lock.sha256"
}

# The environment: the active one if its Python is supported (but never conda's base), else .venv.
active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
if [ "${CONDA_DEFAULT_ENV:-}" = base ] && [ -z "${VIRTUAL_ENV:-}" ]; then active=""; fi
place="${COMPANION_VENV:-.venv}"
if [ -z "${COMPANION_VENV:-}" ] && [ -n "$active" ] && is_python "$active/bin/python"; then place="$active"; fi
python="$place/bin/python"

if ! is_python "$python" "$supported" || ! stamp check; then
  if is_python "$python"; then base="$python"; else base="$(find_python)"; fi
  case "$*" in
    --help | -h | --list | --book) exec "$base" -m companion.run.cli "$@" ;; # these need no packages
  esac
  # A mistake in the flags should show now, not after minutes of installing.
  "$base" -c 'import sys; from companion.run import cli; sys.exit(cli.check_command(sys.argv[1:]))' "$@"
  if ! is_python "$python"; then
    if [ -e "$place" ]; then fail "$place is no working environment of Python ${supported// / or }: remove it and run again"; fi
    "$base" -m venv "$place" || fail "no environment could be made (Debian and Ubuntu: apt install ${base##*/}-venv)"
  fi
  trap 'echo "stopped; running again goes on from here" >&2; exit 130' INT
  echo "Installing requirements.lock into $place, once: 3 to 6 minutes, about 2 GB (more where torch brings CUDA)."
  log="$place/install.log"
  if ! "$python" -m pip install --disable-pip-version-check --no-input -r requirements.lock >"$log" 2>&1; then
    tail -n 3 "$log" >&2
    fail "the packages could not be installed (the whole story: $log); running again goes on from there"
  fi
  trap - INT
  stamp write
fi

if [ -n "$made_with" ] && ! is_python "$python" "$made_with"; then
  echo "results/smollm2-refuser was made with Python $made_with; this is $("$python" -V)" >&2
fi
exec "$python" -m companion.run.cli "$@"
