"""`./run_all.sh --shards N`: the sweeps of notebooks 02 and 03 shared among N jobs of submitit, on this machine or on Slurm.

A job measures every N-th batch and keeps each as a file of its own; the notebooks then join them. A batch that is there is
skipped, so that the same command does the rest after a failure. The command line imports this: standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from companion.base.errors import InputError, explained
from companion.base.paths import PARTS, relative
from companion.run import notebooks
from companion.run.runner import Plan, lock_file, only_run

ERROR = re.compile(r"[A-Za-z_][\w.]*: \S")  # how most programs begin the line that says what was wrong


def measure_shards(plan: Plan, numbers: Sequence[str], flags: argparse.Namespace) -> bool:
    """Measure the sweeps of the stale ones of `numbers` in `flags.shards` jobs (0: none); False if a job failed."""
    wanted = [number for number in ("02", "03") if number in numbers and number in plan.stale]
    if not wanted or not (flags.shards or flags.force):
        return True
    with only_run(plan.results):
        if flags.force:  # forced notebooks start from nothing
            shutil.rmtree(plan.results / PARTS, ignore_errors=True)
        if not flags.shards:
            return True
        executor = flags.executor or ("slurm" if shutil.which("sbatch") else "local")
        variables = _variables(plan.parameters, executor, flags.shards)
        logs, n = plan.results / "logs" / "jobs", len(variables)
        lock = lock_file(plan.results) if executor == "local" else None
        calls = [(dict(plan.parameters), wanted, place, n, variables[place], lock) for place in range(n)]
        jobs = submit(logs, executor, flags.set, calls)
        print(f"{n} {executor} jobs for the sweeps of {', '.join(wanted)}; logs in {relative(logs)}", flush=True)
        return not sum([_failed(job) for job in jobs])


def _variables(parameters: Mapping[str, Any], executor: str, n: int) -> list[dict[str, str]]:
    """Variables of each job: its threads, and on this machine its share of the cores or the one GPU that it sees."""
    device, threads = str(parameters["DEVICE"]), notebooks.threads(str(parameters["MODEL"]))
    if executor == "slurm":
        return [threads] * n
    if device == "cpu":
        share = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n))}
        return [threads or share] * n
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch

        named = ",".join(map(str, range(torch.cuda.device_count())))
    shown = named.split(",")[:n] if device == "cuda" else [named]  # more processes than GPUs would gain nothing
    return [threads | {"CUDA_VISIBLE_DEVICES": names} for names in shown]


def submit(logs: Path, executor: str, given: Sequence[str], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The submitted jobs, each a call of `measure_share`; `given` are submitit's parameters as typed (timeout_min=240)."""
    import submitit  # an optional extra

    pairs = (one.partition("=") for one in given)
    parameters = {name: int(value) if value.isdecimal() else value for name, _, value in pairs}
    os.environ.update(notebooks.DETERMINISTIC)
    # Errors are of many kinds: no Slurm here, an unknown parameter, a partition that is not there.
    with explained("the jobs could not be submitted", "see --set and --executor"):
        made = submitit.AutoExecutor(folder=logs, cluster=executor)
        made.update_parameters(**{"timeout_min": 24 * 60, **parameters})
        return list(made.map_array(measure_share, *zip(*calls, strict=True)))


def measure_share(
    parameters: Mapping[str, Any], wanted: Sequence[str], shard: int, n_shards: int, variables: Mapping[str, str],
    lock: Path | None,
) -> str:  # fmt: skip
    """Measure one shard of the sweeps of `wanted`, while the runner holds `lock`; a sentence on how much was there already."""
    os.environ.update(variables)
    if lock is not None:
        threading.Thread(target=_end_with, args=(lock,), daemon=True).start()
    from companion.mediation import study, sweeps  # only now: torch reads the variables once

    options = {name: parameters[name.upper()] for name in ("device", "dtype", "profile", "pairs")}
    this = study.begin(parameters["MODEL"], parameters["PROMPTS"], parameters["SLUG"], **options)
    asked = [(this, "layers")] if "02" in wanted else []
    asked += [(this, "whole answers")] if "02" in wanted and this.of("T2", "T2b") and not this.is_costly else []
    asked += [(this, "modules")] if "03" in wanted else []
    counts = [sweeps.run_shard(one, name, shard, n_shards) for one, name in asked]
    if "02" in wanted:
        for _, other in study.control_studies(this, parameters["MODEL"], parameters["PROFILE"]):
            counts.append(sweeps.run_shard(other, "layers with direct effects", shard, n_shards))
    made, found = map(sum, zip(*counts, strict=True))
    return f"shard {shard + 1} of {n_shards}: {made} batches measured, {found} were there"


def _end_with(lock: Path) -> None:
    """End this process when nobody holds the lock any more; submitit's local jobs would go on without the runner."""
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        os._exit(1)


def _failed(job: Any) -> bool:
    """Wait for a job and print what it says; True if it failed."""
    if (error := job.exception()) is None:
        print(f"job {job.job_id}: {job.result()}", flush=True)
        return False
    log = Path(job.paths.stderr)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in [*str(error).splitlines(), *text.splitlines()] if line.strip()]
    why = ([line for line in lines if ERROR.match(line)] or lines or ["it ended without a word"])[-1]
    why = why.removeprefix(f"{InputError.__module__}.{InputError.__qualname__}: ")
    print(f"job {job.job_id}: {why}\n  the whole story: {relative(log)}", file=sys.stderr, flush=True)
    return True
