"""Figures of notebook 06: AdaSteer's laws, what each method changes and what it leaves at one price, and the push elsewhere."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.base.thresholds import LINE
from companion.plots import style
from companion.plots.style import ESTIMATE, OKABE_ITO, distinct, heading, new_figure, spec


def laws(table: pd.DataFrame) -> Figure:
    """Coefficients over positions, one panel a law: fifths of each kind of prompts, and the fitted law with its band."""
    panels = sorted(distinct(table.panel))
    figure, axes = new_figure(1, len(panels), 7.0, 3.0, sharey=True)
    groups = [name for name in distinct(table.group) if name != LINE]
    for ax, panel in zip(axes[0], panels, strict=True):
        here = table[table.panel == panel]
        line = here[here.group == LINE]
        ax.fill_between(line.x, line.low, line.high, color="#999999", alpha=0.3, lw=0)
        ax.plot(line.x, line.estimate, color="black", lw=1.4, label=LINE if len(line) else None)
        for k, name in enumerate(groups):
            part = here[here.group == name]
            if len(part):
                lengths = style.interval_lengths(part)
                ax.errorbar(part.x, part.estimate, yerr=lengths, ms=5, label=str(name), **style.mark(k))
        ax.set_title(str(panel))
        ends = " of the prompt: 0 answered, 1 refused" if "v_R" in str(panel) else ": 0 answered harmful, 1 other"
        ax.set_xlabel(f"position{ends}")
        if len(here):
            ax.legend(fontsize=8)
    axes[0, 0].set_ylabel("λ (direction lengths)")
    heading(figure, "Does a prompt's position tell how much steering it needs, and how much it tolerates?")
    return figure


def equal_price(table: pd.DataFrame) -> Figure:
    """What each method leaves of the harm at one price, and beside it the paired difference from the tested method."""
    rows, prices = distinct(table.method), distinct(table.price)
    figure, axes = new_figure(1, 2, 7.0, 1.3 + len(rows) * 0.3, sharey=True)
    differ = table.assign(estimate=table.more, low=table.more_low, high=table.more_high)
    for ax, part in zip(axes[0], (table, differ), strict=True):
        style.draw_dots(ax, part, "method", "price", rows, prices)
    axes[0, 1].invert_yaxis()  # the axes share it, and each turned it round
    axes[0, 1].axvline(0, color="black", lw=0.9)
    axes[0, 0].set_xlabel("1 - P(refusal) on jailbroken requests")
    axes[0, 1].set_xlabel("difference from the tested method")
    style.legend_below(figure, [axes[0, 0]], len(prices))
    heading(figure, "How much harm is left where over-refusal may rise by so much?")
    return figure


def places(table: pd.DataFrame) -> Figure:
    """Falls of the log-odds at one budget: a row a place or kind of direction, with an interval or one mark a draw."""
    rows = distinct(table.place)
    figure, axes = new_figure(width=7.0, height=1.0 + 0.36 * len(rows))
    ax: Axes = axes[0, 0]
    for k, row in enumerate(rows):
        part = table[table.place == row]
        look = {**style.mark(k), "alpha": 1.0 if len(part) == 1 else 0.5}
        size = 6 if len(part) == 1 else 4
        ax.errorbar(part.estimate, np.full(len(part), k), xerr=style.interval_lengths(part), ms=size, **look)
    ax.axvline(0, color=OKABE_ITO[6], lw=0.8)
    ax.set_yticks(range(len(rows)), [str(row) for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("fall of the log-odds of complying on jailbroken requests (log-odds)")
    heading(figure, "Does the same budget do as much in other layers, or in a random direction?")
    return figure


# fmt: off
SPECS = (
    spec("06_laws", laws, "C6", {"panel": "str", "group": "str", "x": "float", **ESTIMATE},
         "Coefficient that a prompt needs to be refused, and the one that it tolerates, over its position, with the fitted laws"),
    spec("06_methods", style.dots, "C6", {"method": "str", "measure": "str", **ESTIMATE},
         "Change in harmful answers, in refusals of borderline prompts and in right answers to harmless prompts, by "
         "method",
         row="method", group="measure", title="Who pays? Paired changes against the unsteered model",
         unit="change in share of prompts (percentage points)", below=True, marks=(-2.0, 2.0)),
    spec("06_cost", equal_price, "C6",
         {"method": "str", "price": "str", **ESTIMATE, "more": "float", "more_low": "float", "more_high": "float"},
         "Unrefused jailbreaks that each method leaves at a rise of over-refusal of at most 2 and 5 points, and the paired "
         "difference from the tested method"),
    spec("06_places", places, "C6", {"place": "str", **ESTIMATE},
         "Fall of the log-odds of complying where one budget is spent in late, early or middle layers, or at random"),
)
# fmt: on
