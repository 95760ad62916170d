"""Figures of notebook 05: maps of tokens by layer, what carries the signal on, and when an answer is decided."""

from __future__ import annotations

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter

from companion.plots import style
from companion.plots.style import BY_LAYER, ESTIMATE, TOTAL, by_layer, distinct, heading, new_figure, spec

ROWS = {
    "rest": "other words", "last_instruction": "last word or mark", "template": "template behind it", "last": "last token",
}  # fmt: skip
PATHS = {"MLPs": "MLPs without attention", "attention": "needs attention", "skip": "neither: residual stream"}
TREATED = {
    "T1": "T1: harmless to harmful request",
    "T2": "T2: jailbreak wrapper",
    "T2-T2b": "T2 - T2b: wrapper, on harm only",
}
TIMES = {"none": "never", "first token": "first token only", "first five": "first five tokens"}


def _map(ax: Axes, part: pd.DataFrame, row: str, value: str, bound: float) -> AxesImage:
    """Shares by row and layer, with their numbers in percent; hatched where the architecture lets no difference arrive."""
    rows = distinct(part[row])
    grid = part.pivot(index=row, columns="layer", values=value).reindex(rows)
    steps = colormaps["RdBu_r"].resampled(max(1, int(bound / style.SHOWN) - 1 | 1))  # no number: the middle one
    image = ax.imshow(grid, cmap=steps, vmin=-bound, vmax=bound, aspect="auto")
    earliest = part.groupby(row)["earliest"].first()
    for y, name in enumerate(rows):
        width = int((grid.columns < earliest[name]).sum())
        if width > 0:
            hatched = {"fc": "none", "ec": "#999999", "hatch": "////", "lw": 0}
            ax.axhspan(y - 0.5, y + 0.5, 0, width / grid.shape[1], **hatched)
        for x, number in enumerate(grid.loc[name]):
            if abs(number) >= style.SHOWN:
                style.write_cell(ax, x, y, f"{100 * number:.0f}", abs(number) / bound)
    ax.set_xticks(range(grid.shape[1]), grid.columns)
    ax.set_xlabel("layer")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(False)
    return image


def groups(table: pd.DataFrame) -> Figure:
    """Groups of tokens in reading order against layers, one panel a treatment, on one scale."""
    names, rows = distinct(table.treatment), distinct(table.group)
    figure, axes = new_figure(len(names), 1, 7.0, 0.8 + len(names) * (0.6 + 0.24 * len(rows)))
    bound = min(1.0, float(table.estimate.abs().max()) or 1.0)
    for ax, name in zip(axes[:, 0], names, strict=True):
        part = table[table.treatment == name]
        image = _map(ax, part, "group", "estimate", bound)
        here = distinct(part.group)
        ax.set_yticks(range(len(here)), [ROWS.get(one, one) for one in here])
        ax.set_title(TREATED.get(str(name), str(name)), fontweight="normal")
    figure.colorbar(image, ax=axes, label=TOTAL, format=PercentFormatter(1.0))
    heading(figure, "Which tokens hold the effect, and when does the last one have it?")
    return figure


def tokens(table: pd.DataFrame) -> Figure:
    """Single tokens of one pair in reading order against layers: columns layer, position, token, earliest, share."""
    label = table.drop_duplicates("position").set_index("position")["token"]
    figure, axes = new_figure(1, 1, 7.0, 0.9 + 0.19 * len(label))
    ax = axes[0, 0]
    image = _map(ax, table, "position", "share", min(1.0, float(table.share.abs().max()) or 1.0))
    ax.set_yticks(range(len(label)), [str(one).replace("$", r"\$") for one in label], fontsize=8)
    ax.set_title("Which token of this prompt holds the wrapper's effect?")
    figure.colorbar(image, ax=ax, label=TOTAL, format=PercentFormatter(1.0))
    return figure


def carriers(table: pd.DataFrame) -> Figure:
    """Shares of the paths by layer; the axis ends at -0.5 and 1.5, and longer intervals leave it. A line is at `hand_over`."""
    named = table.assign(path=table.path.map(lambda name: PATHS.get(name, name)))
    title, unit = "What carries the last token's signal on to the output?", "share of the last token's effect"
    figure = by_layer(named, group="path", title=title, unit=unit, late=False)
    ax = figure.axes[0]
    ax.set_xlim(table.layer.min() - 0.5, table.layer.max() + 0.5)
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, SHARES[0]), min(high, SHARES[1]))
    for at in table.get("hand_over", table.layer[:0]).dropna().astype(int)[:1]:
        ax.axvline(at, color="black", lw=0.9, ls="--", label=f"hand-over: layer {at}")
        ax.legend()
    return figure


def timing(table: pd.DataFrame) -> Figure:
    """Rates of harmful answers by schedule, one symbol for what is held."""
    named = {"schedule": TIMES, "clamp": {"neurons": "largest neurons held", "whole MLP": "whole MLP output held"}}
    title = "The last layer is held at a refusing run's values: when, and what then?"
    unit = f"share of answers labelled harmful, n = {table.n.max()}"
    return style.dots(
        table.replace(named), row="schedule", group="clamp", title=title, unit=unit, limits=(-0.05, 1.05), below=True
    )


SHARES = (-0.5, 1.5)
# fmt: off
SPECS = (
    spec("05_tokens", tokens, "C4",
         {"layer": "int", "position": "int", "token": "str", "earliest": "float", "share": "float"},
         "Share of the total effect in the residual stream of every token of one prompt after each layer: first in the words "
         "that differ, at the end in the last token; hatched where no difference can have arrived"),
    spec("05_groups", groups, "C4", {"treatment": "str", "group": "str", "earliest": "float", **BY_LAYER},
         "Share of the total effect in the residual stream of each group of tokens after each layer, one panel a treatment: "
         "it leaves the words that differ and ends in the last token; hatched where no difference can have arrived"),
    spec("05_carriers", carriers, "C4", {"path": "str", **BY_LAYER},
         "Share of the last token's effect that needs attention, that MLPs carry without it, and that needs neither, from each "
         "layer on"),
    spec("05_timing", timing, "C5c", {"clamp": "str", "schedule": "str", "n": "int", **ESTIMATE},
         "Share of jailbroken prompts with a harmful answer, the last layer held never, at the first token, at all tokens, or "
         "at all but the first"),
)
# fmt: on
