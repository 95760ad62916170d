"""Exact interventions by six tools: the same model, pairs, outcome and numbers, and how many each makes in a second.

    TQDM_DISABLE=1 python -m benchmarks.peers                             # SmolLM2 on chat prompts, one thread
    TQDM_DISABLE=1 python -m benchmarks.peers --shape quoted --threads 2  # random weights, two threads
    TQDM_DISABLE=1 python -m benchmarks.peers --shape smoke               # a minute; checks that everything runs

**Exact patches per second** = interventions x pairs / seconds. One intervention is the full effect of replacing one site's
value (of a token group: several tokens') by the other prompt's, read as two tokens' logit difference and one's log-probability
against the whole vocabulary, unless a workload says "log-odds only". Both clean runs are given to all and not timed.

What was timed is what was checked. A row is EXACT where its result lies within `TOLERANCE` of ours and ours within it of one
full forward pass for each of some interventions; SILENTLY_WRONG where it does not, without any error; REFUSED where the tool
raised an error, which `note` holds. Only exact rows have a ratio, and `best` marks the fastest exact setting of each tool.

Peers come from `pip install -r requirements-benchmarks.in`; one that is absent is skipped. They are timed on some of the
interventions, spread evenly, and scaled to all; ours is always timed on all. `peak_mb` is the resident memory above what the
process held before, `plan_mb` what the library plans for a sweep and its read-out. Rows of results/benchmarks/peers.csv are
written after each workload; a call replaces those of its own shape and threads.
"""

import argparse
import ctypes
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks import bound, draw, steered
from benchmarks.draw import OURS
from benchmarks.shapes import QUOTED, SMOKE, Case, Job, Workload, machine, random_case, real_case, workloads
from benchmarks.tools import TOOLS, Run, Setting, clean_outcome, hooks, is_installed, setting_for
from companion.base.files import write_table
from companion.base.paths import results_dir
from companion.model import memory

TOLERANCE = 1e-3  # of the largest effect
LEAST = 0.05  # log-odds: of smaller effects float32 rounding is more than a thousandth, whatever the tool
EXACT, WRONG, REFUSED = "EXACT", "SILENTLY_WRONG", "REFUSED"
FEWEST, WARM = 3, 1  # interventions that a peer is timed on at least, and is warmed up with
STEERED = "steered decoding"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every tool on every workload and writes table and figure."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    for name, (_, package, _) in TOOLS.items():
        if not is_installed(package):
            print(f"{name}: not installed, skipped (pip install -r requirements-benchmarks.in)")
    with tempfile.TemporaryDirectory() as folder:
        is_real = options.shape == "smollm2"
        case = (
            real_case(options.pairs)
            if is_real
            else random_case(SMOKE if options.shape == "smoke" else QUOTED, Path(folder))
        )
        rate, name = bound.product_rate(case.shape), "peers_smoke" if options.shape == "smoke" else "peers"
        common = {"shape": options.shape, "dtype": str(case.subject.dtype).removeprefix("torch."), **machine()}
        for work in workloads(case.shape, case.differing):
            if options.only in work.name:
                _write(name, [row | common for row in _compare(case, work, rate, options.seconds)])
        if options.only in STEERED:
            _write(name, [row | common for row in _steered(case)])
    draw.save_peers(pd.read_csv(results_dir(draw.SLUG) / f"{name}.csv"), name)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description="Exact patches per second by six tools.")
    parser.add_argument("--shape", choices=["smollm2", "quoted", "smoke"], default="smollm2")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seconds", type=float, default=15.0, help="for a peer's setting on one workload (default 15)")
    parser.add_argument(
        "--pairs", type=int, default=16, help="of the real prompts (default 16; a quarter takes a quarter)"
    )
    parser.add_argument("--only", default="", help="workloads whose names contain this; the other rows stay")
    return parser.parse_args(arguments)


def _compare(case: Case, work: Workload, rate: float, budget: float) -> Iterator[Row]:
    """The rows of one workload: ours, the arithmetic bound, and every setting of every peer."""
    answer = case.answer if work.answer else None
    setting = setting_for(case.subject, *case.pairs[work.pairs], work.log_prob, case.rows, answer)
    clean, n_pos = clean_outcome(setting)[:, None], setting.control.shape[1]
    plan = memory.sweep_memory(case.subject, case.shape.n_pairs, n_pos)
    run, few = TOOLS[OURS][0](setting), _spread(work.jobs, FEWEST)
    ours, seconds, peak = _measured(run, work.jobs)
    if seconds < 30:  # the better of two, since the first also warms caches
        ours, seconds = min((ours, seconds), _measured(run, work.jobs)[:2], key=lambda one: one[1])
    largest, places = max(LEAST, float((ours - clean).abs().max())), {job: place for place, job in enumerate(work.jobs)}

    def off(found: Tensor, jobs: Sequence[Job]) -> float:
        return float((found - ours[:, [places[job] for job in jobs]]).abs().max()) / largest

    ours_off = off(hooks(setting)(few), few)
    common = {"workload": work.name, "pairs": case.shape.n_pairs, "tokens": n_pos, "interventions": len(work.jobs)}
    common |= {"unit": "patches", "tolerance": TOLERANCE}
    own = {"timed": len(work.jobs), "seconds": seconds, "off": ours_off, "peak_mb": peak, "state": _state(ours_off)}
    own |= {"plan_mb": (plan.sweep + plan.readout) / 1e6, "best": own["state"] == EXACT}
    yield _row(common, OURS, own, seconds)
    yield _row(common, draw.BOUND, {"seconds": bound.minimal_operations(case.shape, work) / rate}, seconds)
    for name, (make, package, settings) in TOOLS.items():
        rows = []
        for how in settings if name != OURS and is_installed(package) else ():
            tried = _tried(make, replace(setting, how=how), work.jobs, budget, off, ours_off)
            version = metadata.version(package.replace("_", "-"))
            rows.append(_row(common, name, {"setting": how, "version": version} | tried, seconds))
        fastest = min((row["seconds"] for row in rows if row["state"] == EXACT), default=None)
        yield from (row | {"best": row["state"] == EXACT and row["seconds"] == fastest} for row in rows)


def _state(*distances: float) -> str:
    return EXACT if all(distance < TOLERANCE for distance in distances) else WRONG


def _tried(
    make: Callable[[Setting], Run], setting: Setting, jobs: Sequence[Job], budget: float,
    off: Callable[[Tensor, Sequence[Job]], float], ours_off: float,
) -> Row:  # fmt: skip
    """One setting of a peer, timed on as many interventions as fit into the budget, and the same results checked."""
    try:
        run = make(setting)
        run(jobs[-1:])
        few = _spread(jobs, WARM)
        each = _measured(run, few)[1] / len(few)
        chosen = _spread(jobs, max(FEWEST, int(budget / each)))
        found, seconds, peak = _measured(run, chosen)
        distance = off(found, chosen)
    except Exception as error:
        return {"state": REFUSED, "note": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    scaled = {"timed": len(chosen), "seconds": seconds * len(jobs) / len(chosen)}
    return scaled | {"off": distance, "peak_mb": peak, "state": _state(distance, ours_off)}


def _steered(case: Case) -> Iterator[Row]:
    """Tokens per second of steered decoding; `times_plain` is the time as a multiple of that of the plain batch."""
    ids = next(iter(case.pairs.values()))[1]
    common = {"workload": STEERED, "pairs": len(ids), "tokens": ids.shape[1], "interventions": steered.STEPS}
    found: list[tuple[Row, Tensor]] = []
    for tool, how, run in steered.decoders(case):
        run(ids.flip(0))  # warm; another order of the prompts is another batch
        tries = [(*_measured(run, ids.roll(shift, 0)), shift) for shift in (1, 2)]
        said, seconds, peak, shift = min(tries, key=lambda one: one[1])
        row = {"tool": tool, "setting": how, "seconds": seconds, "peak_mb": peak}
        found.append((row, said.roll(-shift, 0)))
    hooked, plain = found[-1][1], next(row["seconds"] for row, _ in found if row["tool"] == steered.PLAIN)
    for row, said in found:
        own: Row = {"unit": "tokens", "times_plain": row["seconds"] / plain}
        if row["tool"] != steered.PLAIN:
            own["off"] = float((said != hooked).any(1).float().mean())  # share of answers with another token
            own["state"] = _state(own["off"])
        yield _row(common, row["tool"], row | own, found[0][0]["seconds"])


def _row(common: Row, tool: str, own: Row, ours: float) -> Row:
    """One line of the table, which is printed as well."""
    row = common | {"tool": tool, "setting": "", "state": "", "per_second": None, "seconds": None} | own
    said = row.get("note", "")
    if not said:
        row["per_second"] = row["interventions"] * row["pairs"] / row["seconds"]
        row["times_ours"] = row["seconds"] / ours if row["state"] != WRONG else None
        said = f"{row['per_second']:.4g} {row['unit']}/s, {row['seconds']:.3g} s"
    print(": ".join(filter(None, (row["workload"], tool, row["setting"], row["state"], said))), flush=True)
    return row


def _write(name: str, rows: list[Row]) -> None:
    """Puts the rows of one workload in the place of earlier ones of the same shape and threads."""
    path, made, keys = results_dir(draw.SLUG) / f"{name}.csv", pd.DataFrame(rows), ["shape", "threads", "workload"]
    if path.is_file() and "state" in (old := pd.read_csv(path)):
        same = old[keys].apply(tuple, axis=1).isin(made[keys].apply(tuple, axis=1))
        order = list(dict.fromkeys([*old.workload, *made.workload]))
        made = pd.concat([old[~same], made], ignore_index=True)
        made = made.sort_values(
            keys, key=lambda one: one.map(order.index) if one.name == "workload" else one, kind="stable"
        )
    write_table(made, path)


def _spread(jobs: Sequence[Job], n: int) -> list[Job]:
    """`n` interventions, one drawn from each of as many equal shares, the same ones each time."""
    n, draw_one = min(n, len(jobs)), random.Random(0).randrange
    return [jobs[draw_one(i * len(jobs) // n, (i + 1) * len(jobs) // n)] for i in range(n)]


def _measured(run: Callable[[Any], Tensor], asked: Any) -> tuple[Tensor, float, float]:
    """The result, the seconds, and the peak of resident memory above what was held before, in MB."""
    with _resident_peak() as peak:
        start = time.perf_counter()
        result = run(asked)
        seconds = time.perf_counter() - start
    return result, seconds, peak[0]


@contextmanager
def _resident_peak() -> Iterator[list[float]]:
    """Watches the process's resident memory (on Linux; elsewhere 0), after freed memory was given back."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    file, over, peak = Path("/proc/self/statm"), threading.Event(), [0.0]

    def held() -> float:
        return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if file.is_file() else 0.0

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], held() - before)

    before, thread = held(), threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        peak[0] = max(peak[0], held() - before)
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
