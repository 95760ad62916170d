"""Exact interventions by five tools: the same model, pairs, outcome and numbers, and the seconds that each takes.

    python -m benchmarks.peers                    # the quoted shape; about 45 minutes on one core
    python -m benchmarks.peers --shape smoke      # seconds; checks that everything runs

Peers come from `pip install -r requirements-benchmarks.in`; one that is absent is skipped. A peer's time is the
same for every intervention of a kind, so it is measured on some of them, spread evenly, and scaled to all; ours is
always measured on all. Their numbers must agree with ours before a time is written. Results:
results/benchmarks/peers.csv and a figure.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from benchmarks import bound, draw
from benchmarks.shapes import (
    QUOTED,
    SMOKE,
    Job,
    Shape,
    Workload,
    machine,
    prompts,
    random_llama,
    tokenizer_folder,
    workloads,
)
from benchmarks.tools import TOOLS, Run, clean_outcome, is_installed, make_subject, setting_for
from companion.base.errors import InputError
from companion.model.architecture import Subject
from companion.model.verify import verify

OURS = "this repository"
TOLERANCE = 1e-2  # of the largest effect, float32


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every tool on every workload and writes table and figure."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    shape = SMOKE if options.shape == "smoke" else QUOTED
    for name, (_, package) in TOOLS.items():
        if not is_installed(package):
            print(f"{name}: not installed, skipped (pip install -r requirements-benchmarks.in)")
    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(random_llama(shape), tokenizer_folder(Path(folder), shape.vocabulary))
        verify(subject)
        rate = bound.product_rate(shape)
        rows = [row for work in workloads(shape) for row in _compare(subject, shape, work, rate, options.seconds)]
    table = pd.DataFrame(rows).assign(**machine(), shape=options.shape)
    print(table[["workload", "tool", "unembeds", "seconds", "times_ours", "largest_difference"]].to_string(index=False))
    draw.save_peers(table, "peers" if options.shape == "quoted" else f"peers_{options.shape}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description="Time exact interventions by five tools.")
    parser.add_argument("--shape", choices=["quoted", "smoke"], default="quoted")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long a peer is timed on one workload")
    return parser.parse_args(arguments)


def _compare(subject: Subject, shape: Shape, work: Workload, rate: float, budget: float) -> list[dict[str, object]]:
    control, treated = prompts(shape, work.pairs)
    setting = setting_for(subject, control, treated, work.log_prob)
    ours, seconds = _timed_whole(TOOLS[OURS][0](setting), work.jobs)
    largest = float((ours - clean_outcome(setting)[:, None]).abs().max())
    least = bound.minimal_operations(shape, work) / rate
    rows = [_row(work, OURS, "", len(work.jobs), seconds, seconds), _row(work, "arithmetic", "", 0, least, seconds)]
    for name, (make, package) in TOOLS.items():
        if name == OURS or not is_installed(package):
            continue
        for last_only, unembeds in ((True, "last token"), (False, "every token")):
            run = make(replace(setting, last_only=last_only))
            chosen = _spread(work.jobs, run, budget)
            theirs, took = _timed(run, chosen)
            difference = float((theirs - ours[:, [work.jobs.index(job) for job in chosen]]).abs().max()) / largest
            if not difference < TOLERANCE:
                raise InputError(f"{name} is off by {difference:.1e} of the largest effect; times mean nothing then")
            scaled = took * len(work.jobs) / len(chosen)
            rows.append(_row(work, name, unembeds, len(chosen), scaled, seconds) | {"largest_difference": difference})
            print(f"{work.name}: {name}, {unembeds}: {scaled:.3g} s, {scaled / seconds:.3g} times ours", flush=True)
    return rows


def _row(work: Workload, tool: str, unembeds: str, timed: int, seconds: float, ours: float) -> dict[str, object]:
    package = TOOLS[tool][1] if tool in TOOLS else None
    version = metadata.version(package.replace("_", "-")) if package and tool != OURS else ""
    return {
        "workload": work.name, "tool": tool, "version": version, "unembeds": unembeds, "interventions": len(work.jobs),
        "timed": timed, "seconds": seconds, "times_ours": seconds / ours, "largest_difference": 0.0,
    }  # fmt: skip


def _spread(jobs: Sequence[Job], run: Run, budget: float) -> list[Job]:
    """As many interventions, evenly spread, as fit into the budget; at least one of each site."""
    sites = {job.site: job for job in jobs}
    _timed(run, list(sites.values()))  # warm
    each = _timed(run, list(sites.values()))[1] / len(sites)
    n_chosen = min(len(jobs), max(len(sites), int(budget / each)))
    step = len(jobs) / n_chosen
    return [jobs[int(i * step)] for i in range(n_chosen)]


def _timed(run: Run, jobs: Sequence[Job]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = run(jobs)
    return result, time.perf_counter() - start


def _timed_whole(run: Run, jobs: Sequence[Job]) -> tuple[Tensor, float]:
    """All interventions; the better of two if they are quick, since the first also warms caches."""
    result, first = _timed(run, jobs)
    return result, min(first, _timed(run, jobs)[1]) if first < 30 else first


if __name__ == "__main__":
    main()
