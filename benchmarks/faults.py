"""Kill the real pipeline, damage its results, and compare with an undisturbed run.

    OMP_NUM_THREADS=1 python -m benchmarks.faults --only 03       # some minutes; prints what is in docs/faults.md

It works in a copy of the repository below a temporary folder. Kills are SIGKILL to the runner alone, in the middle of a
notebook: the first kill in the first notebook, the second in the second, all others in the last, after a share, drawn with a
fixed seed, of the seconds that this notebook took in the undisturbed run just before. A kill that comes too late to
disturb anything is counted and makes the whole a failure. The next command must go on from there.
"""

import argparse
import importlib.util
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from companion.base.paths import ROOT
from companion.run.freshness import run_times

# Times, and what is only kept to go on from; everything else must be equal to the byte.
PLAIN, KILLED, SHARED = "qxplain", "qxkills", "qxparts"  # equally long, since names pad printed tables
VOLATILE = ("run_times.json", "/logs/", "/.state/", "/parts/", "/stage", "00_")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if all runs end with the same results."""
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description="Disturbed runs against an undisturbed one.")
    parser.add_argument("--only", default="03", help="the last notebook to run (default 03)")
    parser.add_argument("--kills", type=int, default=2)
    options = parser.parse_args(arguments)
    flags = ["--model", "full-0", "--profile", "smoke", "--only", options.only, "--jobs", "1"]
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy(Path(folder) / "copy")
        plain, seconds = _run(copy, flags, PLAIN)
        print(f"undisturbed: {seconds:.0f} s, {len(plain)} files", flush=True)
        n_inside = _kills(copy, flags, run_times(copy / "results" / PLAIN), options.kills)
        print(f"{n_inside} of {options.kills} kills met a notebook at work", flush=True)
        killed, rest = _run(copy, flags, KILLED)
        equal = [_compare("killed, then run again", plain, killed, rest), n_inside == options.kills]
        if importlib.util.find_spec("submitit"):
            shared, rest = _run(copy, [*flags, "--shards", "2"], SHARED)
            equal.append(_compare("in 2 shards", plain, shared, rest))
        equal += [_damage(copy, flags, plain, name) for name in ("02_layers.parquet", "02_evidence.csv")]
    return int(not all(equal))


def _copy(target: Path) -> Path:
    ignored = shutil.ignore_patterns(".*", "__pycache__", "results", "figures")
    return Path(shutil.copytree(ROOT, target, ignore=ignored))


def _command(flags: Sequence[str], name: str) -> list[str]:
    return [sys.executable, "-m", "companion.run.cli", *flags, "--name", name]


def _run(copy: Path, flags: Sequence[str], name: str) -> tuple[dict[str, bytes], float]:
    """The results of a run, by name, and its seconds. The run's name, which tables hold, is made the same."""
    start = time.monotonic()
    done = subprocess.run(_command(flags, name), cwd=copy, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stdout}{done.stderr}")
    found = {}
    for path in sorted((copy / "results" / name).rglob("*")):
        inside = "/" + path.relative_to(copy / "results" / name).as_posix()
        if path.is_file() and not any(part in inside for part in VOLATILE):
            found[inside] = _content(path, name)
    return found, time.monotonic() - start


def _content(path: Path, name: str) -> bytes:
    """The bytes, or a parquet table's values, with the run's name made the same."""
    if path.suffix != ".parquet":
        without_images = re.sub(rb'"image/png": "[^"]*"', b"", path.read_bytes())  # figures have the name drawn in them
        return without_images.replace(name.encode(), b"NAME")
    import pandas as pd

    table = pd.read_parquet(path)
    if "model" in table:
        table["model"] = table["model"].str.replace(name, "NAME")
    return pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes()


def _kills(copy: Path, flags: Sequence[str], seconds: dict[str, int], n: int) -> int:
    """Kill n runs, each in a notebook at work; returns how many were. `seconds`: what each took undisturbed."""
    names, moments, inside = sorted(seconds), random.Random(0), 0
    for place in range(n):
        name = names[min(place, len(names) - 1)]
        wait = moments.uniform(0.2, 0.6) * seconds[name]
        at_work, line = _kill(copy, flags, name, wait)
        inside += at_work
        print(f"killed {wait:.0f} s into {name} ({seconds[name]} s undisturbed): {line}", flush=True)
    return inside


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


def _compare(what: str, plain: dict[str, bytes], other: dict[str, bytes], seconds: float) -> bool:
    different = sorted(name for name in plain.keys() | other.keys() if plain.get(name) != other.get(name))
    end = f"different: {', '.join(different)}" if different else "the same results"
    print(f"{what}: {seconds:.0f} s, {end}", flush=True)
    return not different


def _damage(copy: Path, flags: Sequence[str], plain: dict[str, bytes], name: str) -> bool:
    """Tear one result file in half; the next run must make it again."""
    path = copy / "results" / PLAIN / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again, seconds = _run(copy, flags, PLAIN)
    return _compare(f"{name} torn, then run again", plain, again, seconds)


if __name__ == "__main__":
    sys.exit(main())
