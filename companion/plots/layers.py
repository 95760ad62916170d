"""Figures of notebooks 00 to 03, 05 and 08: a pair of prompts, layers, modules, heads, tokens, and the answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from companion.plots import style
from companion.plots.style import BY_LAYER, ESTIMATE, LOG_ODDS, NAMES, TOTAL, distinct, spec

GROUP_COLOURS = {
    "system": "#EEEEEE", "header": "#DDDDDD", "wrapper": "#F0C27B", "distractor": "#B7E0F2", "verb": "#E8A27C",
    "object": "#8FCFB4", "rest": "#F7F7F7", "last_instruction": "#C9B6E4", "template": "#DDDDDD", "last": "#F4E27A",
}  # fmt: skip
PANELS = {
    "T1": "T1, a harmful request in place of its harmless twin", "T2": "T2, a jailbreak wrapper around a harmful request",
    "T2b": "T2b, the same wrapper around the harmless twin", "T2-T2b": "T2 − T2b, what the wrapper does to harm alone",
    "indirect": "passes through it: patch the output, let everything above react",
    "direct": "it writes itself: swap its write in the final sum, nothing reacts",
}  # fmt: skip
ROWS = {
    "T1": "T1: request turns harmful", "T2": "T2: jailbreak wrapper, harmful request",
    "T2b": "T2b: the same, harmless request", "T2-T2b": "T2 − T2b: harmful beyond harmless",
}  # fmt: skip
SPLITS = ("discover", "validate", "test")
CENTROID_MARGIN = 0.05  # by which harm must be later for C1
TOKEN_ROWS = {
    "rest": "other words", "last_instruction": "last word or mark", "template": "template behind it", "last": "last token",
}  # fmt: skip
PATHS = {"MLPs": "MLPs without attention", "attention": "needs attention", "skip": "neither: residual stream"}
TREATMENTS = {
    "T1": "T1: harmless to harmful request", "T2": "T2: jailbreak wrapper", "T2-T2b": "T2 - T2b: wrapper, on harm only",
}  # fmt: skip
TIMES = {"none": "never", "first token": "first token only", "first five": "first five tokens"}
SHARES = (-0.5, 1.5)


def pair_tokens(table: pd.DataFrame) -> Figure:
    """Both prompts of one pair, token under token; what stands before the user's turn is the same in all, and one box."""
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
    spans = own.reset_index().groupby((own.group != own.group.shift()).cumsum())
    spans = spans.agg(group=("group", "first"), size=("group", "size"), middle=("index", "mean"))
    for run in spans.sort_values("size", kind="stable").drop_duplicates("group", keep="last").itertuples():
        name = str(run.group).replace("_", " ")
        axes.text(run.middle + 0.5, -0.1, name, ha="right", va="top", fontsize=8, rotation=35)
    for y, name in ((1, "control"), (0, "treated")):
        axes.text(-2.6, y + 0.45, name, ha="right", va="center", fontweight="bold", fontsize=8)
    axes.set(xlim=(-5.2, len(own) + 0.1), ylim=(-0.9, 2), title="Which tokens differ? The outlined ones, and no others")
    return figure


def component_map(table: pd.DataFrame, *, title: str) -> Figure:
    """Layers by attention and MLP outputs of one pair, in per cent of its total effect, which has the full colour."""
    grid = 100 * table.pivot(index="site", columns="layer", values="share").sort_index()  # attention above MLP
    figure, ((ax,),) = style.new_figure(width=max(5.2, 0.25 * grid.shape[1] + 1.9), height=1.7)
    bound = max(100.0, float(grid.abs().max(axis=None)))
    image = ax.imshow(grid, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    for (y, x), value in np.ndenumerate(grid.to_numpy()):
        text = f"{value:.0f}".replace("-0", "0").replace("-", "\N{MINUS SIGN}")
        style.write_cell(ax, x, y, text, abs(value) / bound, 8)
    ax.set_xticks(range(grid.shape[1]), grid.columns, fontsize=8)
    ax.set_yticks(range(len(grid)), [style.NAMES[site] for site in grid.index])
    ax.set(xlabel="layer (red: in the direction of TE)", title=title)
    ax.grid(False)
    figure.colorbar(image, ax=ax, label="% of TE", pad=0.01)
    return figure


def total_effects(table: pd.DataFrame, **options: Any) -> Figure:
    """Total effects by treatment, which is named, and split, in the order in which splits are used."""
    names = ROWS | {one: f"{one}: a benign choice" for one in table.treatment if one[0] == "B"}
    order = {"treatment": distinct(table.treatment), "split": SPLITS}
    ordered = table.sort_values(list(order), key=lambda own: own.map(order[own.name].index), kind="stable")
    return style.dots(ordered.replace({"treatment": names}), row="treatment", group="split", **options)


def layer_map(table: pd.DataFrame, *, panel: str, title: str) -> Figure:
    """Attention and MLP (rows) by layer, one map for each value of `panel`, on one scale; numbers are percent of TE.

    A bold number has an interval that excludes 0; what rounds to 0 has none. `{of}` in the title is the table's treatment.
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
    axes[-1, 0].set_xlabel("layer (bold: the interval excludes 0)")
    percent = PercentFormatter(1.0, decimals=0, symbol=None)
    figure.colorbar(image, ax=axes[:, 0], label="share of TE (%)", pad=0.01, format=percent)
    style.heading(figure, title.format(of=style.contrast(table)))
    return figure


def centroids(table: pd.DataFrame) -> Figure:
    """Depth of harm and of each benign behaviour, and beside it their difference; columns: quantity, contrast, estimate."""
    figure, ((left, right),) = style.new_figure(1, 2, 7.2, 2.9, width_ratios=[3, 2])
    for ax, groups in ((left, ("harm", "benign")), (right, ("difference",))):
        part = table[table.contrast.isin(groups)]
        style.draw_dots(ax, part, "quantity", "contrast", distinct(part.quantity), groups)
    benign = table[table.contrast == "benign"].estimate.mean()
    left.axvline(benign, color="black", lw=0.9, ls="--", label="mean of benign")
    left.set_xlabel("mean depth, as share of all layers")
    left.legend(fontsize=8)
    right.axvline(0, color="black", lw=0.8)
    right.axvline(CENTROID_MARGIN, color="black", lw=0.9, ls="--")
    right.set(ylim=(1.6, -0.6), xlabel="harm − benign (depth, share)\ndashed: asked by C1")
    style.heading(figure, "Is harm decided later than other choices?")
    return figure


def read_and_carried(table: pd.DataFrame) -> Figure:
    """By layer, what a probe reads and what is carried on; columns: what, layer, estimate, low, high."""
    title = "What early layers know is not yet what decides"
    figure = style.by_layer(table, group="what", title=title, unit="AUROC or share")
    ax, third = figure.axes[0], (int(table.layer.max()) + 1) / 3
    ax.axvspan(-0.5, third - 0.5, facecolor="none", edgecolor="#BBBBBB", hatch="///", lw=0, label="early layers")
    ax.get_legend().remove()
    style.legend_below(figure, [ax], 3)
    return figure


def heads(table: pd.DataFrame) -> Figure:
    """Heads by layer, indirect above direct; a frame where it `carries`, a dot where an interval excludes 0 and one sees it."""
    effects, bound = distinct(table.effect), float(table.estimate.abs().max()) or 1.0
    n_heads = table["head"].nunique()
    figure, axes = style.new_figure(len(effects), 1, 7.2, 0.6 + len(effects) * (0.55 + 0.13 * n_heads), sharex=True)
    for ax, effect in zip(axes[:, 0], effects, strict=True):
        part = table[table.effect == effect]
        grid = part.pivot(index="head", columns="layer", values="estimate")
        image = ax.imshow(grid, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
        ax.set_yticks(range(n_heads), grid.index, fontsize=8)
        ax.grid(False)
        x, y = part.layer.map(grid.columns.get_loc), part["head"].map(grid.index.get_loc)
        sure = ((part.low > 0) | (part.high < 0)) & (part.estimate.abs() > bound / 20)
        ax.plot(x[sure], y[sure], ".", color="black", ms=2.5)
        for left, top in zip(x[part.carries], y[part.carries], strict=True):
            ax.add_patch(Rectangle((left - 0.5, top - 0.5), 1, 1, fill=False, ec="black", lw=1.4))
        ax.set_ylabel("head")
        ax.set_title(PANELS.get(effect, effect), fontsize=9, fontweight="normal")
    axes[-1, 0].set_xticks(range(grid.shape[1]), grid.columns, fontsize=7)
    axes[-1, 0].set_xlabel("layer (dot: the interval excludes 0 and the effect is not tiny; frame: looked at below)")
    figure.colorbar(image, ax=axes[:, 0], label=LOG_ODDS, pad=0.01)
    style.heading(figure, "Which heads does the effect pass through, and do they write it?")
    return figure


def patterns(table: pd.DataFrame) -> Figure:
    """Where the last token looks, head by token, one panel a prompt; numbers from 0.05 on."""
    names, bound = distinct(table.panel), float(table.weight.max()) or 1.0
    width = max(5.0, 0.3 * table.position.nunique() + 1.2)
    figure, axes = style.new_figure(len(names), 1, width, len(names) * (0.24 * table["head"].nunique() + 1.15) + 0.4)
    for ax, name in zip(axes[:, 0], names, strict=True):
        part = table[table.panel == name]
        grid = part.pivot(index="head", columns="position", values="weight").loc[distinct(part["head"])]
        image = ax.imshow(grid, cmap="Blues", vmin=0.0, vmax=bound, aspect="auto")
        ax.set_yticks(range(len(grid)), grid.index, fontsize=8)
        ax.grid(False)
        for (y, x), weight in np.ndenumerate(grid.to_numpy()):
            if weight >= 0.05:
                style.write_cell(ax, x, y, f"{weight:.2f}"[1:] if weight < 0.995 else "1", weight / bound)
        tokens = part.drop_duplicates("position").sort_values("position").token
        ax.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        ax.set_title(name, fontsize=9)
        ax.set_ylabel("layer.head")
    figure.colorbar(image, ax=axes[:, 0], label="share of the head's attention", pad=0.01)
    style.heading(figure, "Which words do the carrying heads read for the last token?")
    return figure


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
            ax.axhspan(y - 0.5, y + 0.5, 0, width / grid.shape[1], fc="none", ec="#999999", hatch="////", lw=0)
        for x, number in enumerate(grid.loc[name]):
            if abs(number) >= style.SHOWN:
                style.write_cell(ax, x, y, f"{100 * number:.0f}", abs(number) / bound)
    ax.set_xticks(range(grid.shape[1]), grid.columns)
    ax.set(xlabel="layer", ylim=(len(rows) - 0.5, -0.5))
    ax.grid(False)
    return image


def groups(table: pd.DataFrame) -> Figure:
    """Groups of tokens in reading order against layers, one panel a treatment, on one scale."""
    names, rows = distinct(table.treatment), distinct(table.group)
    figure, axes = style.new_figure(len(names), 1, 7.0, 0.8 + len(names) * (0.6 + 0.24 * len(rows)))
    bound = min(1.0, float(table.estimate.abs().max()) or 1.0)
    for ax, name in zip(axes[:, 0], names, strict=True):
        part = table[table.treatment == name]
        image = _map(ax, part, "group", "estimate", bound)
        here = distinct(part.group)
        ax.set_yticks(range(len(here)), [TOKEN_ROWS.get(one, one) for one in here])
        ax.set_title(TREATMENTS.get(str(name), str(name)), fontweight="normal")
    figure.colorbar(image, ax=axes, label=TOTAL, format=PercentFormatter(1.0))
    style.heading(figure, "Which tokens hold the effect, and when does the last one have it?")
    return figure


def tokens(table: pd.DataFrame) -> Figure:
    """Single tokens of one pair in reading order against layers: columns layer, position, token, earliest, share."""
    label = table.drop_duplicates("position").set_index("position")["token"]
    figure, ((ax,),) = style.new_figure(1, 1, 7.0, 0.9 + 0.19 * len(label))
    image = _map(ax, table, "position", "share", min(1.0, float(table.share.abs().max()) or 1.0))
    ax.set_yticks(range(len(label)), [str(one).replace("$", r"\$") for one in label], fontsize=8)
    ax.set_title("Which token of this prompt holds the wrapper's effect?")
    figure.colorbar(image, ax=ax, label=TOTAL, format=PercentFormatter(1.0))
    return figure


def carriers(table: pd.DataFrame) -> Figure:
    """Shares of the paths by layer; the axis ends at -0.5 and 1.5, and longer intervals leave it. A line is at `hand_over`."""
    title, unit = "What carries the last token's signal on to the output?", "share of the last token's effect"
    figure = style.by_layer(table.replace({"path": PATHS}), group="path", title=title, unit=unit, late=False)
    ax = figure.axes[0]
    low, high = ax.get_ylim()
    ax.set(xlim=(table.layer.min() - 0.5, table.layer.max() + 0.5), ylim=(max(low, SHARES[0]), min(high, SHARES[1])))
    for at in table.get("hand_over", table.layer[:0]).dropna().astype(int)[:1]:
        ax.axvline(at, color="black", lw=0.9, ls="--", label=f"hand-over: layer {at}")
        ax.legend()
    return figure


def timing(table: pd.DataFrame, **options: Any) -> Figure:
    """Rates of harmful answers by schedule, one symbol for what is held."""
    named = {"schedule": TIMES, "clamp": {"neurons": "largest neurons held", "whole MLP": "whole MLP output held"}}
    unit = f"share of answers labelled harmful, n = {table.n.max()}"
    return style.dots(table.replace(named), row="schedule", group="clamp", unit=unit, **options)


# fmt: off
ONE_PAIR = {"layer": "int", "site": "str", "share": "float"}
MAP = ("A map of layers by attention and MLP outputs at the last token of {pair}, each cell with its share of the total "
       "effect in per cent, red with and blue against the treatment")
SPECS = (
    spec("00_map", component_map, "all", ONE_PAIR, MAP.format(pair="one pair"),
         title="The first pair: which component carries its effect?"),
    spec("00_own", component_map, "all", ONE_PAIR, MAP.format(pair="the reader's own pair"),
         title="Your own pair: which component carries its effect?"),
    spec("01_tokens", pair_tokens, "all",
         {"position": "int", **dict.fromkeys(("group", "control", "treated"), "str"), "differ": "bool"},
         "Control and treated prompt of one pair, token under token, coloured by position group from system turn to "
         "last token; only outlined tokens differ, all others are the same in both prompts"),
    spec("01_refusals", style.dots, "all", {"prompt": "str", "request": "str", **ESTIMATE},
         "Mean probability that the answer opens with a refusal, with intervals over topics: harmful and harmless requests "
         "without a wrapper, in a neutral and in a jailbreak wrapper",
         row="prompt", group="request", title="Which prompts does the model refuse?",
         unit="mean P(first token opens a refusal)", limits=(-0.02, 1.02)),
    spec("01_total_effects", total_effects, "all", {"treatment": "str", "split": "str", **ESTIMATE},
         "Total effect of every treatment in log-odds with intervals, discover, validate and test side by side; dashed "
         "lines mark the precondition, 0.5 to either side of 0",
         title="Which treatments move the answer?", marks=(-0.5, 0.5),
         unit="total effect (log-odds of answering, in B of the second choice)\ndashed: 0.5, the least that is taken apart"),
    spec("02_cumulative", style.cumulative, "C1", {"model": "str", "line": "str", "earliest": "float", **BY_LAYER},
         "Share of the total effect in the last-token residual stream after each layer, one panel a model, one line a "
         "treatment and a dashed one for the untrained twin: all end at 1, and where each rises is compared"),
    spec("02_treatments", layer_map, "C1", {"treatment": "str", "site": "str", **BY_LAYER},
         "Share of the total effect that passes through attention and MLP outputs by layer, a map for recognition (T1), "
         "generation (T2), the wrapper on a harmless request (T2b) and the contrast T2 - T2b; numbers are percent",
         panel="treatment", title="Through which layers does the effect pass?"),
    spec("02_benign", centroids, "C1", {"quantity": "str", "contrast": "str", **ESTIMATE},
         "Effect-weighted mean depth of harm and of each benign behaviour as dots with intervals, and beside them harm "
         "minus benign with an interval over topics and a wider one that resamples behaviours, too"),
    spec("02_computed", layer_map, "C1", {"panel": "str", "site": "str", **BY_LAYER},
         "Attention and MLP outputs by layer, above what passes through them, below what they compute from wrapper and "
         "request together, both as percent of the total effect",
         panel="panel", title="What passes through, and what is computed?"),
    spec("02_early", read_and_carried, "C3", {"what": "str", **BY_LAYER},
         "By layer, how well a probe on shared tokens tells harmful from harmless requests, the same for the words "
         "alone, and the share of the total effect that these tokens carry, with early layers hatched"),
    spec("03_total_direct", layer_map, "C2", {"effect": "str", "site": "str", "layer": "int", **ESTIMATE, "of": "str"},
         "Two maps of attention and MLP by layer, above what passes through each (indirect effects), below what each "
         "writes itself (direct effects), as percent of the total effect; bold numbers have an interval that excludes 0",
         panel="effect", title="Through which modules does the effect of {of} pass, and which write it?"),
    spec("03_normalised", style.dots, "C2", {"normalisation": "str", "effect": "str", **ESTIMATE},
         "MLP share of direct and of indirect effects: raw, per length of the patch, per parameter, and of the indirect "
         "ones by sufficiency and by necessity; dashed lines mark one half and 0.60",
         row="normalisation", group="effect", title="Do MLPs hold more than attention, however one counts?",
         unit="MLP share of positive component effects\n(dashed: that MLPs write it, C2, fails below 0.5 and holds above 0.6)",
         marks=(0.5, 0.6), limits=(0.0, 1.0)),
    spec("03_heads", heads, "C2", {"layer": "int", "head": "int", "effect": "str", "carries": "bool", **ESTIMATE},
         "Two maps of attention heads by layer, indirect effects above direct ones on one scale from against to with "
         "the treatment; a dot marks an interval that excludes 0, a frame the heads whose attention is looked at"),
    spec("03_patterns", patterns, "C2",
         {"panel": "str", "head": "str", "position": "int", "token": "str", "weight": "float"},
         "Attention of the carrying heads from the last token, a row a head and a column a token, above in the control "
         "and below in the treated prompt; everything before the user's words is one column"),
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
         "at all but the first",
         title="The last layer is held at a refusing run's values: when, and what then?", limits=(-0.05, 1.05), below=True),
    spec("08_claims", style.answers, "all", dict.fromkeys(("model", "claim", "name", "answer", "number", "grade"), "str"),
         "Answers, a row for each claim and a column for each model: the number that decides with its interval, and by colour "
         "and word supported, contradicted or inconclusive; hatched where the rule cannot tell"),
)
# fmt: on
