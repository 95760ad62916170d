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
interventions, spread evenly, and scaled to all; ours is always timed on all. Rows of results/benchmarks/peers.csv are written
after each workload; a call replaces those of its own shape and threads.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.cost_model import minimal_operations, product_rate
from benchmarks.shapes import QUOTED, SMOKE, Case, Job, Workload, machine, random_case, real_case, workloads
from benchmarks.tools import OURS, TOOLS, Run, Setting, clean_outcome, hooks, is_installed, setting_for
from companion.base.files import write_table
from companion.base.paths import results_dir
from companion.plots import style
from companion.plots.figures import save_figure

TOLERANCE = 1e-3  # of the largest effect
LEAST = 0.05  # log-odds: of smaller effects float32 rounding is more than a thousandth, whatever the tool
EXACT, WRONG, REFUSED = "EXACT", "SILENTLY_WRONG", "REFUSED"
FEWEST, WARM = 3, 1  # interventions that a peer is timed on at least, and is warmed up with
BOUND = "arithmetic bound"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every tool on every workload and writes table and figure."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    for name, (_, package, _) in TOOLS.items():
        if not is_installed(package):
            print(f"{name}: not installed, skipped (pip install -r requirements-benchmarks.in)")
    name = "peers_smoke" if options.shape == "smoke" else "peers"
    with tempfile.TemporaryDirectory() as folder:
        if options.shape == "smollm2":
            case = real_case(options.pairs)
        else:
            case = random_case(SMOKE if options.shape == "smoke" else QUOTED, Path(folder))
        rate = product_rate(case.shape)
        common = {"shape": options.shape, "dtype": str(case.subject.dtype).removeprefix("torch."), **machine()}
        for work in workloads(case.shape, case.differing):
            if options.only in work.name:
                _write(name, [row | common for row in _compare(case, work, rate, options.seconds)])
    _save_figure(pd.read_csv(results_dir("benchmarks") / f"{name}.csv"), name)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description="Exact patches per second by six tools.")
    parser.add_argument("--shape", choices=["smollm2", "quoted", "smoke"], default="smollm2")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seconds", type=float, default=15.0, help="for a peer's setting on one workload (default 15)")
    parser.add_argument("--pairs", type=int, default=16, help="of the real prompts (default 16)")
    parser.add_argument("--only", default="", help="workloads whose names contain this; the other rows stay")
    return parser.parse_args(arguments)


def _compare(case: Case, work: Workload, rate: float, budget: float) -> Iterator[Row]:
    """The rows of one workload: ours, the arithmetic bound, and every setting of every peer."""
    setting = setting_for(case, work)
    clean, n_pos = clean_outcome(setting)[:, None], setting.control.shape[1]
    run, few = TOOLS[OURS][0](setting), _spread(work.jobs, FEWEST)
    ours, seconds = _measured(run, work.jobs)
    if seconds < 30:  # the better of two, since the first also warms caches
        seconds = min(seconds, _measured(run, work.jobs)[1])
    largest, places = max(LEAST, float((ours - clean).abs().max())), {job: place for place, job in enumerate(work.jobs)}

    def off(found: Tensor, jobs: Sequence[Job]) -> float:
        return float((found - ours[:, [places[job] for job in jobs]]).abs().max()) / largest

    ours_off = off(hooks(setting)(few), few)
    common = {"workload": work.name, "pairs": case.shape.n_pairs, "tokens": n_pos, "interventions": len(work.jobs)}
    common["tolerance"] = TOLERANCE
    own = {"timed": len(work.jobs), "seconds": seconds, "off": ours_off, "state": _state(ours_off)}
    yield _row(common, OURS, own | {"best": own["state"] == EXACT}, seconds)
    yield _row(common, BOUND, {"seconds": minimal_operations(case.shape, work) / rate}, seconds)
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
        found, seconds = _measured(run, chosen)
        distance = off(found, chosen)
    except Exception as error:
        return {"state": REFUSED, "note": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    scaled = {"timed": len(chosen), "seconds": seconds * len(jobs) / len(chosen)}
    return scaled | {"off": distance, "state": _state(distance, ours_off)}


def _row(common: Row, tool: str, own: Row, ours: float) -> Row:
    """One line of the table, which is printed as well."""
    row = common | {"tool": tool, "setting": "", "state": "", "per_second": None, "seconds": None} | own
    said = row.get("note", "")
    if not said:
        row["per_second"] = row["interventions"] * row["pairs"] / row["seconds"]
        row["times_ours"] = row["seconds"] / ours if row["state"] != WRONG else None
        said = f"{row['per_second']:.4g} patches/s, {row['seconds']:.3g} s"
    print(": ".join(filter(None, (row["workload"], tool, row["setting"], row["state"], said))), flush=True)
    return row


def _write(name: str, rows: list[Row]) -> None:
    """Puts the rows of one workload in the place of earlier ones of the same shape and threads."""
    path, made, keys = results_dir("benchmarks") / f"{name}.csv", pd.DataFrame(rows), ["shape", "threads", "workload"]
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


def _measured(run: Run, jobs: Sequence[Job]) -> tuple[Tensor, float]:
    """The result and the seconds."""
    start = time.perf_counter()
    result = run(jobs)
    return result, time.perf_counter() - start


def _save_figure(table: pd.DataFrame, name: str) -> None:
    """The real model on one thread, or what there is: a row a workload, a colour a tool, at its fastest exact setting."""
    wanted = table[(table["shape"] == "smollm2") & (table.threads == 1)]
    first = table[(table["shape"] == table["shape"].iloc[0]) & (table.threads == table.threads.iloc[0])]
    table = wanted if len(wanted) else first
    best = table[table.best.eq(True) & (table.tool != OURS)].groupby("workload", sort=False).times_ours.min()
    said = "; ".join(f"{work}: {times:.3g} times" for work, times in best.items())
    alt = f"Exact patches per second by tool and workload, log scale. Ours against the fastest other: {said}"
    title = f"{best.min():.2g} to {best.max():,.0f} times as many exact patches a second as the fastest other tool or baseline"
    works, facts = list(dict.fromkeys(table.workload)), table.iloc[0]
    with rc_context(style.STYLE):
        figure = Figure(figsize=(7.5, 0.33 * len(works) + 1.9), layout="constrained")
        axes = figure.subplots()
        for k, tool in enumerate([*dict.fromkeys(table.tool[table.tool != BOUND]), BOUND]):
            part = table[(table.tool == tool) & (table.best.eq(True) | (table.tool == BOUND))]
            marker, size = ("|", 12) if tool == BOUND else (style.MARKERS[k], 8 if tool == OURS else 5)
            colour = "black" if tool == BOUND else style.OKABE_ITO[k]
            places = [works.index(work) for work in part.workload]
            axes.plot(part.per_second, places, marker, ms=size, color=colour, label=tool, zorder=2 + (tool == OURS))
        axes.set(xscale="log", yticks=range(len(works)), yticklabels=works)
        axes.set_xlabel(
            f"exact patches per second (log scale), each tool at its fastest exact setting\n{facts['shape']}, {facts.pairs} "
            f"pairs, {facts['dtype']}, {facts.processor}, {facts.threads} thread(s), torch {facts.torch}",
            fontsize=7.5,
        )
        axes.invert_yaxis()
        figure.suptitle(title, fontsize=10, fontweight="bold")
        figure.legend(fontsize=8, ncols=4, loc="outside lower center")
        save_figure(figure, name, "benchmarks", alt=alt)


if __name__ == "__main__":
    main()
