"""Figures of notebooks 00 to 02 and 08: a pair of prompts, what it shows, and layers."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from companion.plots import style
from companion.plots.style import BY_LAYER, ESTIMATE, NAMES, distinct, spec

GROUP_COLOURS = {
    "system": "#EEEEEE", "header": "#DDDDDD", "wrapper": "#F0C27B", "distractor": "#B7E0F2", "verb": "#E8A27C",
    "object": "#8FCFB4", "rest": "#F7F7F7", "last_instruction": "#C9B6E4", "template": "#DDDDDD", "last": "#F4E27A",
}  # fmt: skip
MAP = (
    "A map of layers by attention and MLP outputs at the last token of one pair, each cell with its share of the total "
    "effect in per cent, red with and blue against the treatment"
)
PANELS = {
    "T1": "T1, a harmful request in place of its harmless twin", "T2": "T2, a jailbreak wrapper around a harmful request",
    "T2b": "T2b, the same wrapper around the harmless twin", "T2-T2b": "T2 − T2b, what the wrapper does to harm alone",
    "indirect": "passes through it: patch the output, let everything above react",
    "direct": "it writes itself: swap its write in the final sum, nothing reacts",
}  # fmt: skip
CENTROID_MARGIN = 0.05  # by which harm must be later for C1


def pair_tokens(table: pd.DataFrame) -> Figure:
    """Both prompts of one pair, token under token; columns: position, group, control, treated, differ.

    What stands before the user's turn is the same in all prompts, and one box.
    """
    before = (table.group.isin(["system", "header"]) & ~table.differ).cummin()
    own = table[~before].reset_index(drop=True)
    figure, ((axes,),) = style.new_figure(width=max(6.0, 0.28 * len(own) + 1.9), height=2.6)
    axes.axis("off")
    if n := int(before.sum()):
        axes.add_patch(Rectangle((-2.4, 0), 2.3, 1.9, fc=GROUP_COLOURS["system"], ec="#BBBBBB", lw=0.6))
        axes.text(-1.25, 0.95, f"{n} tokens,\nthe same\nin all\nprompts", ha="center", va="center", fontsize=8)
    for row in own.itertuples():
        colour, at = GROUP_COLOURS.get(str(row.group), "#FFFFFF"), int(row.Index)
        for y, text in ((1, row.control), (0, row.treated)):
            edge = "#D55E00" if row.differ else "#BBBBBB"
            axes.add_patch(Rectangle((at, y), 1, 0.9, fc=colour, ec=edge, lw=2 if row.differ else 0.6))
            axes.text(at + 0.5, y + 0.45, text, ha="center", va="center", fontsize=8, rotation=90)
    runs = (own.group != own.group.shift()).cumsum()
    spans = own.reset_index().groupby(runs)
    spans = spans.agg(group=("group", "first"), size=("group", "size"), middle=("index", "mean"))
    for run in spans.sort_values("size", kind="stable").drop_duplicates("group", keep="last").itertuples():
        name = str(run.group).replace("_", " ")
        axes.text(run.middle + 0.5, -0.1, name, ha="right", va="top", fontsize=8, rotation=35)
    for y, name in ((1, "control"), (0, "treated")):
        axes.text(-2.6, y + 0.45, name, ha="right", va="center", fontweight="bold", fontsize=8)
    axes.set_xlim(-5.2, len(own) + 0.1)
    axes.set_ylim(-0.9, 2)
    axes.set_title("Which tokens differ? The outlined ones, and no others")
    return figure


def component_map(table: pd.DataFrame) -> Figure:
    """Layers by attention and MLP outputs of one pair, in per cent of its total effect; columns: layer, site, share."""
    grid = 100 * table.pivot(index="site", columns="layer", values="share").sort_index()  # attention above MLP
    figure, axes = style.new_figure(width=max(5.2, 0.25 * grid.shape[1] + 1.2), height=1.7)
    ax, bound = axes[0, 0], float(grid.abs().max(axis=None)) or 1.0
    ax.imshow(grid, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    for (y, x), value in np.ndenumerate(grid.to_numpy()):
        text = f"{value:.0f}".replace("-0", "0").replace("-", "\N{MINUS SIGN}")
        style.write_cell(ax, x, y, text, abs(value) / bound, 8)
    ax.set_xticks(range(grid.shape[1]), grid.columns, fontsize=8)
    ax.set_yticks(range(len(grid)), [style.NAMES[site] for site in grid.index])
    ax.set_xlabel("layer")
    ax.set_title("Which component carries this pair's effect? (% of TE)")
    ax.grid(False)
    return figure


def layer_map(table: pd.DataFrame, *, panel: str, title: str) -> Figure:
    """Attention and MLP (rows) by layer, one map for each value of `panel`, on one scale; numbers are percent of TE.

    A bold number has an interval that excludes 0; what rounds to 0 has none.
    """
    names, bound = distinct(table[panel]), float(table.estimate.abs().max()) or 1.0
    figure, axes = style.new_figure(len(names), 1, 7.4, 0.9 + 0.72 * len(names), sharex=True)
    for ax, name in zip(axes[:, 0], names, strict=True):
        part = table[table[panel] == name]
        cells = part.pivot(index="site", columns="layer", values="estimate")
        image = ax.imshow(cells, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
        for one in part[(100 * part.estimate).round() != 0].itertuples():
            at = cells.columns.get_loc(one.layer), cells.index.get_loc(one.site)
            weight = "bold" if one.low > 0 or one.high < 0 else "normal"
            style.write_cell(ax, *at, f"{100 * one.estimate:.0f}", abs(one.estimate) / bound, fontweight=weight)
        ax.set_yticks(range(len(cells)), [NAMES.get(str(site), str(site)) for site in cells.index])
        ax.set_title(PANELS.get(str(name), str(name)), fontsize=9, fontweight="normal")
        ax.grid(False)
    axes[-1, 0].set_xticks(range(cells.shape[1]), cells.columns, fontsize=7)
    axes[-1, 0].set_xlabel("layer")
    figure.colorbar(image, ax=axes[:, 0], label=style.TOTAL, pad=0.01)
    style.heading(figure, title)
    return figure


def centroids(table: pd.DataFrame) -> Figure:
    """Depth of harm and of each benign behaviour, and beside it their difference; columns: quantity, contrast, estimate."""
    figure, axes = style.new_figure(1, 2, 7.2, 2.9, width_ratios=[3, 2])
    difference, own = (table[(table.contrast == "difference") == chosen] for chosen in (True, False))
    contrasts = [("harm", "benign"), ("difference",)]
    for ax, part, groups in zip(axes[0], (own, difference), contrasts, strict=True):
        style.draw_dots(ax, part, "quantity", "contrast", distinct(part.quantity), groups)
    benign = own[own.contrast == "benign"].estimate.mean()
    axes[0, 0].axvline(benign, color="black", lw=0.9, ls="--", label="mean of benign")
    axes[0, 0].set_xlabel("mean depth, as share of all layers")
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].axvline(0, color="black", lw=0.8)
    axes[0, 1].axvline(CENTROID_MARGIN, color="black", lw=0.9, ls="--")
    axes[0, 1].set_ylim(1.6, -0.6)
    axes[0, 1].set_xlabel("harm − benign (depth, share)\ndashed: asked by C1")
    style.heading(figure, "Is harm decided later than other choices?")
    return figure


def read_and_carried(table: pd.DataFrame) -> Figure:
    """By layer, what a probe reads and what is carried on; columns: what, layer, estimate, low, high."""
    figure = style.by_layer(
        table, group="what", title="What early layers know is not yet what decides", unit="AUROC or share"
    )
    ax = figure.axes[0]
    n_layers = int(table.layer.max()) + 1
    ax.axvspan(-0.5, n_layers / 3 - 0.5, facecolor="none", edgecolor="#BBBBBB", hatch="///", lw=0, label="early layers")
    ax.get_legend().remove()
    style.legend_below(figure, [ax], 3)
    return figure


# fmt: off
SPECS = (
    spec("00_map", component_map, "all", {"layer": "int", "site": "str", "share": "float"}, MAP),
    spec("00_own", component_map, "all", {"layer": "int", "site": "str", "share": "float"},
         MAP.replace("one pair", "the reader's own pair")),
    spec("01_tokens", pair_tokens, "all",
         {"position": "int", **dict.fromkeys(("group", "control", "treated"), "str"), "differ": "bool"},
         "Control and treated prompt of one pair, token under token, coloured by position group from system turn to "
         "last token; only outlined tokens differ, all others are the same in both prompts"),
    spec("01_refusals", style.dots, "all", {"prompt": "str", "request": "str", **ESTIMATE},
         "Mean probability that the answer opens with a refusal, with intervals over topics: harmful and harmless requests "
         "without a wrapper, in a neutral and in a jailbreak wrapper",
         row="prompt", group="request", title="Which prompts does the model refuse?",
         unit="mean P(first token opens a refusal)", limits=(-0.02, 1.02)),
    spec("01_total_effects", style.dots, "all", {"treatment": "str", "split": "str", **ESTIMATE},
         "Total effect of every treatment in log-odds with intervals, discover, validate and test side by side; dashed "
         "lines mark the precondition, 0.5 to either side of 0",
         row="treatment", group="split", title="Which treatments move the answer by 0.5 log-odds or more?",
         unit="total effect (log-odds of complying)",
         marks=(-0.5, 0.5)),
    spec("02_cumulative", style.cumulative, "C1", {"model": "str", "line": "str", "earliest": "float", **BY_LAYER},
         "Share of the total effect in the last-token residual stream after each layer, one panel a model, one line a "
         "treatment and a dashed one for the untrained twin: all end at 1, and where each rises is compared"),
    spec("02_treatments", layer_map, "C1", {"treatment": "str", "site": "str", **BY_LAYER},
         "Share of the total effect that passes through attention and MLP outputs by layer, a map for recognition (T1), "
         "generation (T2), the wrapper on a harmless request (T2b) and the contrast T2 - T2b; numbers are percent",
         panel="treatment", title="Through which layers does the effect pass? (percent of the total effect)"),
    spec("02_benign", centroids, "C1", {"quantity": "str", "contrast": "str", **ESTIMATE},
         "Effect-weighted mean depth of harm and of each benign behaviour as dots with intervals, and beside them harm "
         "minus benign with an interval over topics and a wider one that resamples behaviours, too"),
    spec("02_computed", layer_map, "C1", {"panel": "str", "site": "str", **BY_LAYER},
         "Attention and MLP outputs by layer, above what passes through them, below what they compute from wrapper and "
         "request together, both as percent of the total effect",
         panel="panel", title="What only passes through, and what is computed? (percent of the total effect)"),
    spec("02_early", read_and_carried, "C3", {"what": "str", **BY_LAYER},
         "By layer, how well a probe on shared tokens tells harmful from harmless requests, the same for the words "
         "alone, and the share of the total effect that these tokens carry, with early layers hatched"),
    spec("08_claims", style.answers, "all", dict.fromkeys(("model", "claim", "name", "answer", "number", "grade"), "str"),
         "Answers, a row for each model and a column for each claim: the number that decides, and by colour and sign "
         "supported, contradicted or inconclusive; hatched where the rule cannot tell"),
)
# fmt: on
