"""Figures of notebooks 00 to 02 and 08: the pipeline, the four cells, a pair of prompts, and layers."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from companion.plots import style
from companion.plots.style import BY_LAYER, ESTIMATE, LOG_ODDS, OKABE_ITO, distinct, spec

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
CORNERS = {"y00": (0.0, 1.0), "y01": (1.0, 1.0), "y10": (0.0, 0.0), "y11": (1.0, 0.0)}


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = style.new_figure(width=width, height=height)
    axes[0, 0].axis("off")
    return figure, axes[0, 0]


def pair_tokens(table: pd.DataFrame) -> Figure:
    """Both prompts of one pair, token under token; columns: position, group, control, treated, differ."""
    figure, axes = _blank(0.42 * len(table) + 0.9, 2.9)
    for row in table.itertuples():
        colour = GROUP_COLOURS.get(str(row.group), "#FFFFFF")
        for y, text in ((1, row.control), (0, row.treated)):
            edge = "#D55E00" if row.differ else "#BBBBBB"
            axes.add_patch(Rectangle((row.position, y), 1, 0.9, fc=colour, ec=edge, lw=2 if row.differ else 0.6))
            axes.text(row.position + 0.5, y + 0.45, text, ha="center", va="center", fontsize=7, rotation=90)
    runs = (table.group != table.group.shift()).cumsum()
    longest = table.groupby(runs).agg(group=("group", "first"), size=("group", "size"), middle=("position", "mean"))
    for run in longest.sort_values("size", kind="stable").drop_duplicates("group", keep="last").itertuples():
        axes.text(run.middle + 0.5, -0.12, run.group, ha="right", va="top", fontsize=7, rotation=35)
    for y, name in ((1, "control"), (0, "treated")):
        axes.text(-0.2, y + 0.45, name, ha="right", va="center", fontweight="bold")
    axes.set_xlim(-2, len(table) + 0.1)
    axes.set_ylim(-1.1, 2)
    axes.set_title("One pair, aligned: only the outlined tokens differ")
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


def pipeline(table: pd.DataFrame) -> Figure:
    """The one-way flow of data; columns: step, what, file, notebook."""
    figure, axes = _blank(9.0, 2.0)
    for i, row in enumerate(table.itertuples()):
        x = i * 1.55
        axes.add_patch(Rectangle((x, 0), 1.25, 0.9, fc="#F7F7F7", ec=OKABE_ITO[0], lw=1.2))
        axes.text(x + 0.62, 0.68, row.step, ha="center", va="center", fontweight="bold", fontsize=8.5)
        axes.text(x + 0.62, 0.30, row.what, ha="center", va="center", fontsize=7)
        axes.text(x + 0.62, -0.10, row.file, ha="center", va="top", fontsize=6.5, family="monospace")
        axes.text(x + 0.62, 1.0, row.notebook, ha="center", va="bottom", fontsize=7, color="#555555")
        if i:
            ends = (x - 0.29, 0.45), (x - 0.01, 0.45)
            axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=10, color="black"))
    axes.set_xlim(-0.1, 1.55 * len(table))
    axes.set_ylim(-0.5, 1.3)
    axes.set_title("Data flows one way, and every step reads what an earlier one left")
    return figure


def estimands(table: pd.DataFrame) -> Figure:
    """The four cells as corners, effects as arrows between them; columns: estimand, from_cell, to_cell, reads."""
    figure, axes = _blank(7.0, 4.2)
    for name, (x, y) in CORNERS.items():
        axes.text(x, y, f"${name[0]}_{{{name[1:]}}}$", ha="center", va="center", fontsize=15)
    for k, row in enumerate(table.itertuples()):
        (x0, y0), (x1, y1) = CORNERS[str(row.from_cell)], CORNERS[str(row.to_cell)]
        dx, dy = 0.13 * (x1 - x0), 0.13 * (y1 - y0)
        style = {"arrowstyle": "-|>", "mutation_scale": 14, "lw": 1.8, "color": OKABE_ITO[k % 8]}
        axes.add_patch(FancyArrowPatch((x0 + dx, y0 + dy), (x1 - dx, y1 - dy), **style))
        # The diagonal's words stand above its middle, those of an edge outside it.
        below = -1 if y0 == y1 == 0 else 1
        at = (0.73, 0.64) if dx and dy else ((x0 + x1) / 2 + (0.05 if x0 else -0.05) * (not dx), (y0 + y1) / 2)
        shift = 0.09 * below if not dy else 0.0
        align = "center" if dx else ("left" if x0 else "right")
        axes.text(at[0], at[1] + shift, f"{row.estimand}\n{row.reads}", ha=align, va="center", fontsize=8)
    for x, text in ((0, "mediator as in control"), (1, "mediator as in treated")):
        axes.text(x, 1.28, text, ha="center", fontsize=9, fontweight="bold")
    for y, text in ((1, "control\nprompt"), (0, "treated\nprompt")):
        axes.text(-0.62, y, text, ha="center", va="center", fontsize=9, fontweight="bold")
    axes.set_xlim(-0.8, 1.6)
    axes.set_ylim(-0.25, 1.42)
    axes.set_title("Four cells, and every effect is a difference of two")
    return figure


# fmt: off
SPECS = (
    spec("00_pipeline", pipeline, "all", dict.fromkeys(("step", "what", "file", "notebook"), "str"),
         "Seven boxes in a row, prompts, pairs, clean runs, effects, statistics, verdicts and figures, each with the "
         "file that it leaves and the notebook that makes it; arrows lead to the right only"),
    spec("00_estimands", estimands, "all", dict.fromkeys(("estimand", "from_cell", "to_cell", "reads"), "str"),
         "The four cells as corners of a square: prompt control above, treated below, mediator control left, treated "
         "right. Arrows along the upper and lower edge are NIE0 and NIE1, down the left and right edge NDE0 and NDE1, "
         "the diagonal is TE"),
    spec("01_tokens", pair_tokens, "all",
         {"position": "int", **dict.fromkeys(("group", "control", "treated"), "str"), "differ": "bool"},
         "Control and treated prompt of one pair, token under token, coloured by position group from system turn to "
         "last token; only outlined tokens differ, all others are the same in both prompts"),
    spec("01_behaviours", style.dots, "all", {"suite": "str", "label": "str", **ESTIMATE},
         "Rates of on-topic answers, refusals and harmful answers with Wilson intervals, one row for each kind of "
         "prompt from harmless over plainly harmful and wrapped to never seen",
         row="suite", group="label", title="What does the model do with each kind of prompt?",
         unit="share of answers, greedy decoding"),
    spec("01_wrappers", style.dots, "all", {"wrapper": "str", "model": "str", **ESTIMATE},
         "Probability of complying with a harmful request, one row a wrapper from none to the strongest, one symbol a "
         "model; a dashed line marks one half",
         row="wrapper", group="model", title="How strong is each wrapper?",
         unit="mean P(comply) at the first answer token", marks=(0.5,)),
    spec("01_total_effects", style.dots, "all", {"treatment": "str", "split": "str", **ESTIMATE},
         "Total effect of every treatment in log-odds with intervals, discover, validate and test side by side; dashed "
         "lines mark the gate at 0.5 to either side of 0",
         row="treatment", group="split", title="Is there an effect to mediate?", unit="total effect (log-odds)",
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
    spec("08_claims", style.answers, "all", dict.fromkeys(("model", "claim", "name", "answer", "number", "grade"), "str"),
         "Answers, a row for each model and a column for each claim: the number that decides, and by colour and sign "
         "supported, contradicted or inconclusive; hatched where the rule cannot tell"),
)
# fmt: on
