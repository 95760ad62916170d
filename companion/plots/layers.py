"""Figures of notebooks 00 to 03 and 08: a pair of prompts, what it shows, layers and modules."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from companion.plots import style
from companion.plots.style import BY_LAYER, ESTIMATE, LOG_ODDS, distinct, spec

CELLS = {
    "clean": ("#F2F2F2", "", "clean run, cached"),
    "patched": ("#D55E00", "", "patched with the other run's activation"),
    "recomputed": ("#56B4E9", "//", "recomputed: above and to the right"),
    "read": ("#0072B2", "xx", "read out"),
}
GROUP_COLOURS = {
    "system": "#EEEEEE", "header": "#DDDDDD", "wrapper": "#F0C27B", "distractor": "#B7E0F2", "verb": "#E8A27C",
    "object": "#8FCFB4", "rest": "#F7F7F7", "last_instruction": "#C9B6E4", "template": "#DDDDDD", "last": "#F4E27A",
}  # fmt: skip
MAP = (
    "A map of layers by attention and MLP outputs at the last token of one pair, each cell with its share of the total "
    "effect in per cent, red with and blue against the treatment"
)


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = style.new_figure(width=width, height=height)
    axes[0, 0].axis("off")
    return figure, axes[0, 0]


def pair_tokens(table: pd.DataFrame) -> Figure:
    """Both prompts of one pair, token under token; columns: position, group, control, treated, differ.

    What stands before the user's turn is the same in all prompts, and one box.
    """
    before = (table.group.isin(["system", "header"]) & ~table.differ).cummin()
    own = table[~before].reset_index(drop=True)
    figure, axes = _blank(max(6.0, 0.28 * len(own) + 1.9), 2.6)
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
    spans = (
        own.assign(at=own.index)
        .groupby(runs)
        .agg(group=("group", "first"), size=("group", "size"), middle=("at", "mean"))
    )
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
        ax.text(
            x, y, text, ha="center", va="center", fontsize=8, color="white" if abs(value) > 0.6 * bound else "black"
        )
    ax.set_xticks(range(grid.shape[1]), grid.columns, fontsize=8)
    ax.set_yticks(range(len(grid)), [style.NAMES[site] for site in grid.index])
    ax.set_xlabel("layer")
    ax.set_title("Which component carries this pair's effect? (% of TE)")
    ax.grid(False)
    return figure


def grid(table: pd.DataFrame) -> Figure:
    """Which cells (layer, position) an intervention recomputes; columns: panel, layer, position, state, token."""
    panels = distinct(table.panel)
    figure, axes = style.new_figure(1, len(panels), 3.9 * len(panels), 3.1)
    for ax, panel in zip(axes[0], panels, strict=True):
        part = table[table.panel == panel]
        for row in part.itertuples():
            colour, hatch, _ = CELLS[str(row.state)]
            square = Rectangle((row.position - 0.45, row.layer - 0.45), 0.9, 0.9, fc=colour, ec="white", hatch=hatch)
            ax.add_patch(square)
        ax.grid(False)
        first = part[part.layer == part.layer.min()]
        ax.set_xlim(-0.6, part.position.max() + 0.6)
        ax.set_ylim(-0.6, part.layer.max() + 0.6)
        ax.set_xticks(first.position, first.token, rotation=90, fontsize=6)
        ax.set_ylabel("layer")
        share = (part.state != "clean").mean()
        ax.set_title(f"{panel}\n{share:.0%} of the cells of a full forward pass", fontsize=9)
    handles = [Patch(fc=colour, hatch=hatch, ec="white", label=label) for colour, hatch, label in CELLS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
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
    spec("02_grid", grid, "all", {"panel": "str", "layer": "int", "position": "int", "state": "str", "token": "str"},
         "Two grids of cells, layer by position: a patch at a wrapper token changes all cells above and to the right "
         "of it, a patch at the last token only the column above it; the rest is kept from the clean run"),
    spec("02_cumulative", style.cumulative, "C1", {"model": "str", "earliest": "float", **BY_LAYER},
         "Share of the total effect in the last-token residual stream after each layer, one panel a model, trained "
         "network beside its untrained twin: all end at 1, and where each rises is compared"),
    spec("02_increments", style.by_layer, "C1", {"model": "str", **BY_LAYER},
         "What each layer adds to the cumulative share of the total effect, trained model beside its untrained twin, "
         "with intervals that tell whether the two differ in any layer",
         group="model", title="Which layer adds what to the curve?", unit="increment (share of total effect)"),
    spec("02_components", style.by_layer, "C1", {"site": "str", **BY_LAYER, "band_low": "float", "band_high": "float"},
         "Indirect effect of attention and MLP outputs at the last token by layer, in log-odds; bars are pointwise "
         "intervals, the shaded band holds for all cells at once",
         group="site", title="Where does the effect pass at the last token?", unit=LOG_ODDS),
    spec("02_treatments", style.panels, "C1", {"treatment": "str", "site": "str", **BY_LAYER},
         "Indirect effects of attention and MLP outputs by layer, one panel for recognition (T1), generation (T2), the "
         "wrapper on a harmless request (T2b) and the contrast T2 - T2b; up is towards complying",
         panel="treatment", group="site",
         title="Recognition (T1), generation (T2), wrapper alone (T2b), and the contrast", unit=LOG_ODDS),
    spec("02_benign", style.panels, "C1", {"contrast": "str", "site": "str", **BY_LAYER},
         "Shares of the total effect by layer for attention and MLP outputs in three panels: harm, the mean benign "
         "behaviour, and harm minus benign, which is flat at 0 where harm is decided like anything else",
         panel="contrast", group="site", title="Is harm later than any other first-token decision?"),
    spec("02_models", style.panels, "C1", {"model": "str", "site": "str", **BY_LAYER},
         "Shares of the total effect by layer for attention and MLP outputs, one panel a model: seeds of the windowed "
         "model, then of the same model with full attention",
         panel="model", group="site", title="Does the picture hold over seeds, and without the sliding window?"),
    spec("02_computed", style.panels, "C1", {"panel": "str", "site": "str", **BY_LAYER},
         "Attention and MLP outputs by layer, for each model what passes through them beside what they compute from "
         "wrapper and request together, which few components do",
         panel="panel", group="site", title="What is passed on, and what is computed?"),
    spec("03_total_direct", style.panels, "C2", {"effect": "str", "site": "str", **BY_LAYER},
         "Attention and MLP outputs by layer in two panels, left what passes through them (indirect effects), right "
         "what they write themselves (direct effects), both as shares of the total effect",
         panel="effect", group="site", title="Passing through is not writing: indirect against direct effects"),
    spec("03_normalised", style.dots, "C2", {"normalisation": "str", "effect": "str", **ESTIMATE},
         "MLP share of direct and of indirect effects: raw, per unit of patch norm, per parameter, and robustness "
         "checks",
         row="normalisation", group="effect", title="Does MLP beat attention under every normalisation?",
         unit="MLP share of positive component effects", marks=(0.5, 0.6), limits=(-0.3, 1.3)),
    spec("03_directions", style.panels, "C2", {"site": "str", "estimand": "str", **BY_LAYER},
         "By layer, one panel for attention and one for MLP outputs: NIE0 (sufficient), NIE1 (necessary), and NIE1 - "
         "NIE0, the interaction, above 0 where a component needs others and below where others would do",
         panel="site", group="estimand", title="Sufficient, necessary, or only together?", unit=LOG_ODDS),
    spec("03_heads", style.heatmap, "C2", {"layer": "int", "head": "int", "effect": "str", **ESTIMATE},
         "Two maps of attention heads, layer by head, indirect and direct effect on one scale from against to with the "
         "treatment; a dot marks an interval that excludes 0",
         row="layer", column="head", panel="effect", title="Which heads carry the effect, and which write it?",
         unit=LOG_ODDS),
    spec("08_claims", style.answers, "all", dict.fromkeys(("model", "claim", "name", "answer", "number", "grade"), "str"),
         "Answers, a row for each model and a column for each claim: the number that decides, and by colour and sign "
         "supported, contradicted or inconclusive; hatched where the rule cannot tell"),
)
# fmt: on
