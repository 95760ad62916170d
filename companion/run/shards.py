"""One share of a run's sweeps, in a process of its own: on one machine `./run_all.sh --shards N` starts them, on a
cluster `companion.run.cluster`.

`python -m companion.run.shards PARAMETERS SHARD N NOTEBOOKS` measures every N-th batch from batch SHARD on of all sweeps that the
NOTEBOOKS (02,03) of the run with the JSON object PARAMETERS ask for. What exists is skipped, so it may be stopped
and started again at any time.

Share a run's sweeps among the processors of this machine: one process a GPU, or as many as asked for on the CPU.

Only the standard library: the command line imports it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from companion.base.errors import InputError
from companion.base.paths import PARTS, RESULTS, ROOT, relative
from companion.mediation import control_models, study, sweeps
from companion.mediation.study import Study
from companion.run import notebooks
from companion.run.notebooks import quiet
from companion.run.runner import Plan, only_run


def asked_for(this: Study, parameters: Mapping[str, Any], notebooks: Sequence[str]) -> Iterator[tuple[Study, str]]:
    """The sweeps of the notebooks, each with the study that it is of: the run's own, or a relative of its model."""
    if "02" in notebooks:
        yield this, "layers"
        if this.of("T2", "T2b"):
            yield this, "whole answers"
    if "03" in notebooks:
        yield this, "modules"
    if "02" in notebooks:
        for _, relative in control_models.control_studies(this, parameters["MODEL"], parameters["PROFILE"]):
            yield relative, "layers with direct effects"


def work(parameters: Mapping[str, Any], shard: int, n_shards: int, notebooks: Sequence[str]) -> str:
    """Measure one shard of every sweep; returns a sentence on how much was measured and how much was there."""
    names = {"device": "DEVICE", "dtype": "DTYPE", "profile": "PROFILE", "pairs": "PAIRS"}
    settings = {name: parameters[key] for name, key in names.items()}
    this = study.begin(parameters["MODEL"], parameters["PROMPTS"], parameters["SLUG"], **settings)
    made, found = 0, 0
    for one, name in asked_for(this, parameters, notebooks):
        measured, skipped = sweeps.run_shard(one, name, shard, n_shards)
        made, found = made + measured, found + skipped
    return f"shard {shard + 1} of {n_shards}: {made} batches measured, {found} were there"


if __name__ == "__main__":
    if notebooks.has_runner():
        threading.Thread(target=notebooks.end_with_the_runner, daemon=True).start()
    try:
        settings, shard, n_shards, numbers = sys.argv[1:]
        print(work(json.loads(settings), int(shard), int(n_shards), numbers.split(",")))
    except InputError as error:
        sys.exit(" ".join(str(error).split()))


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
    command = [sys.executable, "-m", "companion.run.shards", *words]
    with log.open("w", encoding="utf-8") as file:
        variables = quiet() | threads(str(parameters["MODEL"]), n_shards) | gpu(parameters["DEVICE"], shard)
        return subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def threads(model: str, n_shards: int) -> dict[str, str]:
    """Its share of the cores for each process, unless OMP_NUM_THREADS says otherwise; one for the shipped models."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return notebooks.threads(model) or {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n_shards))}


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
    last = lines[-1] if lines and status != -signal.SIGKILL else notebooks.ended(status)
    if status > 0 and not lines:
        last = f"{last} and wrote nothing into its log (is there room on the disk?)"
    if status:
        print(f"{log.stem}: {last}\n  the whole story: {relative(log)}", file=sys.stderr, flush=True)
    else:
        print(last, flush=True)
    return status != 0
