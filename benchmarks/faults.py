"""Kill the real pipeline, damage its results, and compare with an undisturbed run.

    OMP_NUM_THREADS=1 python -m benchmarks.faults --only 03       # some minutes

It works in a copy of the repository below a temporary folder. Two kills are SIGKILL to the runner alone, in the middle of the
first notebook and of the second (of the only one, if there is one). A kill that comes too late to disturb anything makes the
whole a failure. The next command must go on from there.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from companion.base.paths import ROOT
from companion.run.freshness import run_times

PLAIN, KILLED = "qxplain", "qxkills"  # equally long, since names pad printed tables
# Times, and what is only kept to go on from; everything else must be equal to the byte.
VOLATILE = ("run_times.json", "/logs/", "/.state/", "/parts/", "/stage", "00_")
KILL_AT = 0.4  # of the seconds that the notebook took undisturbed


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if all runs end with the same results."""
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description="Disturbed runs against an undisturbed one.")
    parser.add_argument("--only", default="03", help="the last notebook to run (default 03)")
    options = parser.parse_args(arguments)
    flags = ["--model", "full-0", "--profile", "smoke", "--only", options.only, "--jobs", "1"]
    ignored = shutil.ignore_patterns(".*", "__pycache__", "results", "figures")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=ignored))
        plain = _run(copy, flags, PLAIN)
        seconds, fine = run_times(copy / "results" / PLAIN), []
        names = sorted(seconds)
        for name in (names[0], names[:2][-1]):
            met, line = _kill(copy, flags, name, KILL_AT * seconds[name])
            print(f"killed in {name}: {line}", flush=True)
            fine.append(met)
        fine.append(_compare("killed, then run again", plain, _run(copy, flags, KILLED)))
        for name in ("02_layers.parquet", "02_evidence.csv"):
            path = copy / "results" / PLAIN / name
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            fine.append(_compare(f"{name} torn, then run again", plain, _run(copy, flags, PLAIN)))
    return int(not all(fine))


def _command(flags: Sequence[str], name: str) -> list[str]:
    return [sys.executable, "-m", "companion.run.cli", *flags, "--name", name]


def _run(copy: Path, flags: Sequence[str], name: str) -> dict[str, bytes]:
    """The results of a run, by name. The run's name, which tables hold and figures have drawn in them, is made the same."""
    done = subprocess.run(_command(flags, name), cwd=copy, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stdout}{done.stderr}")
    found = {}
    for path in sorted((copy / "results" / name).rglob("*")):
        inside = "/" + path.relative_to(copy / "results" / name).as_posix()
        if not path.is_file() or any(part in inside for part in VOLATILE):
            continue
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            if "model" in table:
                table["model"] = table["model"].str.replace(name, "NAME")
            found[inside] = pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes()
        else:
            without_images = re.sub(rb'"image/png": "[^"]*"', b"", path.read_bytes())
            found[inside] = without_images.replace(name.encode(), b"NAME")
    return found


def _kill(copy: Path, flags: Sequence[str], notebook: str, wait: float) -> tuple[bool, str]:
    """Kill a run `wait` seconds after it began a notebook; whether it was still at it, and the last line that it wrote."""
    log = copy / "killed.log"
    with log.open("w") as file:
        running = subprocess.Popen(_command(flags, KILLED), cwd=copy, stdout=file, stderr=subprocess.STDOUT)
        while running.poll() is None and f"] {notebook} " not in log.read_text():
            time.sleep(0.1)
        time.sleep(wait)
        lines = log.read_text().splitlines() or ["nothing"]
        at_work = running.poll() is None and f"] {notebook} " in lines[-1] and lines[-1].endswith("...")
        running.kill()
        running.wait()
    return at_work, lines[-1] if at_work else f"too late: {lines[-1]}"


def _compare(what: str, plain: dict[str, bytes], other: dict[str, bytes]) -> bool:
    different = sorted(name for name in plain.keys() | other.keys() if plain.get(name) != other.get(name))
    print(f"{what}: different: {', '.join(different)}" if different else f"{what}: the same results", flush=True)
    return not different


if __name__ == "__main__":
    sys.exit(main())
