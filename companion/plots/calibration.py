"""Figures of notebook 07: a built model beside what is measured of it, error rates, and plants in a real model."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from companion.base.thresholds import LATE, depth
from companion.plots import style
from companion.plots.style import ESTIMATE, NAMES, distinct, heading, spec

# What each rate is held against, with the sign that the figure has for it.
TARGETS = {"false supported": (0.05, "● ≤"), "false contradicted": (0.2, "■ ≤"), "power to support": (0.8, "▲ ≥")}


def _frame(ax: Axes, x: float, y: float, width: int = 1) -> None:
    """A thick frame around one cell of a map, or several side by side."""
    ax.add_patch(Rectangle((x - 0.47, y - 0.45), width - 0.06, 0.9, fill=False, ec="black", lw=1.8))


def built(table: pd.DataFrame) -> Figure:
    """Layers by sites, one panel a model: the written role as words, the measured share as shade; what decides is framed."""
    models, sites, n_layers = distinct(table.model), distinct(table.site), int(table.layer.max()) + 1
    figure, axes = style.new_figure(1, len(models), 4.0 * len(models), 1.0 + 0.44 * n_layers, sharey=True)
    for ax, model in zip(axes[0], models, strict=True):
        part = table[table.model == model].fillna({"role": ""})
        grid = part.pivot_table(index="layer", columns="site", values="share", aggfunc="first")
        grid = grid.reindex(index=range(n_layers), columns=sites)
        image = ax.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for row in part.itertuples():
            x, y = sites.index(row.site), int(row.layer)
            style.write_cell(ax, x - 0.44, y, textwrap.fill(str(row.role), 20), row.share, 8, ha="left")
            style.write_cell(ax, x + 0.44, y, f"{abs(row.share):.2f}", row.share, 8, ha="right")
            if "decides" in str(row.role):
                _frame(ax, x, y)
        for edge in np.flatnonzero(depth(np.arange(n_layers), n_layers) > LATE)[:1] - 0.5:
            ax.axhline(edge, color="black", lw=0.9, ls="--")
            ax.text(-0.47, edge - 0.04, "late layers above this line", va="top", fontsize=7, style="italic")
        ax.set_xticks(range(len(sites)), [NAMES.get(site, site) for site in sites])
        ax.set_yticks(range(n_layers))
        ax.grid(False)
        ax.set_title(model)
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0].tolist(), label="measured share of total effect", shrink=0.8)
    heading(figure, "Does the effect at the last token lie where the decision is made (framed)?")
    return figure


def errors(table: pd.DataFrame, **options: Any) -> Figure:
    """Rates of every claim's rule in one row; above each line what is held against it."""
    figure = style.dots(table, row="claim", group="error", **options)
    (ax,) = figure.axes
    ax.set_title(options["title"], pad=17)
    for at, sign in TARGETS.values():
        ax.text(at, 1.01, f"{sign} {at:g}", ha="center", va="bottom", fontsize=8, transform=ax.get_xaxis_transform())
    built = set(table.claim[table.error == "false supported"])
    for y, claim in reversed(list(enumerate(distinct(table.claim)))):
        if claim not in built:
            ax.text(1, y, "● none built", ha="right", va="center", fontsize=8)
    return figure


def threshold(table: pd.DataFrame) -> Figure:
    """One panel a claim: how often "supported" was said (points with intervals) by the true value; dashed at the threshold."""
    claims = distinct(table.claim)
    n_columns = min(4, len(claims))
    n_rows = -(-len(claims) // n_columns)
    figure, axes = style.new_figure(n_rows, n_columns, 1.9 * n_columns + 0.6, 1.8 * n_rows + 0.5, sharey=True)
    for ax, claim in zip(axes.flat, claims, strict=False):
        part = table[table.claim == claim].sort_values("value")
        at = float(part.threshold.iloc[0])
        style.points(ax, part.value.to_numpy(), part, 0, "draws", line=False)
        ax.axvline(at, color="black", lw=0.9, ls="--")
        ax.axhline(0.05, color="black", lw=0.6, ls=":")
        ax.set_ylim(-0.05, 1.05)
        ax.text(1.01, 0.05, "0.05", transform=ax.get_yaxis_transform(), va="center", fontsize=7)
        ax.set_title(f"{claim}\nn = {part.n.min()} to {part.n.max()} a dot", fontsize=8)
    for ax in axes.flat[len(claims) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, len(claims) - n_columns) : len(claims)]:
        ax.set_xlabel("true value")
    for ax in axes[:, 0]:
        ax.set_ylabel("share supported")
    heading(figure, "What does a rule say when the true value lies near its threshold (dashed)?")
    return figure


def plants(table: pd.DataFrame) -> Figure:
    """Trained parts by places, one panel an effect: shares as colours, the larger ones in percent; trained places framed.

    The last two columns are sums over the framed places: here, and in the model in which everything was trained (the first row).
    """
    kinds, effects, places = (distinct(table[name]) for name in ("kind", "effect", "place"))
    figure, axes = style.new_figure(1, len(effects), 4.1 * len(effects) + 1.2, 1.2 + 0.32 * len(kinds), sharey=True)
    names = [str(place).replace(", ", ",\n").replace("attn ", "").replace("mlp ", "") for place in places]
    for k, place in enumerate(places):  # each site is named once, under the middle of its layers
        names[k] += {"attn middle": "\nattention", "mlp middle": "\nMLP"}.get(place, "")
    names = [*names[:-1], "framed\nsum", "same\ncells,\nrow 1"]
    for ax, effect in zip(axes[0], effects, strict=True):
        part = table[table.effect == effect]
        wide = part.pivot(index="kind", columns="place").loc[kinds]
        learned = wide.learned[places[:-1]].to_numpy(bool)
        grid = np.c_[wide.estimate[places], wide.in_refuser[places[-1]]]
        image = ax.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (y, x), share in np.ndenumerate(grid):
            if x >= len(places) - 1 or abs(share) >= style.SHOWN:  # of sums also a small one
                style.write_cell(ax, x, y, str(round(100 * share)), abs(share), 8)
        for y, row in enumerate(learned):
            ends = np.flatnonzero(np.diff(np.r_[False, row, False]))  # where runs of trained places begin and end
            for first, behind in ends.reshape(-1, 2):
                _frame(ax, first, y, behind - first)
        ax.axvline(len(places) - 1.5, color="white", lw=5, zorder=0.5)  # below the frames
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set_yticks(range(len(kinds)), kinds)
        ax.grid(False)
        ax.set_title(effect)
    axes[0, 0].set_ylabel("trained part")
    figure.colorbar(image, ax=axes[0].tolist(), label="share of what training added", format=PercentFormatter(1.0))
    heading(figure, "T1, last token: does the effect lie where the model was trained (framed)? Blank: below 5 %")
    return figure


COUNTS = {"hits": "int", "n": "int", **ESTIMATE}
# fmt: off
SPECS = (
    spec("07_built", built, "all", {**dict.fromkeys(("model", "site", "role"), "str"), "layer": "int", "share": "float"},
         "Two built models as layers by attention and MLP, the role of each part in words and its measured share of the "
         "effect as a number; in the second the effect lies in a late copy, three layers above the decision"),
    spec("07_errors", errors, "all", {**dict.fromkeys(("claim", "error"), "str"), **COUNTS},
         "False support, false contradiction and power of the rules of eleven claims, a row a claim, with Wilson intervals "
         "and lines at 0.05, 0.2 and 0.8: most errors lie at 0, and power lies anywhere from 0 to 1",
         title="How often does a rule err, and how often does it see what is true?", limits=(-0.02, 1.02), below=True,
         unit="share of built models, with Wilson interval", marks=[at for at, _ in TARGETS.values()]),
    spec("07_threshold", threshold, "all",
         {"claim": "str", **dict.fromkeys(("value", "threshold"), "float"), **COUNTS},
         "Share of built models in which a rule says supported against the value that is true of them, a panel a claim, with "
         "Wilson intervals and a dashed line at the threshold"),
    spec("07_plants", plants, "all",
         {**dict.fromkeys(("kind", "effect", "place"), "str"), "learned": "bool", **ESTIMATE, "in_refuser": "float"},
         "Parts of a real model that were trained by places where the trained effect is found, left what passes through, "
         "right what is written; frames mark the trained part, and late places are strong also where only early ones learned"),
)
# fmt: on
