"""Figures and tables of the benchmarks, beside the other results: results/benchmarks and figures/benchmarks."""

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from companion.base import files
from companion.base.paths import results_dir
from companion.plots import style
from companion.plots.figures import save_figure

SLUG = "benchmarks"
OURS, BOUND = "this repository", "arithmetic bound"


def save_peers(table: pd.DataFrame, name: str) -> None:
    """The comparison as a figure: patches of the real model on one thread, or what there is."""
    table = table[table.unit == "patches"]
    wanted = table[(table["shape"] == "smollm2") & (table.threads == 1)]
    first = table[(table["shape"] == table["shape"].iloc[0]) & (table.threads == table.threads.iloc[0])]
    table = wanted if len(wanted) else first
    best = table[table.best.eq(True) & (table.tool != OURS)].groupby("workload", sort=False).times_ours.min()
    said = "; ".join(f"{work}: {times:.3g} times" for work, times in best.items())
    alt = f"Exact patches per second by tool and workload, log scale. Ours against the fastest other: {said}"
    title = f"{best.min():.2g} to {best.max():,.0f} times as many exact patches a second as the fastest other tool or baseline"
    with rc_context(style.STYLE):
        save_figure(_peers(table, title), name, SLUG, alt=alt)


def save_scaling(table: pd.DataFrame, name: str) -> None:
    """Cost against size as CSV and as a figure."""
    files.write_table(table, results_dir(SLUG) / f"{name}.csv")
    worst = (table.seconds / table.bound).max()
    alt = f"Seconds against pairs, layers, positions, neurons and tokens, with the arithmetic bound; at most {worst:.1f} times it"
    with rc_context(style.STYLE):
        save_figure(_scaling(table), name, SLUG, alt=alt)


def _peers(table: pd.DataFrame, title: str) -> Figure:
    """A row a workload, a colour a tool; of each tool its fastest exact setting."""
    works = list(dict.fromkeys(table.workload))
    figure = Figure(figsize=(7.5, 0.33 * len(works) + 1.9), layout="constrained")
    axes = figure.subplots()
    for k, tool in enumerate([*dict.fromkeys(table.tool[table.tool != BOUND]), BOUND]):
        part = table[(table.tool == tool) & (table.best.eq(True) | (table.tool == BOUND))]
        marker, size = ("|", 12) if tool == BOUND else (style.MARKERS[k], 8 if tool == OURS else 5)
        colour = "black" if tool == BOUND else style.OKABE_ITO[k]
        places = [works.index(work) for work in part.workload]
        axes.plot(part.per_second, places, marker, ms=size, color=colour, label=tool, zorder=2 + (tool == OURS))
    facts = table.iloc[0]
    axes.set(xscale="log", yticks=range(len(works)), yticklabels=works)
    axes.set_xlabel(
        f"exact patches per second (log scale), each tool at its fastest exact setting\n{facts['shape']}, {facts.pairs} pairs, "
        f"{facts['dtype']}, {facts.processor}, {facts.threads} thread(s), torch {facts.torch}",
        fontsize=7.5,
    )
    axes.invert_yaxis()
    figure.suptitle(title, fontsize=10, fontweight="bold")
    figure.legend(fontsize=8, ncols=4, loc="outside lower center")
    return figure


def _scaling(table: pd.DataFrame) -> Figure:
    factors = list(dict.fromkeys(table.factor))
    figure = Figure(figsize=(2.3 * len(factors), 3.0), layout="constrained")
    for axes, factor in zip(figure.subplots(1, len(factors), sharey=True), factors, strict=True):
        part = table[table.factor == factor]
        axes.plot(part["size"], part.seconds, "o-", color=style.OKABE_ITO[0], ms=4, label="measured")
        axes.plot(part["size"], part.bound, "s--", color=style.OKABE_ITO[1], ms=4, label="arithmetic bound")
        axes.set(xscale="log", yscale="log", xlabel=factor, xticks=part["size"], xticklabels=part["size"])
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(fontsize=7)
    facts = table.iloc[0]
    figure.suptitle("Cost of exact interventions against size", fontsize=10, fontweight="bold")
    figure.supxlabel(f"{facts.processor}, {facts.threads} thread(s), torch {facts.torch}", fontsize=7)
    return figure
