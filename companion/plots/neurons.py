"""Figures of notebook 04: single neurons, growing sets, adjacency, and the tests of gating."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import MaxNLocator

from companion.plots import style
from companion.plots.style import ESTIMATE, MARKERS, OKABE_ITO, distinct, heading, legend_below, new_figure, spec

ARROWS = {
    "neuron's write": "#D55E00",
    "read-out direction": "#009E73",
    "residual stream": "#0072B2",
    "after the write": "#000000",
}


def geometry(table: pd.DataFrame) -> Figure:
    """One neuron's write in the plane that it spans with the residual stream, the norm's sphere, and the read-out."""
    figure, axes = new_figure(width=7.0, height=3.6)
    ax = axes[0, 0]
    for row in table.itertuples():
        item = str(row.item)
        if item == "sphere":
            ax.add_patch(plt.Circle((row.x, row.y), row.to_x, fill=False, ec="#999999", ls="--", lw=1))
        elif item.startswith("normed"):
            k = 0 if item.endswith("control") else 6
            ax.plot([row.x], [row.y], MARKERS[k % 8], color=OKABE_ITO[k], ms=7, label=f"{item}: what is read out")
        else:
            colour = ARROWS.get(item, "#666666")
            arrow = {"arrowstyle": "->", "color": colour, "lw": 1.8}
            ax.annotate("", (row.to_x, row.to_y), (row.x, row.y), arrowprops=arrow)
            ax.plot([row.x, row.to_x], [row.y, row.to_y], "-", color=colour, lw=1.5, label=item)
    reach = 1.3 * max(0.2, float(table[["y", "to_y"]].abs().max().max()))
    ends = min(0, table.to_x.min()) - 0.05, max(1, table.x.max(), table.to_x.max()) + reach
    ax.set_aspect("equal", adjustable="box")
    ax.set_xlim(*ends)
    ax.set_ylim(-reach, reach)
    height = np.clip(4.2 * 2 * reach / (ends[1] - ends[0]) + 0.9, 2.4, 5.0)  # no empty margins
    figure.set_size_inches(7.0, float(height))
    ax.axhline(0, color="black", lw=0.5)
    ax.set_xlabel("along the control run's residual stream (its length = 1)")
    ax.set_ylabel("across it")
    ax.set_title("A neuron moves one point; the norm pulls it back to a sphere")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def by_index(table: pd.DataFrame) -> Figure:
    """Every neuron's effect at its index, one panel a layer on one y-axis; squares pass the test and the floor."""
    layers = sorted(table.layer.unique())
    figure, axes = new_figure(len(layers), 1, 7.0, 1.5 * len(layers) + 0.8, sharey=True)
    for ax, layer in zip(axes[:, 0], layers, strict=True):
        part = table[table.layer == layer]
        for k, (name, is_in) in enumerate((("not counted", False), ("passes test and floor", True))):
            chosen = part[part.passes == is_in]
            if len(chosen):
                style.points(ax, chosen.neuron.to_numpy(), chosen, k, name, line=False)
        ax.axhline(0, color="black", lw=0.8)
        ax.set_title(f"layer {layer}")
        ax.set_ylabel(style.TOTAL)
    axes[-1, 0].set_xlabel("index of the neuron")
    legend_below(figure, axes[:, 0], ncols=2)
    heading(figure, "Which single neurons carry the effect at the last token?")
    return figure


def set_curves(table: pd.DataFrame) -> Figure:
    """Joint effect of growing sets as a share of the whole layer's, k on a logarithmic axis; the band of k90 shaded."""
    names = distinct(table.panel)
    figure, axes = new_figure(1, len(names), 4.0 * len(names), 3.7, sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        part = table[table.panel == name]
        for k, (label, line) in enumerate(part.groupby("series", sort=False)):
            colour, marker = OKABE_ITO[k % 8], MARKERS[k % 8]
            ax.plot(line.k, line.estimate, marker=marker, color=colour, ms=3, lw=1.2, label=str(label))
            ax.fill_between(line.k, line.low, line.high, color=colour, alpha=0.2, lw=0)
        ax.axhspan(0.9, 1.1, color="#999999", alpha=0.2, lw=0)
        ax.set_xscale("log")
        ax.axhline(0, color="black", lw=0.8)
        ax.set_xlabel("neurons swapped together")
        ax.set_title(name)
        # Under the axis: every corner of the frame may hold a curve.
        n_columns = 2 if part.series.nunique() < 5 else 4
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=n_columns)
    axes[0, 0].set_ylabel("share of the whole layer's effect")
    heading(figure, "How many neurons does it take? Top neurons of discover, swapped together, on test")
    bounded = table[np.isfinite(table.estimate)]
    if len(bounded):
        axes[0, 0].set_ylim(min(-0.2, bounded.estimate.min() - 0.1), min(2.2, max(1.3, bounded.estimate.max() + 0.1)))
    return figure


def sparsity(table: pd.DataFrame) -> Figure:
    """k50 and k90 with intervals, one row a behaviour, on an axis of whole numbers."""
    figure = style.dots(
        table,
        row="behaviour",
        group="quantity",
        title="Does harm need fewer neurons than any other behaviour?",
        unit="neurons until 0.5 (k50) or 0.9 (k90) of the whole layer's share is reached for good",
        below=True,
    )
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_xlim(left=0)
    return figure


def adjacency(table: pd.DataFrame) -> Figure:
    """Single neurons (stems) and windows of neighbours (line) at their index, in one panel for each order of the neurons.

    The neurons with the largest effects keep their number and marker in every panel, so that one can follow them.
    """
    names = distinct(table.order)
    figure, axes = new_figure(len(names), 1, 7.4, 2.3 * len(names) + 0.5, sharey=True)
    top = table.loc[table.order == names[0]].sort_values("single", key=abs, ascending=False).name.head(5).tolist()
    for ax, name in zip(axes[:, 0], names, strict=True):
        part = table[table.order == name].sort_values("place")
        ax.vlines(part.place, 0, part.single, color="#666666", lw=0.8, label="each neuron alone (exact)")
        label = "window of neighbours around it (joint)"
        ax.plot(part.place, part.window, "-", color=OKABE_ITO[1], lw=1.4, label=label)
        for k, one in enumerate(top):
            row = part[part.name == one]
            ax.plot(row.place, row.single, MARKERS[k % 8], color=OKABE_ITO[0], ms=6, ls="none")
            for x, y in zip(row.place, row.single, strict=True):
                ax.annotate(f"{one}", (x, y), textcoords="offset points", xytext=(5, 2), fontsize=7, color=OKABE_ITO[0])
        ax.axhline(0, color="black", lw=0.6)
        ax.set_title(str(name))
        ax.set_ylabel(style.TOTAL)
    axes[-1, 0].set_xlabel("place in this order (labels: the neuron's original index)")
    legend_below(figure, axes[:1, 0], ncols=2)
    heading(figure, "Same function, other order: single neurons only move, windows are redrawn")
    return figure


def permutations(table: pd.DataFrame) -> Figure:
    """Moran's I under permuted indices as a histogram, the model's own with its interval, and the claim's threshold."""
    figure, axes = new_figure(width=6.0, height=2.9)
    ax, own = axes[0, 0], table.iloc[0]
    width, look = table.end - table.start, {"color": OKABE_ITO[5], "ec": "white", "lw": 0.3}
    ax.bar(table.start, table["count"], width, align="edge", **look, label="permuted indices")
    height = 0.5 * float(table["count"].max())
    ends = np.clip([own.observed - own.least, own.most - own.observed], 0, None)[:, None]
    look = {"fmt": "D", "color": OKABE_ITO[1], "ms": 5, "capsize": 3}
    ax.errorbar([own.observed], [height], xerr=ends, **look, label="this model, with interval")
    ax.axvline(0.05, color="black", lw=0.9, ls="--", label="threshold of C7")
    ax.set_xlabel("Moran's I of rank |effect|")
    ax.set_ylabel("permutations")
    ax.set_title("Are neighbours more alike than chance?")
    legend_below(figure, [ax], ncols=3)
    return figure


COLOURS = {"grey": "#F0F0F0", "orange": "#F0C27B", "blue": "#B7E0F2"}


def gate_drawing(table: pd.DataFrame) -> Figure:
    """Boxes and arrows, one panel a case; columns: panel, kind, x, y, to_x, to_y, text, colour."""
    panels = distinct(table.panel)
    figure, axes = new_figure(1, len(panels), 4.6 * len(panels), 2.3)
    for ax, panel in zip(axes[0], panels, strict=True):
        ax.axis("off")
        part = table[table.panel == panel]
        for row in part[part.kind == "arrow"].itertuples():
            ends = (row.x, row.y), (row.to_x, row.to_y)
            look = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 16, "color": "black"}
            ax.add_patch(FancyArrowPatch(*ends, **look))
        for row in part[part.kind == "box"].itertuples():
            box = {"boxstyle": "round,pad=0.35", "fc": COLOURS.get(str(row.colour), "#FFFFFF"), "ec": "black"}
            ax.text(row.x, row.y, row.text, ha="center", va="center", fontsize=9, bbox=box)
        ax.set_xlim(part.x.min() - 0.6, part.x.max() + 0.6)
        ax.set_ylim(part.y.min() - 0.5, part.y.max() + 0.5)
        ax.set_title(panel, fontsize=10)
    heading(figure, "Where can one signal decide about another?")
    return figure


def indices(table: pd.DataFrame) -> Figure:
    """Signed gate index by form (rows) and outcome; dashed lines: 0, and the thresholds of contributor and gate."""
    rows, groups = distinct(table.form), distinct(table.outcome)
    figure, axes = new_figure(width=8.4, height=1.3 + 0.27 * len(rows))
    ax = axes[0, 0]
    for k, name in enumerate(groups):
        part = table[table.outcome == name]
        y = [rows.index(form) + 0.22 * (k - (len(groups) - 1) / 2) for form in part.form]
        ax.errorbar(part.estimate, y, xerr=style.interval_lengths(part), ms=4, label=str(name), **style.mark(k))
    for at, dashes in ((0.0, "-"), (-0.2, ":"), (0.2, ":"), (-0.6, "--"), (0.6, "--")):
        ax.axvline(at, color="black", lw=0.8, ls=dashes)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    ax.set_xlabel("signed gate index (interaction as a share of the whole effect)")
    heading(figure, "Gate or contributor: only together (1), added (0), either one (-1)?")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


# fmt: off
SPECS = (
    spec("04_geometry", geometry, "C5a", {"item": "str", **dict.fromkeys(("x", "y", "to_x", "to_y"), "float")},
         "One last-layer neuron's write added to the residual stream, both pulled back to a sphere by the final norm, "
         "and the read-out direction, in the plane of residual stream and write"),
    spec("04_neurons", by_index, "C5a", {"layer": "int", "neuron": "int", "passes": "bool", **ESTIMATE},
         "Exact indirect effect of every single neuron at the last token by layer and index, with intervals"),
    spec("04_curves", set_curves, "C5a", {"panel": "str", "series": "str", "k": "int", **ESTIMATE},
         "Joint effect of the top k last-layer neurons as a share of the whole layer's, against random order and "
         "benign behaviours"),
    spec("04_sparsity", sparsity, "C5a", {"behaviour": "str", "quantity": "str", **ESTIMATE},
         "k50 and k90 of the last layer for harm and for each benign behaviour"),
    spec("04_adjacency", adjacency, "C7",
         {"order": "str", "place": "int", "name": "int", "single": "float", "window": "float"},
         "Effects of single last-layer neurons and of windows of neighbours, in training order and after a permutation "
         "of the neurons that leaves the model's function as it was"),
    spec("04_moran", permutations, "C7", dict.fromkeys(("start", "end", "count", "observed", "least", "most"), "float"),
         "Moran's I of rank |effect| along the neuron index, against its values under permuted indices"),
    spec("04_gate_drawing", gate_drawing, "C5b",
         {**dict.fromkeys(("panel", "kind", "text", "colour"), "str"), **dict.fromkeys(("x", "y", "to_x", "to_y"), "float")},
         "Last-layer neurons only add to the residual stream; inside one neuron the gate multiplies the up-projection"),
    spec("04_gate_forms", indices, "C5b", {"form": "str", "outcome": "str", **ESTIMATE},
         "Signed gate index of every form that is defined, for the harm contrast and for benign behaviours, by "
         "read-out"),
)
# fmt: on
