"""The look of all figures, what a figure is (`FigureSpec`), and the plots that several notebooks share.

Each function takes one tidy table, as read from its CSV, and returns a matplotlib figure; none computes statistics.
Categories are Okabe-Ito colours and markers, effects a diverging map centred at 0; every estimate has its interval.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from companion.base.display import NotDefined
from companion.base.thresholds import LATE, depth

ESTIMATE = dict.fromkeys(("estimate", "low", "high"), "float")
BY_LAYER = {"layer": "int", **ESTIMATE}
LOG_ODDS = "effect (log-odds)"
TOTAL = "share of total effect"
SHOWN = 0.05  # the least share that is written into its cell


@dataclass(frozen=True)
class FigureSpec:
    """One figure: its name (also of its CSV), what draws its table, its claim, its columns, what it shows."""

    name: str
    draw: Callable[[pd.DataFrame], Figure]
    claim: str
    columns: dict[str, str]
    shows: str


def spec(
    name: str, function: Callable[..., Figure], claim: str, columns: dict[str, str], shows: str, **options: Any
) -> FigureSpec:
    """A `FigureSpec`; what is given by name goes to the drawing function."""
    return FigureSpec(name, partial(function, **options), claim, columns, shows)


OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NAMES = {
    "attn_out": "attention", "mlp_out": "MLP", "resid_post": "residual stream", "attn_out.direct": "attention, direct",
    "mlp_out.direct": "MLP, direct", "last_instruction": "last instruction",
}  # fmt: skip
STYLE = {
    "figure.dpi": 110, "savefig.dpi": 110, "figure.constrained_layout.use": True, "font.size": 9, "axes.titlesize": 10,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "svg.hashsalt": "companion",
}  # fmt: skip


@contextmanager
def theme() -> Iterator[None]:
    """The look of every figure, for the length of a `with` block: seaborn's theme in our colours."""
    with matplotlib.rc_context():
        seaborn.set_theme(context=None, style=None, palette=OKABE_ITO, color_codes=False, rc=STYLE)
        yield


def new_figure(
    n_rows: int = 1, n_cols: int = 1, width: float = 7.0, height: float = 3.2, **kwargs: Any
) -> tuple[Figure, np.ndarray]:
    """A figure that is shown only where it is returned, and its axes [row, column]; width and height in inches."""
    figure, axes = plt.subplots(n_rows, n_cols, figsize=(width, height), squeeze=False, **kwargs)
    plt.close(figure)  # so that a notebook shows it once, where it is returned
    return figure, axes


def heading(figure: Figure, text: str) -> None:
    """A bold title over all panels, at the left edge."""
    figure.suptitle(text, fontsize=10, fontweight="bold", x=0.01, ha="left")


def legend_below(figure: Figure | SubFigure, axes: Iterable[Axes], ncols: int, **words: Any) -> None:
    """One legend under the axes, where it can hide no point; an entry that several panels share stands there once."""
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=ncols, fontsize=8, **words)


def distinct(values: pd.Series) -> list[Any]:
    """The values in the order in which they first occur."""
    return list(dict.fromkeys(values))


def contrast(table: pd.DataFrame) -> str:
    """The treatment or the difference of two that a whole table is of, as in prose."""
    return str(table["of"].iloc[0]).replace("-", " − ") if "of" in table else ""


def interval_lengths(table: pd.DataFrame) -> np.ndarray:
    """From the estimate to both limits; 0 where a skewed interval lies beside its estimate."""
    return np.stack([table["estimate"] - table["low"], table["high"] - table["estimate"]]).clip(min=0)


def mark(k: int) -> dict[str, Any]:
    """The k-th colour and marker, for `errorbar` without a line."""
    return {"color": OKABE_ITO[k % 8], "marker": MARKERS[k % 8], "ls": "none", "capsize": 2}


def write_cell(ax: Axes, x: float, y: float, text: str, shade: float, size: int = 7, **looks: Any) -> None:
    """A number in a cell of a map, white where the cell's colour is dark: `shade` is a share of the darkest."""
    looks = {"ha": "center", "va": "center", "fontsize": size, "color": "white" if shade > 0.6 else "black", **looks}
    ax.text(x, y, text, **looks)


def not_defined(why: NotDefined) -> Figure:
    """An empty frame with the sentence that says why there is no result to draw."""
    figure, ((ax,),) = new_figure(height=1.6)
    ax.set_axis_off()
    ax.text(0.5, 0.5, textwrap.fill(str(why), 80), ha="center", va="center", style="italic")
    return figure


def points(axes: Axes, x: np.ndarray, table: pd.DataFrame, k: int, label: str, *, line: bool = True) -> None:
    """Estimates with intervals in the k-th colour and marker."""
    looks = mark(k) | {"ms": 4, "lw": 1.2, "ls": "-" if line else "none", "label": label}
    axes.errorbar(x, table["estimate"], yerr=interval_lengths(table), **looks)


def layer_axis(axes: Axes, n_layers: int) -> None:
    """Layers as whole numbers, every one of a few and every fifth or so of many, and a line at 0."""
    axes.set_xticks(range(0, n_layers, 1 if n_layers <= 12 else -(-n_layers // 6)))
    axes.set_xlabel("layer")
    axes.axhline(0, color="black", lw=0.8)


def cumulative(table: pd.DataFrame) -> Figure:
    """Share of TE carried by the last-token residual stream after each layer, one panel a model, one line a treatment.

    The untrained twin is dashed, its band may leave the axis; layers where nothing can have arrived are hatched.
    """
    names, n_layers = distinct(table.model), int(table.layer.max()) + 1
    limits = table.loc[table.line != "untrained twin", ["low", "high"]].to_numpy()
    limits = limits[np.isfinite(limits)]
    figure, axes = new_figure(1, len(names), sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        own = table[table.model == name]
        for k, (line, part) in enumerate(own.groupby("line", sort=False)):
            if line == "untrained twin":
                ax.plot(part.layer, part.estimate, "--", color="#777777", lw=1, label=line)
                ax.fill_between(part.layer, part.low, part.high, color="#777777", alpha=0.12, lw=0)
            else:
                points(ax, part.layer.to_numpy() + 0.06 * k, part, k, str(line))
        earliest = float(own.earliest.iloc[0])
        if earliest > 0:
            ax.axvspan(-0.5, earliest - 0.5, facecolor="none", edgecolor="#999999", hatch="///", lw=0, alpha=0.6)
            where = {"transform": ax.get_xaxis_transform(), "va": "bottom", "color": "#444444"}
            ax.text(-0.4, 0.04, "cannot have\narrived yet", **where)
        ax.axhline(1, color="black", lw=0.8, ls=":")
        layer_axis(ax, n_layers)
        ax.set(title=name, ylim=(min([0.0, *limits]) - 0.1, max([1.0, *limits]) + 0.1))
    axes[0, 0].set_ylabel(TOTAL)
    axes[0, -1].legend(loc="lower right")
    heading(figure, "After which layers does the last token hold the effect? (in any network: all at the end)")
    return figure


def by_layer(table: pd.DataFrame, *, group: str, title: str, unit: str, late: bool = True) -> Figure:
    """Estimates by layer, one line for each value of `group`; layers that the claims call late are shaded, if `late`."""
    figure, ((ax,),) = new_figure()
    n_layers, n_lines = int(table.layer.max()) + 1, table[group].nunique()
    for k, (name, part) in enumerate(table.groupby(group, sort=False)):
        points(ax, part.layer.to_numpy() + 0.08 * (k - (n_lines - 1) / 2), part, k, NAMES.get(name, name))
    layer_axis(ax, n_layers)
    is_late = depth(np.arange(n_layers), n_layers) > LATE
    for first in np.flatnonzero(is_late & late)[:1]:  # one layer alone is not late
        ax.axvspan(first - 0.5, n_layers - 0.5, color="#999999", alpha=0.15, lw=0, label="late layers")
    ax.set(ylabel=unit, title=title)
    ax.legend()
    return figure


def dots(
    table: pd.DataFrame, *, row: str, group: str, title: str, unit: str, marks: Sequence[float] = (),
    limits: tuple[float, float] | None = None, below: bool = False,
) -> Figure:  # fmt: skip
    """Estimates with intervals, one row for each value of `row`; vertical lines at `marks`.

    `limits` cut the axis; `below` puts the legend under it, where no corner of the frame is free.
    """
    rows, groups = (distinct(table[name]) for name in (row, group))
    height = 0.9 + len(rows) * (0.14 + 0.045 * len(groups)) + 0.4 * below
    figure, ((ax,),) = new_figure(width=7.0, height=height)
    draw_dots(ax, table, row, group, rows, groups)
    for mark in marks:
        ax.axvline(mark, color="black", lw=0.9, ls="--")
    ax.set(xlabel=unit, title=title)
    if limits:
        ax.set_xlim(*limits)
    if below:
        legend_below(figure, [ax], 2 if len(groups) < 5 else 5)
    else:
        ax.legend(fontsize=8)
    return figure


def draw_dots(ax: Axes, table: pd.DataFrame, row: str, group: str, rows: Sequence[str], groups: Sequence[str]) -> None:
    """Estimates with intervals, a row of the axis for each of `rows`, a colour and symbol for each of `groups`."""
    here = {value: [name for name in groups if name in set(part[group])] for value, part in table.groupby(row)}
    for k, name in enumerate(groups):
        part = table[table[group] == name]
        places = [here[value].index(name) - (len(here[value]) - 1) / 2 for value in part[row]]
        y = np.array([rows.index(value) for value in part[row]]) + 0.6 * np.array(places) / max(1, len(groups))
        label = NAMES.get(str(name), str(name))
        ax.errorbar(part["estimate"], y, xerr=interval_lengths(part), ms=4, label=label, **mark(k))
    ax.set_yticks(range(len(rows)), [NAMES.get(str(r), str(r)) for r in rows])
    ax.invert_yaxis()


ANSWERS: dict[str, tuple[str, dict[str, str]]] = {  # the word in a cell, and the cell's look
    "supported": ("yes", {"fc": "#8FD3BC"}), "contradicted": ("no", {"fc": "#F2B38C"}), "inconclusive": ("?", {"fc": "#EEEEEE"}),
    "cannot tell": ("", {"fc": "#FFFFFF", "hatch": "////"}),
}  # fmt: skip


def answers(table: pd.DataFrame) -> Figure:
    """Claims by models: what is answered, in colour and word, and the number; hatched where the rule cannot tell.

    One model has room for the number's unit in words, several have not.
    """
    models, claims = distinct(table.model), sorted(distinct(table.claim))
    names, n = dict(zip(table.claim, table.name, strict=True)), len(models)
    figure, ((ax,),) = new_figure(width=max(6.4, 2.0 + 0.95 * n), height=1.3 + (0.26 if n == 1 else 0.36) * len(claims))
    for row in table[table.answer.isin(list(ANSWERS))].fillna("").itertuples():
        x, y = models.index(str(row.model)), claims.index(str(row.claim))
        word, look = ANSWERS[str(row.answer)]
        text = f"{word}   {row.number or 'no number'}" if n == 1 else f"{word} {_short(str(row.number))}"
        box = {"fc": "white", "ec": "none", "pad": 1.0} if not word else None
        ax.add_patch(plt.Rectangle((x - 0.48, y - 0.45), 0.96, 0.9, ec="#999999", lw=0.6, **look))
        ax.text(x, y, text.strip(), ha="center", va="center", fontsize=8, bbox=box)
    for name, (word, look) in ANSWERS.items():
        label = f"{word}: {name}" if word else name
        ax.add_patch(plt.Rectangle((0, 0), 0, 0, ec="#999999", lw=0.6, label=label, **look))
    ax.set(xlim=(-0.5, n - 0.5), ylim=(len(claims) - 0.4, -0.6))
    ax.set_xticks(range(n), models, fontsize=8)
    ax.set_yticks(range(len(claims)), [f"{c}  {names[c]}" for c in claims], fontsize=8)
    ax.grid(False)
    heading(figure, "What holds, what does not, and what the rules cannot tell (blank: not measured)")
    legend_below(figure, [ax], len(ANSWERS))
    return figure


def _short(number: str) -> str:
    """A number, the first word of its unit, and below it its interval."""
    value, _, rest = number.partition(" [")
    ends, _, unit = rest.partition("] ")
    words = {"%": " %", "points": " pts", "neurons": " neur."}
    return f"{value}{words.get(unit.partition(' ')[0], '')}\n[{ends}]" if ends else value
