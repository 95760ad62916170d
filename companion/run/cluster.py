"""The same shards on a cluster: one job a shard through submitit, on Slurm or, to try it, on this machine.

    python -m pip install -r requirements-cluster.in
    python -m companion.run.cluster --shards 16 --set slurm_partition=gpu --set gpus_per_node=1 -- --model DIR --device cuda
    ./run_all.sh --model DIR --device cuda          # joins the parts

What stands behind `--` are the flags of `./run_all.sh`. The repository, the environment and the model's folder must be
visible from every node under the same path. Jobs skip what exists: after a failure the same command does the rest.

While this command waits, no other may write into the run's folder. A job that outlives it holds no lock and needs none: it
writes nothing but parts, each whole, and of the same bits whoever else measures that batch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from companion.base.errors import InputError
from companion.base.paths import RESULTS, ROOT, relative
from companion.run import flags, notebooks, runner
from companion.run.settings import check_pairs, fetched, known, resolve_device
from companion.run.shards import SHARDED

ERROR = re.compile(r"[A-Za-z_][\w.]*: \S")  # as Python, Slurm and most programs begin the line that says what was wrong


def main(arguments: Sequence[str]) -> int:
    """Submit, wait, and say how each job went; exit status 1 if one failed."""
    own, words = flags.split(arguments)
    parser = flags.Parser(prog="python -m companion.run.cluster", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", metavar="N", type=int, required=True, help="number of jobs")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a submitit parameter, such as timeout_min=240"
    )
    options = parser.parse_args(own)
    if not 1 <= options.shards <= 1000:
        raise InputError(f"--shards {options.shards}: expected 1 to 1000")
    given = settings(options.set)
    asked = flags.flags(words)
    chosen = flags.chosen_notebooks(asked.only)
    parameters = ready(asked)
    plan = runner.make_plan(parameters, force=())
    numbers = runner.with_needs(chosen, plan.paths)
    wanted = [number for number in SHARDED if number in plan.stale and number in numbers]
    if not wanted:
        print(f"nothing to do: the sweeps of {relative(plan.results)} are up to date, or were not asked for")
        return 0
    if (parameters["MODEL"], parameters["PROMPTS"]) != ("embedded", "embedded"):
        for line in check_pairs(*(parameters[name] for name in ("MODEL", "PROMPTS", "PAIRS", "PROFILE"))):
            print(line, flush=True)
    with runner.only_run(plan.results):
        return _submit(parameters, options.executor, given, options.shards, wanted)


def ready(asked: argparse.Namespace) -> dict[str, Any]:
    """The run's parameters as `./run_all.sh` makes them, models and public sets downloaded.

    The machine that submits may have no GPU. It then cannot make a prompt set, so the caches must hold all already;
    InputError says what they lack.
    """
    device = "cuda" if asked.device == "auto" else asked.device
    found = flags.parameters(asked, device)
    try:
        resolve_device(device)
    except InputError:
        return known(found, asked.wrappers)
    return fetched(found, asked.wrappers)


def settings(given: Sequence[str]) -> dict[str, Any]:
    """submitit parameters from the command line.

    >>> settings(["slurm_partition=gpu", "timeout_min=60"])
    {'slurm_partition': 'gpu', 'timeout_min': 60}
    """
    found: dict[str, Any] = {}
    for one in given:
        name, is_pair, value = one.partition("=")
        if not name or not is_pair:
            raise InputError(f"--set {one}: expected KEY=VALUE, such as timeout_min=240")
        found[name] = int(value) if value.isdecimal() else value
    return found


def _submit(parameters: dict[str, Any], executor: str, given: dict[str, Any], n: int, wanted: Sequence[str]) -> int:
    os.chdir(ROOT)  # jobs start where they were submitted and import the helpers from there
    os.environ.update(notebooks.quiet() | notebooks.threads(str(parameters["MODEL"])))
    folder = RESULTS / parameters["SLUG"] / "logs" / "jobs"
    jobs = _submitted(folder, executor, given, [(parameters, shard, n, list(wanted)) for shard in range(n)])
    print(f"{n} jobs for the sweeps of {', '.join(wanted)}; logs in {relative(folder)}", flush=True)
    try:
        failed = sum([_failed(job) for job in jobs])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_left(jobs, executor)) from None
    if failed:
        print(f"{failed} of {n} jobs failed; what finished is kept, the same command does the rest", file=sys.stderr)
    return int(bool(failed))


def _submitted(folder: Path, name: str, given: dict[str, Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The submitted jobs; InputError for whatever submitit or Slurm has against it."""
    try:
        import submitit
    except ImportError:
        raise InputError("submitit is not installed: python -m pip install -r requirements-cluster.in") from None
    from companion.run import shards  # here, as it imports torch: a mistake in the flags shows at once

    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=name)
        executor.update_parameters(**{"timeout_min": 24 * 60, **given})
        with _errors_in(folder / "local.log") if name == "local" else contextlib.nullcontext():
            return list(executor.map_array(shards.work, *zip(*calls, strict=True)))
    except Exception as error:  # of many kinds: no Slurm here, an unknown parameter, a partition that is not there
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"the jobs could not be submitted: {reason[:300]}; see --set and --executor ('local' needs no Slurm)"
        ) from error


@contextlib.contextmanager
def _errors_in(file: Path) -> Iterator[None]:
    """Processes started here write their errors into a file: Ctrl-C would print a traceback of each local job's keeper."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = os.dup(2)
    try:
        with file.open("ab") as stream:
            os.dup2(stream.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _left(jobs: Sequence[Any], executor: str) -> str:
    """What becomes of the jobs when nobody waits for them: those of Slurm go on, those here end with this process."""
    if executor == "local":
        for job in jobs:
            job.cancel()
        return "so are its jobs; what finished is kept, and the same command does the rest"
    number = str(jobs[0].job_id).partition("_")[0]
    return f"its jobs go on (scancel {number} ends them); what finishes is kept, and the same command does the rest"


def _failed(job: Any) -> bool:
    """Wait for a job and print what it says; True if it failed."""
    error = job.exception()
    if error is None:
        print(f"job {job.job_id}: {job.result()}", flush=True)
        return False
    log = Path(job.paths.stderr)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    print(
        f"job {job.job_id}: {reason(text, str(error))}\n  the whole story: {relative(log)}", file=sys.stderr, flush=True
    )
    return True


def reason(log: str, error: str) -> str:
    """Why a job failed: the last line that looks like an error, of its log or else of what submitit says of it.

    >>> reason("Traceback\\n  File x\\nhelpers.errors.InputError: no model\\n\\nsee above", "")
    'no model'
    """
    for text in (log, error):
        found = [line.strip() for line in text.splitlines() if ERROR.match(line)]
        if found:
            return found[-1].removeprefix(f"{InputError.__module__}.{InputError.__qualname__}: ")
    return next((line.strip() for line in error.splitlines() if line.strip()), "it ended without a word")


if __name__ == "__main__":
    sys.exit(flags.run_with_flags("companion.run.cluster", main, sys.argv[1:]))
