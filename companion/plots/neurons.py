"""Figures of notebooks 04, 04b and 06: single neurons, growing sets, adjacency, tests of gating, and steering."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from companion.base.thresholds import LINE
from companion.plots import style
from companion.plots.style import ESTIMATE, MARKERS, OKABE_ITO, distinct, heading, legend_below, new_figure, spec

WHOLE = StrMethodFormatter("{x:,.0f}")


def strongest(table: pd.DataFrame) -> Figure:
    """One row a neuron: both directions, and their mean with its interval, as shares of the total effect."""
    figure, ((ax,),) = new_figure(width=7.0, height=1.1 + 0.24 * len(table))
    y, lengths = np.arange(len(table)), style.interval_lengths(table)
    ax.errorbar(table.estimate, y, xerr=lengths, ms=5, label="mean, 95 % interval", **style.mark(0))
    alone = ("nie0", "switched on alone (NIE0)"), ("nie1", "switched off alone (NIE1)")
    for k, (column, label) in enumerate(alone, 1):
        ax.plot(table[column], y, MARKERS[k], color=OKABE_ITO[k], ms=4, ls="none", label=label)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(y, [f"neuron {one}" for one in table.neuron])
    ax.invert_yaxis()
    ax.set_xlabel("share of total effect (right: with the treatment)")
    ax.set_title("How much of the effect does one neuron carry?")
    legend_below(figure, [ax], 3)
    return figure


def fires_on(table: pd.DataFrame) -> Figure:
    """One panel a neuron: its value at the last token of every prompt (a dot each), a row for each kind of prompt."""
    neurons, kinds = distinct(table.neuron), distinct(table.kind)
    figure, axes = new_figure(1, len(neurons), 1.6 * len(neurons) + 2.0, 0.9 + 0.4 * len(kinds), sharey=True)
    for ax, neuron in zip(axes[0], neurons, strict=True):
        for k, kind in enumerate(kinds):
            values = table[(table.neuron == neuron) & (table.kind == kind)].value.to_numpy()
            spread = k + 0.5 * (np.arange(len(values)) * 0.618 % 1 - 0.5)  # the same places at every run
            ax.plot(values, spread, MARKERS[k % 8], color=OKABE_ITO[k % 8], ms=3, alpha=0.5, ls="none")
            ax.plot([np.median(values)] * 2, [k - 0.35, k + 0.35], "-", color="black", lw=2) if len(values) else None
        ax.axvline(0, color="black", lw=0.8)
        ax.set_yticks(range(len(kinds)), kinds)
        ax.set_title(f"neuron {neuron}", fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(3))
    axes[0, 0].invert_yaxis()
    figure.supxlabel("neuron's value at the last token (bar: median)", fontsize=9)
    heading(figure, "What do the strongest neurons fire on: harm, or the wrapper?")
    return figure


def set_curves(table: pd.DataFrame) -> Figure:
    """Joint effect of growing sets as a share of the whole layer's; the band of k90 shaded, a thin line at each order's."""
    figure, ((ax,),) = new_figure(width=7.0, height=3.6)
    for k, (label, line) in enumerate(table.groupby("series", sort=False)):
        colour, marker = OKABE_ITO[k % 8], MARKERS[k % 8]
        ax.plot(line.k, line.estimate, marker=marker, color=colour, ms=3, lw=1.2, label=str(label))
        ax.fill_between(line.k, line.low, line.high, color=colour, alpha=0.2, lw=0)
        if np.isfinite(k90 := float(line.k90.iloc[0])):
            ax.axvline(k90, color=colour, lw=0.9, ls="--")
            looks = {"ha": "right", "fontsize": 8, "color": colour, "bbox": {"fc": "white", "ec": "none", "pad": 1}}
            where = ax.get_xaxis_transform()
            ax.text(k90 * 0.97, 0.1 - 0.08 * k, f"{label}: k90 = {k90:,.0f}", transform=where, **looks)
    ax.axhspan(0.9, 1.1, color="#999999", alpha=0.25, lw=0, label="within 10 % of the whole layer")
    ax.axhline(0, color="black", lw=0.8)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(WHOLE)
    ax.set(xlabel="neurons changed together", ylabel="share of the whole layer's effect\n(bands: 95 % intervals)")
    ax.set_title(f"How many neurons does {style.contrast(table)} take? (ranked on discover, measured on test)")
    if len(bounded := table[np.isfinite(table.estimate)]):  # the bands whole, unless they would flatten the curves
        inside = bounded.estimate.min() - 1.0, bounded.estimate.max() + 1.0
        ends = max(bounded.low.min(), inside[0]), min(bounded.high.max(), inside[1])
        low, high = min(-0.2, ends[0] - 0.1), max(1.3, ends[1] + 0.1)
        ax.set_ylim(low - 0.15 * (high - low), high)  # room below for what the thin lines say
    ax.legend(fontsize=8, loc="upper left")
    return figure


def sparsity(table: pd.DataFrame) -> Figure:
    """k90 with intervals, one row a behaviour, on a logarithmic axis; shaded is what C5a calls few."""
    named = table.assign(row=[textwrap.fill(f"{one.behaviour}: {one.words}", 34) for one in table.itertuples()])
    rows, few = distinct(named.row), int(table.few.iloc[0])
    figure, ((ax,),) = new_figure(width=7.0, height=1.2 + 0.32 * len(rows))
    style.draw_dots(ax, named, "row", "quantity", rows, distinct(table.quantity))
    ax.axvspan(0.5, few, color="#999999", alpha=0.25, lw=0)
    ax.axvline(few, color="black", lw=0.9, ls="--", label=f"C5a asks for k90 of at most {few} neurons (shaded)")
    ends = table[["estimate", "high"]].to_numpy()
    ax.set(xscale="log", xlim=(1, 1.3 * max(few, *ends[np.isfinite(ends)])))
    ax.xaxis.set_major_formatter(WHOLE)
    ax.set_xlabel("neurons that hold 90 % of the last MLP's share (k90)")
    ax.set_title("Does harm need fewer neurons than harmless choices?")
    legend_below(figure, [ax], 2)
    return figure


def permutations(table: pd.DataFrame) -> Figure:
    """Moran's I under permuted indices as a histogram, the model's own with its interval, and the claim's threshold."""
    figure, ((ax,),) = new_figure(width=6.0, height=2.9)
    bars = {"align": "edge", "color": OKABE_ITO[5], "ec": "white", "lw": 0.3, "label": "random orders"}
    ax.bar(table.start, table["count"], table.end - table.start, **bars)
    own, height = table.iloc[0], 0.5 * float(table["count"].max())
    ends = np.clip([own.observed - own.least, own.most - own.observed], 0, None)[:, None]
    look = {"fmt": "D", "color": OKABE_ITO[1], "ms": 5, "capsize": 3}
    ax.errorbar([own.observed], [height], xerr=ends, **look, label="this model, with interval (other prompts, too)")
    ax.axvline(0.05, color="black", lw=0.9, ls="--", label="asked by C7")
    ax.set(xlabel="Moran's I of rank |effect|", ylabel="random orders", title="Are neighbours more alike than chance?")
    legend_below(figure, [ax], ncols=3)
    return figure


def cells(table: pd.DataFrame) -> Figure:
    """The four outcomes of each factorial against both switches off: one line for each state of the second switch."""
    forms = distinct(table.form)
    figure, axes = new_figure(1, len(forms), max(5.0, 1.45 * len(forms) + 0.4), 3.0, sharey=True)
    for ax, form in zip(axes[0], forms, strict=True):
        for k, (state, line) in enumerate(table[table.form == form].groupby("second")):
            style.points(ax, line["first"].to_numpy() + 0.04 * k, line, k, f"second switch {'on' if state else 'off'}")
        ax.axhline(0, color="black", lw=0.6)
        ax.set_xticks([0, 1], ["off", "on"])
        ax.set(xlim=(-0.3, 1.35), xlabel="first switch")
        ax.set_title(textwrap.fill(str(form), 18), fontsize=8)
    axes[0, 0].set_ylabel(style.LOG_ODDS)
    legend_below(figure, axes[0, :1], 2)
    heading(figure, "Parallel lines add, fanning lines gate: what do both switches do?")
    return figure


def laws(table: pd.DataFrame) -> Figure:
    """Coefficients over positions, one panel a law: fifths of each kind of prompts, and the fitted law with its band."""
    panels, groups = sorted(distinct(table.panel)), [name for name in distinct(table.group) if name != LINE]
    figure, axes = new_figure(1, len(panels), 7.0, 3.0, sharey=True)
    for ax, panel in zip(axes[0], panels, strict=True):
        here = table[table.panel == panel]
        line = here[here.group == LINE]
        ax.fill_between(line.x, line.low, line.high, color="#999999", alpha=0.3, lw=0)
        ax.plot(line.x, line.estimate, color="black", lw=1.4, label=LINE if len(line) else None)
        for k, name in enumerate(groups):
            if len(part := here[here.group == name]):
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
    figure, ((left, right),) = new_figure(1, 2, 7.0, 1.3 + len(rows) * 0.3, sharey=True)
    style.draw_dots(left, table, "method", "price", rows, prices)
    differ = table.assign(estimate=table.more, low=table.more_low, high=table.more_high)
    style.draw_dots(right, differ, "method", "price", rows, prices)
    right.invert_yaxis()  # the axes share it, and each turned it round
    right.axvline(0, color="black", lw=0.9)
    left.set_xlabel("1 - P(refusal) on jailbroken requests")
    right.set_xlabel("difference from the tested method")
    style.legend_below(figure, [left], len(prices))
    heading(figure, "How much harm is left where over-refusal may rise by so much?")
    return figure


def places(table: pd.DataFrame) -> Figure:
    """Falls of the log-odds at one budget: a row a place or kind of direction, with an interval or one mark a draw."""
    rows = distinct(table.place)
    figure, ((ax,),) = new_figure(width=7.0, height=1.0 + 0.36 * len(rows))
    for k, row in enumerate(rows):
        part = table[table.place == row]
        look = style.mark(k) | ({"alpha": 1.0, "ms": 6} if len(part) == 1 else {"alpha": 0.5, "ms": 4})
        ax.errorbar(part.estimate, np.full(len(part), k), xerr=style.interval_lengths(part), **look)
    ax.axvline(0, color=OKABE_ITO[6], lw=0.8)
    ax.set_yticks(range(len(rows)), [str(row) for row in rows])
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel="fall of the log-odds of complying on jailbroken requests (log-odds)")
    heading(figure, "Does the same budget do as much in other layers, or in a random direction?")
    return figure


# fmt: off
SPECS = (
    spec("04_strongest", strongest, "C5a", {"neuron": "int", "nie0": "float", "nie1": "float", **ESTIMATE},
         "Exact effects of the strongest last-layer neurons, alone, in both directions, as shares of the total effect"),
    spec("04_fires_on", fires_on, "C5a", {"neuron": "int", "kind": "str", "value": "float", "prompt": "str"},
         "Values of the strongest last-layer neurons at the last token of harmful and harmless requests in both wrappers"),
    spec("04_curves", set_curves, "C5a", {"series": "str", "k": "int", "k90": "float", **ESTIMATE, "of": "str"},
         "Joint effect of the top k last-layer neurons as a share of the whole layer's, against random order, with a thin line "
         "where each order holds nine tenths for good (k90)"),
    spec("04_sparsity", sparsity, "C5a",
         {**dict.fromkeys(("behaviour", "words", "quantity"), "str"), **ESTIMATE, "few": "int"},
         "Number of last-layer neurons that hold nine tenths of the layer's effect on a logarithmic axis, for harm and for each "
         "benign behaviour in words; the few that C5a allows are shaded at the left"),
    spec("04_moran", permutations, "C7", dict.fromkeys(("start", "end", "count", "observed", "least", "most"), "float"),
         "Moran's I of rank |effect| along the neuron index, against its values under permuted indices"),
    spec("04b_cells", cells, "C5b", {"form": "str", "first": "int", "second": "int", **ESTIMATE},
         "Mean outcome of the four cells of each factorial, as changes from the cell with both switches off"),
    spec("04b_indices", style.dots, "C5b", {"form": "str", "state": "str", **ESTIMATE},
         "Signed gate index of every form, and whether enough is at stake for it to be defined",
         row="form", group="state", title="Gate (1), contributor (0), or either one (-1)?",
         unit="signed gate index (share of the whole effect)", marks=(-0.6, -0.2, 0.2, 0.6), limits=(-1.6, 1.6), below=True),
    spec("06_laws", laws, "C6", {"panel": "str", "group": "str", "x": "float", **ESTIMATE},
         "Coefficient that a prompt needs to be refused, and the one that it tolerates, over its position, with the fitted laws"),
    spec("06_methods", style.dots, "C6", {"method": "str", "measure": "str", **ESTIMATE},
         "Change in harmful answers, in refusals of borderline prompts and in right answers to harmless prompts, by method",
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
