"""Share a run's sweeps among the processors of this machine: one process a GPU, or as many as asked for on the CPU.

Only the standard library: the command line imports it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers import launch
from helpers.paths import RESULTS, ROOT, relative
from helpers.runner import Plan, only_run
from helpers.staging import PARTS

SHARDED = ("02", "03")  # the notebooks whose sweeps can be shared


def prepare(plan: Plan, numbers: Sequence[str], n_shards: int, *, force: bool) -> bool:
    """Measure the sweeps of the stale ones of `numbers` in shards (0: none), for the notebooks to join.

    Forced notebooks start from nothing, so their parts go first. Returns False if a shard failed.
    """
    wanted = [number for number in numbers if number in SHARDED and number in plan.stale]
    if not wanted or not (n_shards or force):
        return True
    with only_run(plan.results):
        if force:
            shutil.rmtree(plan.results / PARTS, ignore_errors=True)
        failed = measure(plan.parameters, n_shards, wanted) if n_shards else 0
    if failed:
        print("not every shard finished; what did is kept, and the same command goes on from there", file=sys.stderr)
    return not failed


def measure(parameters: Mapping[str, Any], asked: int, notebooks: Sequence[str]) -> int:
    """Start one process a shard, wait for all of them, and say how each went; returns how many failed.

    One that fails does not stop the others; what they finished is kept and found by the next attempt.
    """
    n_shards = processes(parameters["DEVICE"], asked)
    logs = RESULTS / parameters["SLUG"] / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    fewer = f" (one for each GPU, not {asked})" if n_shards < asked else ""
    print(f"sweeps of {', '.join(notebooks)} in {n_shards} shard{'s' * (n_shards != 1)}{fewer} ...", flush=True)
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    try:
        for shard in range(n_shards):
            log = logs / f"shard_{shard + 1}.log"
            running.append((_start(parameters, shard, n_shards, notebooks, log), log))
        return sum([_finished(process, log) for process, log in running])
    except BaseException:
        for process, _ in running:
            process.send_signal(signal.SIGTERM)
        for process, _ in running:
            process.wait()
        raise


def _start(
    parameters: Mapping[str, Any], shard: int, n_shards: int, notebooks: Sequence[str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a shard. It holds the other end of a pipe: if this process is killed, it ends too."""
    words = [json.dumps(dict(parameters)), str(shard), str(n_shards), ",".join(notebooks)]
    command = [sys.executable, "-m", "helpers.shards", *words]
    with log.open("w", encoding="utf-8") as file:
        variables = launch.quiet() | threads(str(parameters["MODEL"]), n_shards) | gpu(parameters["DEVICE"], shard)
        return subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def threads(model: str, n_shards: int) -> dict[str, str]:
    """Its share of the cores for each process, unless OMP_NUM_THREADS says otherwise; one for the shipped models."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return launch.threads(model) or {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n_shards))}


def processes(device: str, asked: int) -> int:
    """How many processes run at once: as many as asked for on the CPU, at most one for each GPU.

    A batch is the unit that is kept, so more shards than processors would gain nothing.

    >>> processes("cpu", 5), processes("cuda:1", 5)
    (5, 1)
    """
    if device == "cpu":
        return asked
    return max(1, min(asked, len(visible_gpus()))) if device == "cuda" else 1


def gpu(device: str, shard: int) -> dict[str, str]:
    """For `cuda`, the one GPU that this shard sees. `cuda:N` and `cpu` stay as they are."""
    names = visible_gpus() if device == "cuda" else []
    return {"CUDA_VISIBLE_DEVICES": names[shard % len(names)]} if names else {}


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or the numbers of all there are."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip()]


def _finished(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait for a shard and print its last line; True if it failed."""
    status = process.wait()
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines and status != -signal.SIGKILL else launch.ended(status)
    if status > 0 and not lines:
        last = f"{last} and wrote nothing into its log (is there room on the disk?)"
    if status:
        print(f"{log.stem}: {last}\n  the whole story: {relative(log)}", file=sys.stderr, flush=True)
    else:
        print(last, flush=True)
    return status != 0
