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
BOUND = "arithmetic"


def save_peers(table: pd.DataFrame, name: str) -> None:
    """The comparison as CSV and as a figure."""
    files.write_table(table, results_dir(SLUG) / f"{name}.csv")
    ours = table[table.tool == "this repository"]
    best = table[~table.tool.isin(["this repository", BOUND])].groupby("workload").times_ours.min()
    said = "; ".join(f"{work}: {best[work]:.0f} times" for work in ours.workload if work in best.index)
    with rc_context(style.STYLE):
        save_figure(
            _peers(table), name, SLUG, alt=f"Seconds by tool and workload, log scale. Best peer against ours: {said}"
        )


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


def _peers(table: pd.DataFrame) -> Figure:
    works = list(dict.fromkeys(table.workload))
    figure = Figure(figsize=(7.5, 0.6 * len(works) + 1.6), layout="constrained")
    axes = figure.subplots()
    for k, (tool, part) in enumerate(table[table.tool != BOUND].groupby("tool", sort=False)):
        for unembeds, half in part.groupby("unembeds", sort=False):
            is_default = unembeds == "every token"
            label = f"{tool}, as documented" if is_default else f"{tool}, last token only" if unembeds else tool
            axes.plot(
                half.seconds, [works.index(work) for work in half.workload], style.MARKERS[k], ms=6,
                color=style.OKABE_ITO[k], markerfacecolor="none" if is_default else style.OKABE_ITO[k], label=label,
            )  # fmt: skip
    least = table[table.tool == BOUND]
    axes.plot(
        least.seconds,
        [works.index(work) for work in least.workload],
        "|",
        color="black",
        ms=14,
        label="arithmetic bound",
    )
    axes.set(xscale="log", xlabel="seconds (log scale)", yticks=range(len(works)), yticklabels=works)
    axes.invert_yaxis()
    facts = table.iloc[0]
    axes.set_title("Exact interventions: the same numbers, by tool")
    figure.supxlabel(f"{facts.processor}, {facts.threads} thread(s), torch {facts.torch}", fontsize=7)
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.3, -0.2))
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
