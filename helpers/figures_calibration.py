"""The figures of notebook 07."""

from __future__ import annotations

from functools import partial

from helpers import plots, plots_calibration
from helpers.figure_spec import ESTIMATE, FigureSpec

COUNTS = {"hits": "int", "n": "int", **ESTIMATE}
SPECS = (
    FigureSpec(
        "07_confusion",
        plots_calibration.confusion,
        "all",
        "Counts of verdicts by what is true in compiled models, one matrix a claim",
        {**dict.fromkeys(("claim", "truth", "verdict"), "str"), **COUNTS},
    ),
    FigureSpec(
        "07_severity",
        plots_calibration.severity,
        "all",
        "How often a claim that is false in a given way is still called supported, claims by kinds of models",
        {**dict.fromkeys(("claim", "kind"), "str"), **COUNTS},
    ),
    FigureSpec(
        "07_errors",
        partial(
            plots.dots,
            row="claim",
            group="error",
            title="How often does a verdict say the opposite of the truth?",
            unit="share of draws with exact 95 % interval",
            marks=(0.05,),
            below=True,
        ),
        "all",
        "Rates of false support and false contradiction by claim with exact intervals; the dashed line is 5 %",
        {**dict.fromkeys(("claim", "error"), "str"), **COUNTS},
    ),
    FigureSpec(
        "07_split",
        partial(
            plots.dots,
            row="claim",
            group="error",
            title="Is it the sample or the rule that errs?",
            unit="share of draws with exact 95 % interval",
            below=True,
        ),
        "all",
        "Sampling error, construct error and silence of the population verdict, by claim",
        {**dict.fromkeys(("claim", "error"), "str"), **COUNTS},
    ),
    FigureSpec(
        "07_power_topics",
        partial(
            plots_calibration.rates, x="topics", unit="topics in the prompt set", title="How many topics does a verdict need?"
        ),
        "all",
        "Share of right verdicts against the number of topics, one panel a claim",
        {**dict.fromkeys(("claim", "truth"), "str"), "topics": "int", **COUNTS},
    ),
    FigureSpec(
        "07_power_effect",
        partial(
            plots_calibration.rates, x="log_odds", unit="total effect (log-odds)", title="How large must the effect be?"
        ),
        "all",
        "Share of right verdicts against the size of the total effect, one panel a claim",
        {**dict.fromkeys(("claim", "truth"), "str"), "log_odds": "float", **COUNTS},
    ),
    FigureSpec(
        "07_coverage",
        partial(
            plots.dots,
            row="quantity",
            group="claim",
            title="Do 95 % intervals hold the population value?",
            unit="share of draws with exact 95 % interval",
            marks=(0.93, 0.97),
            below=True,
        ),
        "all",
        "Share of draws whose interval holds the value in a large sample, by quantity; dashed lines at 93 % and 97 %",
        {**dict.fromkeys(("claim", "quantity"), "str"), **COUNTS},
    ),
    FigureSpec(
        "07_estimators",
        plots_calibration.estimators,
        "all",
        "How well each estimator finds components, neurons and the decision of the mechanism: left by ranking members above all "
        "others, right by the share of members among as many at the top",
        {**dict.fromkeys(("measure", "estimator", "what"), "str"), **ESTIMATE, "models": "int"},
    ),
    FigureSpec(
        "07_gate_roc",
        plots_calibration.roc,
        "C5b",
        "Share of models with a gate against share without one above each threshold of the index, one curve a form of the index: "
        "how far a curve bends to the upper left says how well that form tells them apart",
        {"score": "str", **dict.fromkeys(("false_rate", "true_rate", "auroc", "auroc_low", "auroc_high"), "float")},
    ),
    FigureSpec(
        "07_plants",
        plots_calibration.plants,
        "all",
        "Kinds of fine-tuned plants by attention and MLP outputs of every layer, left what passes through them, right what they "
        "write; frames mark where each plant was trained, and the strong colours often lie elsewhere",
        {**dict.fromkeys(("kind", "effect", "component"), "str"), "learned": "bool", **ESTIMATE},
    ),
)  # fmt: skip
