"""Figures of notebook 07: matrices of counts, and rates against sample size or effect."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from companion.plots import style
from companion.plots.style import ESTIMATE, OKABE_ITO, distinct, heading, spec

SHADE = "Blues"


def _matrix(
    ax: Axes, table: pd.DataFrame, row: str, column: str, rows: list[str], columns: list[str], of: str = "/"
) -> None:
    """Shares as shades of one colour with counts in the cells; cells that were never drawn stay blank."""
    share = np.full((len(rows), len(columns)), np.nan)
    for one in table.itertuples():
        at = rows.index(getattr(one, row)), columns.index(getattr(one, column))
        if one.n:
            share[at] = one.estimate
            ink = "white" if one.estimate > 0.6 else "black"
            ax.text(at[1], at[0], f"{one.hits}{of}{one.n}", ha="center", va="center", fontsize=7, color=ink)
    ax.imshow(share, cmap=SHADE, vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)


def _claim_panels(n: int, height: float, around: float) -> tuple[Figure, np.ndarray]:
    """Panels of one size for `n` claims, at most five in a row; `height` of one and `around` all of them in inches."""
    n_columns = min(5, n)
    n_rows = -(-n // n_columns)
    size = 1.9 * n_columns + 0.8, height * n_rows + around
    return style.new_figure(n_rows, n_columns, *size, sharex=True, sharey=True)


def confusion(table: pd.DataFrame) -> Figure:
    """One matrix a claim: what is true by construction (rows) against what the pipeline said (columns)."""
    drawn = table[table.n > 0]  # a truth of which nothing was drawn is no row
    truths = distinct(drawn.truth if len(drawn) else table.truth)
    claims, verdicts = (distinct(table[name]) for name in ("claim", "verdict"))
    figure, axes = _claim_panels(len(claims), 1.9, 0.6)
    for ax, claim in zip(axes.flat, claims, strict=False):
        part = table[(table.claim == claim) & table.truth.isin(truths)]
        _matrix(ax, part, "truth", "verdict", truths, verdicts, of="\n/")
        ax.set_title(claim)
    for ax in axes.flat[len(claims) :]:  # nothing but the names of the columns above
        ax.set_xticks(range(len(verdicts)), verdicts, rotation=40, ha="right")
        ax.tick_params(left=False, bottom=False)
        ax.spines[:].set_visible(False)
        ax.grid(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("built to be (shares)")
    heading(figure, "How often is each verdict right? Truth against verdict, claim by claim")
    return figure


def severity(table: pd.DataFrame) -> Figure:
    """Claims by ways of being false: how often the pipeline still said "supported"."""
    claims, kinds = distinct(table.claim), sorted(dict.fromkeys(table.kind))
    figure, axes = style.new_figure(width=3.0 + 0.48 * len(kinds), height=1.6 + 0.3 * len(claims))
    _matrix(axes[0, 0], table, "claim", "kind", claims, kinds)
    axes[0, 0].set_xlabel("how the claim is false (shade: share of draws)")
    axes[0, 0].set_title('If the claim were false in this way, how often would we still say "supported"?')
    return figure


def rates(table: pd.DataFrame, *, x: str, unit: str, title: str) -> Figure:
    """Rates with exact intervals against a number, one panel a claim, one line a truth; dashed at 0.8."""
    claims, truths = distinct(table.claim), distinct(table.truth)
    figure, axes = _claim_panels(len(claims), 1.8, 0.9)
    apart = 0.012 * (table[x].max() - table[x].min() or 10)  # so that the two intervals at one number are both seen
    for ax, claim in zip(axes.flat, claims, strict=False):
        for k, truth in enumerate(truths):
            part = table[(table.claim == claim) & (table.truth == truth)].sort_values(x)
            if len(part):
                style.points(ax, part[x].to_numpy() + apart * (2 * k - 1), part, k, f"the claim is {truth}")
        ax.axhline(0.8, color="black", lw=0.8, ls="--")
        ax.set_ylim(-0.05, 1.05)
        ax.margins(x=0.1 if table[x].nunique() > 1 else 1)
        if table[x].nunique() <= 5:  # few numbers that were chosen: name each
            ax.set_xticks(sorted(set(table[x])))
        ax.set_title(claim)
    for ax in axes.flat[len(claims) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, len(claims) - axes.shape[1]) : len(claims)]:
        ax.tick_params(labelbottom=True)
    for ax in axes[-1]:
        ax.set_xlabel(unit)
    for ax in axes[:, 0]:
        ax.set_ylabel("share of right verdicts")
    style.legend_below(figure, axes.flat, 2)
    heading(figure, title)
    return figure


def estimators(table: pd.DataFrame) -> Figure:
    """One panel a measure: how well each estimator (rows) finds what was built (symbols); dashed where all is found."""
    measures, rows, groups = (distinct(table[name]) for name in ("measure", "estimator", "what"))
    figure, axes = style.new_figure(1, len(measures), 3.7 * len(measures) + 0.8, 1.5 + 0.32 * len(rows), sharey=True)
    for ax, measure in zip(axes[0], measures, strict=True):
        style.draw_dots(ax, table[table.measure == measure], "estimator", "what", rows, groups)
        ax.axvline(1.0, color="black", lw=0.9, ls="--")
        ax.set_xlim(-0.04, 1.04)
        ax.set_xlabel("share, mean over models")
        ax.set_title(measure)
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)  # shared, so one panel's turn would undo another's
    style.legend_below(figure, axes[0], len(groups))
    heading(figure, "Which estimator finds what was built?")
    return figure


def roc(table: pd.DataFrame) -> Figure:
    """One stepped curve a score: share of true cases above a threshold against that of false ones; the area in the legend."""
    figure, axes = style.new_figure(width=8.2, height=3.6)
    ax = axes[0, 0]
    for k, (score, part) in enumerate(table.groupby("score", sort=False)):
        first, dashes = part.iloc[0], ("-", "--", "-.", ":")[k % 4]
        label = f"{score} ({first.auroc:.2f} [{first.auroc_low:.2f}, {first.auroc_high:.2f}])"
        ax.step(part.false_rate, part.true_rate, where="post", label=label, color=OKABE_ITO[k % 8], ls=dashes, lw=1.6)
    ax.plot([0, 1], [0, 1], color="#999999", lw=0.8, ls=":")
    ax.set_aspect("equal")
    ax.set_xlabel("share of models without a gate, above the threshold")
    ax.set_ylabel("share of models with one")
    ax.set_title("Does the gate index tell gates from contributors?")
    area = "index (area under the curve, 95 % interval)"
    ax.legend(title=area, loc="upper left", bbox_to_anchor=(1.05, 1.0), fontsize=8)
    return figure


def plants(table: pd.DataFrame) -> Figure:
    """Kinds of plants by components, one panel an effect: shares as colours, framed where the plant learned.

    A number stands where all seeds agree on a share beyond 0.05.
    """
    kinds, effects = (distinct(table[name]) for name in ("kind", "effect"))
    columns = distinct(table.component)
    figure, axes = style.new_figure(1, len(effects), 4.6 * len(effects) + 1.6, 1.3 + 0.32 * len(kinds), sharey=True)
    for ax, effect in zip(axes[0], effects, strict=True):
        part = table[table.effect == effect]
        grid = part.pivot(index="kind", columns="component", values="estimate").loc[kinds, columns].to_numpy()
        image = ax.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for row in part.itertuples():
            x, y = columns.index(str(row.component)), kinds.index(str(row.kind))
            if row.low > 0.05 or row.high < -0.05:  # all seeds agree
                ink = "white" if abs(row.estimate) > 0.6 else "black"
                ax.text(x, y, f"{row.estimate:.1f}", ha="center", va="center", fontsize=6.5, color=ink)
            if row.learned:
                ax.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, ec="black", lw=1.4))
        ax.set_xticks(range(len(columns)), columns, rotation=90)
        ax.set_yticks(range(len(kinds)), kinds)
        ax.grid(False)
        ax.set_title(effect)
        ax.set_xlabel("component at the last token")
    figure.colorbar(image, ax=axes[0].tolist(), label="share of total effect", shrink=0.8)
    heading(figure, "Where a plant learned (framed), and where mediation sees it")
    return figure


COUNTS = {"hits": "int", "n": "int", **ESTIMATE}
# fmt: off
SPECS = (
    spec("07_confusion", confusion, "all", {**dict.fromkeys(("claim", "truth", "verdict"), "str"), **COUNTS},
         "Counts of verdicts by what is true in compiled models, one matrix a claim"),
    spec("07_severity", severity, "all", {**dict.fromkeys(("claim", "kind"), "str"), **COUNTS},
         "How often a claim that is false in a given way is still called supported, claims by kinds of models"),
    spec("07_errors", style.dots, "all", {**dict.fromkeys(("claim", "error"), "str"), **COUNTS},
         "Rates of false support and false contradiction by claim with exact intervals; the dashed line is 5 %",
         row="claim", group="error", title="How often does a verdict say the opposite of the truth?",
         unit="share of draws with exact 95 % interval", marks=(0.05,), below=True),
    spec("07_split", style.dots, "all", {**dict.fromkeys(("claim", "error"), "str"), **COUNTS},
         "Sampling error, construct error and silence of the population verdict, by claim",
         row="claim", group="error", title="Is it the sample or the rule that errs?",
         unit="share of draws with exact 95 % interval", below=True),
    spec("07_power_topics", rates, "all", {**dict.fromkeys(("claim", "truth"), "str"), "topics": "int", **COUNTS},
         "Share of right verdicts against the number of topics, one panel a claim",
         x="topics", unit="topics in the prompt set", title="How many topics does a verdict need?"),
    spec("07_power_effect", rates, "all", {**dict.fromkeys(("claim", "truth"), "str"), "log_odds": "float", **COUNTS},
         "Share of right verdicts against the size of the total effect, one panel a claim",
         x="log_odds", unit="total effect (log-odds)", title="How large must the effect be?"),
    spec("07_coverage", style.dots, "all", {**dict.fromkeys(("claim", "quantity"), "str"), **COUNTS},
         "Share of draws whose interval holds the value in a large sample, by quantity; dashed lines at 93 % and 97 %",
         row="quantity", group="claim", title="Do 95 % intervals hold the population value?",
         unit="share of draws with exact 95 % interval", marks=(0.93, 0.97), below=True),
    spec("07_estimators", estimators, "all",
         {**dict.fromkeys(("measure", "estimator", "what"), "str"), **ESTIMATE, "models": "int"},
         "How well each estimator finds components, neurons and the decision of the mechanism: left by ranking members "
         "above all others, right by the share of members among as many at the top"),
    spec("07_gate_roc", roc, "C5b",
         {"score": "str", **dict.fromkeys(("false_rate", "true_rate", "auroc", "auroc_low", "auroc_high"), "float")},
         "Share of models with a gate against share without one above each threshold of the index, one curve a form of "
         "the index: how far a curve bends to the upper left says how well that form tells them apart"),
    spec("07_plants", plants, "all",
         {**dict.fromkeys(("kind", "effect", "component"), "str"), "learned": "bool", **ESTIMATE},
         "Kinds of fine-tuned plants by attention and MLP outputs of every layer, left what passes through them, right "
         "what they write; frames mark where each plant was trained, and the strong colours often lie elsewhere"),
)
# fmt: on
