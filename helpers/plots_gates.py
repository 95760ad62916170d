"""Figures of gates: where a network can multiply, and the forms of the gate index."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from helpers.plots import MARKERS, OKABE_ITO, _figure, _lengths

COLOURS = {"grey": "#F0F0F0", "orange": "#F0C27B", "blue": "#B7E0F2"}


def drawing(table: pd.DataFrame) -> Figure:
    """Boxes and arrows, one panel a case; columns: panel, kind, x, y, to_x, to_y, text, colour."""
    panels = list(dict.fromkeys(table.panel))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 2.3), squeeze=False)
    plt.close(figure)
    for ax, panel in zip(axes[0], panels, strict=True):
        ax.axis("off")
        part = table[table.panel == panel]
        for row in part[part.kind == "arrow"].itertuples():
            ends = (row.x, row.y), (row.to_x, row.to_y)
            ax.add_patch(
                FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=16, color="black")
            )
        for row in part[part.kind == "box"].itertuples():
            style = {"boxstyle": "round,pad=0.35", "fc": COLOURS.get(str(row.colour), "#FFFFFF"), "ec": "black"}
            ax.text(row.x, row.y, row.text, ha="center", va="center", fontsize=9, bbox=style)
        ax.set_xlim(part.x.min() - 0.6, part.x.max() + 0.6)
        ax.set_ylim(part.y.min() - 0.5, part.y.max() + 0.5)
        ax.set_title(panel, fontsize=10)
    figure.suptitle("Where can one signal decide about another?", fontsize=10, fontweight="bold", x=0.01, ha="left")
    return figure


def indices(table: pd.DataFrame) -> Figure:
    """Signed gate index by form (rows) and outcome; dashed lines: 0, and the thresholds of contributor and gate."""
    rows, groups = list(dict.fromkeys(table.form)), list(dict.fromkeys(table.outcome))
    figure, axes = _figure(width=8.4, height=1.3 + 0.27 * len(rows))
    ax = axes[0, 0]
    for k, name in enumerate(groups):
        part = table[table.outcome == name]
        y = [rows.index(form) + 0.22 * (k - (len(groups) - 1) / 2) for form in part.form]
        ax.errorbar(
            part.estimate, y, xerr=_lengths(part), color=OKABE_ITO[k % 8], marker=MARKERS[k % 8], ms=4, ls="none", capsize=2,
            label=str(name),
        )  # fmt: skip
    for mark, style in ((0.0, "-"), (-0.2, ":"), (0.2, ":"), (-0.6, "--"), (0.6, "--")):
        ax.axvline(mark, color="black", lw=0.8, ls=style)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    ax.set_xlabel("signed gate index (interaction as a share of the whole effect)")
    title = "Gate or contributor: only together (1), added (0), either one (-1)?"
    figure.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
