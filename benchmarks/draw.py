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


def save_scaling(table: pd.DataFrame, name: str, overhead: float) -> None:
    """Cost against size as CSV and as a figure, with the cost model's line."""
    files.write_table(table, results_dir(SLUG) / f"{name}.csv")
    off = (table.times_formula / overhead).agg(["min", "max"])
    alt = (
        f"Seconds against {', '.join(dict.fromkeys(table.factor))}; measured points are {off['min']:.1f} to {off['max']:.1f} "
        "times what the cost model gives"
    )
    with rc_context(style.STYLE):
        save_figure(_scaling(table.assign(line=overhead * table.operations / table.rate)), name, SLUG, alt=alt)


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
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    for axes, factor in zip(figure.subplots(2, 3, sharey=True).flat, factors, strict=True):
        part = table[table.factor == factor]
        axes.plot(part["size"], part.line, "--", color=style.OKABE_ITO[1], label="cost model")
        axes.plot(part["size"], part.seconds, "o", color=style.OKABE_ITO[0], ms=5, label="measured")
        axes.plot(part["size"], part.operations / part.rate, ":", color="black", label="arithmetic alone")
        axes.set(xscale="log", yscale="log", xlabel=factor, xticks=part["size"], xticklabels=part["size"])
        axes.xaxis.set_minor_formatter(NullFormatter())
    for row in (0, 3):
        figure.axes[row].set_ylabel("seconds")
    figure.axes[0].legend(fontsize=7)
    facts = table.iloc[0]
    title = "Cost follows the operations that are counted, whichever size grows"
    figure.suptitle(title, fontsize=10, fontweight="bold")
    figure.supxlabel(f"{facts.processor}, {facts.threads} thread(s), torch {facts.torch}", fontsize=7)
    return figure


def save_profile(rows: list[dict[str, object]], name: str) -> pd.DataFrame:
    """Seconds by notebook and kind of work as CSV and as stacked bars; returns minutes, with sums and shares in percent."""
    table = pd.DataFrame(rows)
    files.write_table(table.assign(share=table.seconds / table.seconds.sum()), results_dir(SLUG) / f"{name}.csv")
    minutes = table.pivot_table(index="notebook", columns="kind", values="seconds", sort=False) / 60
    total = minutes.sum().sum()
    share = 100 * minutes.sum() / total
    title = f"Most of the time of a run: {share.idxmax()}, {share.max():.0f} %"
    with rc_context(style.STYLE):
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        colours = [*style.OKABE_ITO, "#999999", "#44AA99", "#DDDDDD"]
        axes = figure.subplots()
        minutes.plot.bar(stacked=True, ax=axes, color=colours, rot=0, xlabel="notebook", ylabel="minutes", title=title)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        save_figure(figure, name, SLUG, alt=f"Minutes of each notebook by kind of work, {total:.0f} in all. {title}")
    shown = pd.concat([minutes, minutes.sum().to_frame("all").T]).T
    return pd.concat([shown, shown.sum().to_frame("all").T]).assign(percent=[*share, 100.0])
