"""The same shards on a cluster: one job a shard through submitit, on Slurm or, to try it, on this machine.

    python -m pip install -r requirements-cluster.in
    python -m helpers.cluster --shards 16 --set slurm_partition=gpu --set gpus_per_node=1 -- --model DIR --device cuda
    ./run_all.sh --model DIR --device cuda          # joins the parts

What stands behind `--` are the flags of `./run_all.sh`. The repository, the environment and the model's folder must be
visible from every node under the same path. Jobs skip what exists: after a failure the same command does the rest.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from helpers import cli, launch, runner, shards
from helpers.errors import InputError
from helpers.paths import RESULTS, ROOT, relative
from helpers.shard_run import SHARDED


def main(arguments: Sequence[str]) -> int:
    """Submit, wait, and say how each job went; exit status 1 if one failed."""
    own, flags = _split(arguments)
    parser = cli.Parser(prog="python -m helpers.cluster", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", metavar="N", type=int, required=True, help="number of jobs")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a submitit parameter, such as timeout_min=240"
    )
    options = parser.parse_args(own)
    asked = cli.parse(flags)
    # Not resolved here: the machine that submits may have no GPU.
    parameters = cli.parameters(asked, "cuda" if asked.device == "auto" else asked.device)
    if not 1 <= options.shards <= 1000:
        raise InputError(f"--shards {options.shards}: expected 1 to 1000")
    plan = runner.make_plan(parameters, force=())
    wanted = [number for number in SHARDED if number in plan.stale]
    if not wanted:
        print(f"nothing to do: {relative(plan.results)} is up to date")
        return 0
    return _submit(parameters, options, wanted)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    place = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:place]), list(arguments[place + 1 :])


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


def _submit(parameters: dict[str, Any], options: argparse.Namespace, wanted: Sequence[str]) -> int:
    try:
        import submitit
    except ImportError:
        raise InputError("submitit is not installed: python -m pip install -r requirements-cluster.in") from None
    os.chdir(ROOT)  # jobs start where they were submitted and import the helpers from there
    os.environ.update(launch.quiet() | launch.threads(str(parameters["MODEL"])))
    folder = RESULTS / parameters["SLUG"] / "logs" / "jobs"
    executor = submitit.AutoExecutor(folder=folder, cluster=options.executor)
    executor.update_parameters(**{"timeout_min": 24 * 60, **settings(options.set)})
    n = options.shards
    every = zip(*((parameters, shard, n, list(wanted)) for shard in range(n)), strict=True)
    jobs = executor.map_array(shards.work, *every)
    print(f"{n} jobs for the sweeps of {', '.join(wanted)}; logs in {relative(folder)}", flush=True)
    failed = sum([_failed(job) for job in jobs])
    if failed:
        print(f"{failed} of {n} jobs failed; what finished is kept, the same command does the rest", file=sys.stderr)
    return int(bool(failed))


def _failed(job: Any) -> bool:
    """Wait for a job and print what it says; True if it failed."""
    error = job.exception()
    if error is None:
        print(f"job {job.job_id}: {job.result()}", flush=True)
        return False
    lines = [line for line in str(error).splitlines() if line.strip()]
    print(f"job {job.job_id}: {lines[-1] if lines else error!r}", file=sys.stderr, flush=True)
    return True


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"helpers.cluster: {' '.join(str(error).split())}")
