"""The lock: how `requirements.lock` is made from `requirements.in`, and whether the installed packages are those.

`python -m companion.run.environment` makes it again and needs `uv`; versions that are locked stay as they are unless uv is
told otherwise, for example `python -m companion.run.environment --upgrade-package pandas`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from itertools import product
from pathlib import Path

from packaging.markers import Marker
from packaging.utils import canonicalize_name

from companion.base.errors import InputError
from companion.base.files import write_text
from companion.base.paths import ROOT

LOCK = ROOT / "requirements.lock"


# torch's wheel for Linux brings these itself, and the CPU build has none of them.
LEFT_TO_TORCH = re.compile(r"nvidia-|cuda-|triton")


# Every Python 3.11 that the lock may meet, as far as markers can tell them apart.
_SYSTEMS = (("linux", "posix"), ("darwin", "posix"), ("win32", "nt"))


_MACHINES = ("x86_64", "AMD64", "aarch64", "arm64", "riscv64")


TARGETS = [
    {"python_full_version": full, "python_version": "3.11", "sys_platform": system, "os_name": name}
    | {"platform_machine": machine, "implementation_name": "cpython", "platform_python_implementation": "CPython"}
    for full, (system, name), machine in product(("3.11.0", "3.11.99"), _SYSTEMS, _MACHINES)
]


def locked(lines: Sequence[str]) -> list[str]:
    """The lines of a universal lock that Python 3.11 needs, without markers that always hold there.

    >>> locked(["numpy==2.4.6 ; python_full_version < '3.12'", "numpy==2.5 ; python_full_version >= '3.12'"])
    ['numpy==2.4.6']
    >>> locked(["nvidia-nccl==2 ; sys_platform == 'linux'", "appnope==1 ; sys_platform == 'darwin'"])
    ["appnope==1 ; sys_platform == 'darwin'"]
    """
    kept = []
    for line in lines:
        pin, _, marker = line.partition(" ; ")
        holds = [Marker(marker).evaluate(target) for target in TARGETS] if marker else [True]
        if any(holds) and not LEFT_TO_TORCH.match(pin):
            kept.append(pin if all(holds) else line)
    return kept


def pins(path: Path = LOCK) -> dict[str, str]:
    """Version by canonical package name, of the lines of the lock that hold on this machine."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        pin, _, marker = line.partition(" ; ")
        if not marker or Marker(marker).evaluate():
            name, _, version = pin.partition("==")
            found[canonicalize_name(name)] = version
    return found


def disagreements(wanted: dict[str, str]) -> list[str]:
    """One sentence for each package that is not installed in the locked version (a build's tag does not count)."""
    releases = ((dist.name, dist.version.partition("+")[0]) for dist in metadata.distributions())
    installed: dict[str, str] = {canonicalize_name(name): release for name, release in releases}
    differing = {name: version for name, version in wanted.items() if installed.get(name) != version}
    return [f"{name} is {installed.get(name, 'missing')}, locked {version}" for name, version in differing.items()]


def make_lock(options: Sequence[str]) -> None:
    """Resolve `requirements.in` for all systems and write what Python 3.11 needs of it."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "requirements.lock"
        raw.write_text(LOCK.read_text(encoding="utf-8"), encoding="utf-8")  # uv keeps the versions that it finds
        command = ["uv", "pip", "compile", "requirements.in", "--universal", "--python-version", "3.11", "--quiet"]
        command += ["--no-header", "--no-annotate", "--output-file", str(raw), *options]
        try:
            subprocess.run(command, cwd=ROOT, check=True)
        except FileNotFoundError:
            raise InputError("uv is needed to make the lock: python -m pip install uv") from None
        write_text("\n".join(locked(raw.read_text(encoding="utf-8").splitlines())) + "\n", LOCK)


if __name__ == "__main__":
    try:
        make_lock(sys.argv[1:])
    except (InputError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
