"""Kill the real pipeline, damage its results, share it among processes, and compare with an undisturbed run.

    OMP_NUM_THREADS=1 python -m benchmarks.faults --only 03       # some minutes; prints what is in docs/faults.md

It works in a copy of the repository below a temporary folder. Kills are SIGKILL to the runner alone, at moments drawn
with a fixed seed; the next command must go on from there.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from helpers.paths import ROOT

# Times, and what is only kept to go on from; everything else must be equal to the byte.
PLAIN, KILLED, SHARED = "qxplain", "qxkills", "qxparts"  # equally long, since names pad printed tables
VOLATILE = ("run_times.json", "/logs/", "/.state/", "/parts/", "/stage", "00_")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if all runs end with the same results."""
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description="Disturbed runs against an undisturbed one.")
    parser.add_argument("--only", default="03", help="the last notebook to run (default 03)")
    parser.add_argument("--kills", type=int, default=2)
    options = parser.parse_args(arguments)
    flags = ["--model", "full-0", "--profile", "smoke", "--only", options.only]
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy(Path(folder) / "copy")
        plain, seconds = _run(copy, flags, PLAIN)
        print(f"undisturbed: {seconds:.0f} s, {len(plain)} files", flush=True)
        moments = random.Random(0)
        for place in range(options.kills):
            moment = moments.uniform(0.1, 0.6) * seconds / (place + 1)
            print(f"killed after {moment:.0f} s: {_kill(copy, flags, KILLED, moment)}", flush=True)
        killed, rest = _run(copy, flags, KILLED)
        equal = [_compare("killed, then run again", plain, killed, rest)]
        shared, rest = _run(copy, [*flags, "--shards", "2"], SHARED)
        equal.append(_compare("in 2 shards", plain, shared, rest))
        equal += [_damage(copy, flags, plain, name) for name in ("02_layers.parquet", "02_evidence.csv")]
    return int(not all(equal))


def _copy(target: Path) -> Path:
    ignored = shutil.ignore_patterns(".*", "__pycache__", "results", "figures")
    return Path(shutil.copytree(ROOT, target, ignore=ignored))


def _command(flags: Sequence[str], name: str) -> list[str]:
    return [sys.executable, "-m", "helpers.cli", *flags, "--name", name]


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


def _kill(copy: Path, flags: Sequence[str], name: str, moment: float) -> str:
    running = subprocess.Popen(
        _command(flags, name), cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    time.sleep(moment)
    os.kill(running.pid, signal.SIGKILL)
    lines = (running.communicate()[0] or "").strip().splitlines()
    return lines[-1] if lines else "before the first line"


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
