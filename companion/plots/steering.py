"""Figures of notebook 06: curves over strengths in panels, the plane of prompts, and null distributions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.base.thresholds import MARGINS
from companion.plots import style
from companion.plots.style import BY_LAYER, ESTIMATE, LOG_ODDS, MARKERS, OKABE_ITO, distinct, heading, new_figure, spec


def strength_curves(
    table: pd.DataFrame, *, x_label: str, y_label: str, title: str, log_x: bool = False,
    margins: Mapping[str, float] | None = None, apart: float = 0.0,
) -> Figure:  # fmt: skip
    """Estimates over a numeric `x`, one line for each value of `group`, one panel for each value of `panel`.

    A column `row` spreads many groups over rows of panels, each with colours and a legend of its own. A row of the table
    without an estimate is a point that could not be measured, and is not drawn.

    Points are joined in the order of the rows, so that a trade-off curve follows its strengths. In a panel with a margin
    (a dashed line) `x` is linear up to it and logarithmic beyond. `apart` moves lines sideways, in units of `x`, so that
    intervals at one `x` do not hide each other.
    """
    names = distinct(table.panel)
    parts = [part for _, part in table.groupby("row", sort=False)] if "row" in table else [table]
    most = max(part.group.nunique() for part in parts)
    width, columns = min(3.3, 7.2 / len(names)), min(3, most)
    height = len(parts) * (3.2 + 0.2 * -(-most // columns))
    # A row of panels is a figure of its own within the figure, so that its legend stands below it.
    figure, _ = new_figure(1, 1, width * len(names) + 0.7, height)
    figure.clear()
    drawn = []
    for one, part in zip(figure.subfigures(len(parts), 1, squeeze=False)[:, 0], parts, strict=True):
        axes = one.subplots(1, len(names), squeeze=False, sharey=True)[0]
        drawn.append(axes)
        groups = distinct(part.group)
        for ax, name in zip(axes, names, strict=True):
            here = part[part.panel == name]
            _lines(ax, here, groups, apart)
            if margins and name in margins:
                _up_to(ax, margins[name])
            if log_x:
                _log_x(ax, here)
            ax.set_title(str(name))
        for ax in axes if len(names) < 3 else axes[1:2]:  # three panels are too narrow for one label each
            ax.set_xlabel(x_label)
        axes[0].set_ylabel(y_label)
        head = {"title": str(part["row"].iloc[0]), "title_fontsize": 8} if len(parts) > 1 else {}
        style.legend_below(one, axes, columns, **head)
    for column in zip(*drawn, strict=True):  # panels below each other are compared, so they have one axis
        limits = np.array([ax.get_ylim() for ax in column])
        for ax in column:
            ax.set_ylim(limits[:, 0].min(), limits[:, 1].max())
    heading(figure, title)
    return figure


def _lines(ax: Axes, table: pd.DataFrame, groups: list[str], apart: float) -> None:
    for k, label in enumerate(groups):
        line = table[(table.group == label) & table.estimate.notna()]
        if line.empty:
            continue
        ax.errorbar(
            line.x + apart * (k - (len(groups) - 1) / 2), line.estimate, yerr=style.interval_lengths(line), lw=1.1, capsize=2,
            color=OKABE_ITO[k % 8], marker=MARKERS[k % 8], ms=4 if k % 8 < 7 else 7, mec="black" if k % 8 == 7 else None,
            mew=0.6, label=str(label),
        )  # fmt: skip


def _log_x(ax: Axes, table: pd.DataFrame) -> None:
    ax.set_xscale("log")
    if table.x.nunique() <= 5:  # few sizes that were chosen: name each
        ax.set_xticks(sorted(set(table.x)), [f"{x:.3g}" for x in sorted(set(table.x))])
        ax.minorticks_off()


def _up_to(ax: Axes, margin: float) -> None:
    """A cost axis: linear up to the margin, logarithmic beyond, with numbers that are read off and not powers of ten."""
    ax.set_xscale("symlog", linthresh=margin)
    ax.axvline(margin, color="black", lw=0.9, ls="--")
    low, high = ax.get_xlim()
    ticks = [x for x in margin * np.array([0, 0.5, 1, 2, 5, 10, 20, 50]) if low <= x <= high]
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
    ax.minorticks_off()


def plane(table: pd.DataFrame) -> Figure:
    """Groups of prompts in the plane of the two projections, each with the intervals of both means."""
    figure, axes = new_figure(width=7.0, height=4.8)
    ax = axes[0, 0]
    for k, (name, part) in enumerate(table.groupby("group", sort=False)):
        x, y = (part[part.projection == way] for way in ("harmfulness", "rejection"))
        if x.empty or y.empty:
            continue
        lengths = {"xerr": style.interval_lengths(x), "yerr": style.interval_lengths(y)}
        ax.errorbar(x.estimate, y.estimate, **lengths, ms=6, label=str(name), **style.mark(k))
    ax.axhline(0, color="black", lw=0.6)
    ax.axvline(0, color="black", lw=0.6)
    ax.set_xlabel("pos_H: share of the way from harmful-complied (0) to benign-complied (1)")
    ax.set_ylabel("pos_R: share of the way to refused (1)")
    ax.set_title("Where do prompts lie along rejection and harmfulness?")
    style.legend_below(figure, [ax], 2)
    return figure


def null(table: pd.DataFrame) -> Figure:
    """Effects of random directions as a histogram, one panel a family; the direction under test as a line."""
    names = distinct(table.family)
    figure, axes = new_figure(1, len(names), 3.4 * len(names) + 0.4, 2.8, sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        part = table[table.family == name]
        drawn, tested = part[part.role == "random"].value, part[part.role != "random"]
        ax.hist(drawn, bins=np.linspace(table.value.min(), table.value.max() + 1e-9, 30), color="#999999")
        for k, row in enumerate(tested.itertuples()):
            ax.axvline(row.value, color=OKABE_ITO[k], lw=2, ls=("-", "--")[k % 2], label=str(row.role))
        ax.set_title(str(name))
        ax.set_xlabel("fall of the log-odds of complying")
    axes[0, 0].set_ylabel("random directions")
    style.legend_below(figure, [axes[0, 0]], 2)
    heading(figure, "Is the direction better than chance?")
    return figure


CURVE = {"panel": "str", "group": "str", "x": "float", **ESTIMATE}
COSTS = {"over-refusal": "against over-refusal (points)", "KL": "against KL (nats a token)"}
ROWED = {"row": "str", **CURVE}
HARM = "1 - P(refusal) on jailbroken requests"
# fmt: off
SPECS = (
    spec("06_geometry", plane, "C6", {"group": "str", "projection": "str", **ESTIMATE},
         "Mean positions of prompt groups along the rejection and the harmfulness direction at the decision layer"),
    spec("06_laws", strength_curves, "C6", CURVE,
         "Coefficient that just changes the answer against the prompt's position, for rejection and for harmfulness",
         x_label="position along the direction",
         y_label="coefficient (direction lengths)",
         title="The R-law and the H-law: does the position tell how much steering is needed?"),
    spec("06_tradeoff", strength_curves, "C6", ROWED,
         "Unrefused jailbreaks against over-refusal of borderline prompts and KL on harmless ones, over strengths, by "
         "method",
         x_label="cost", y_label=HARM,
         title="What does each point of harm cost? One point a strength, dashed: the margin",
         margins={panel: MARGINS[cost] for cost, panel in COSTS.items()}),
    spec("06_budget", strength_curves, "C6", CURVE,
         "Unrefused jailbreaks against the L2 budget for early, middle and late layers: adaptive, fixed, the last "
         "layer's vector",
         x_label="budget: root mean square of the added norm", y_label=HARM,
         title="Early, middle or late, with the same budget"),
    spec("06_cost", style.dots, "C6", {"method": "str", "price": "str", **ESTIMATE},
         "Unrefused jailbreaks that each method leaves at a rise of over-refusal of at most 1, 2 and 5 points",
         row="method", group="price", title="How much harm is left at the same over-refusal?",
         unit=HARM, below=True),
    spec("06_random", null, "C6", {"family": "str", "role": "str", "value": "float"},
         "Fall of the log-odds under isotropic and covariance-matched random directions, as histograms, and under the "
         "fitted one"),
    spec("06_methods", style.dots, "C6", {"method": "str", "measure": "str", **ESTIMATE},
         "Change in harmful answers, in refusals of borderline prompts and in right answers to harmless prompts, by "
         "method",
         row="method", group="measure", title="What does each method change?",
         unit="change in share of prompts (percentage points)", below=True, marks=(-2.0, 2.0)),
    spec("06_families", style.dots, "C6", {"family": "str", "method": "str", **ESTIMATE},
         "Share of harmful answers by wrapper family, the family left out of fitting and choosing, by method",
         row="family", group="method", title="Does a defence hold against wrappers that it was not fitted on?",
         unit="harmful answers (share of prompts), family left out of the fit", below=True),
    spec("06_tiers", strength_curves, "C6", CURVE,
         "Share of harmful answers by wrapper tier, one panel a severity, by method",
         x_label="wrapper tier (1 weak, 6 strong)",
         y_label="harmful answers (share of prompts)", title="Weak and strong wrappers, mild and severe requests",
         apart=0.07),
    spec("06_examples", strength_curves, "C6", CURVE,
         "Cosine between directions fitted on two samples, and unrefused jailbreaks, over the number of fitting "
         "examples",
         x_label="fitting examples of each kind", y_label="cosine, or 1 - P(refusal)",
         title="How many examples does a direction need?", log_x=True),
    spec("06_mediation", style.panels, "C6", {"steering": "str", "site": "str", **BY_LAYER},
         "Indirect effect of attention and MLP outputs by layer, unsteered and under each kind of steering",
         panel="steering", group="site", title="Is the effect gone, and does another component take over?",
         unit=LOG_ODDS),
    spec("06_attack", style.dots, "C6", {"method": "str", "attack": "str", **ESTIMATE},
         "Share of harmful answers under the prompt set's strong wrappers and under the worst disguise that a search "
         "found",
         row="method", group="attack", title="An attacker who knows the defence",
         unit="harmful answers (share of prompts)", below=True),
)
# fmt: on
