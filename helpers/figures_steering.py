"""The figures of notebook 06: steering."""

from __future__ import annotations

from functools import partial

from helpers import plots, plots_steering
from helpers.claims_steering import MARGINS
from helpers.figure_spec import BY_LAYER, ESTIMATE, LOG_ODDS, FigureSpec

CURVE = {"panel": "str", "group": "str", "x": "float", **ESTIMATE}
COSTS = {"over-refusal": "against over-refusal (points)", "KL": "against KL (nats a token)"}
ROWED = {"row": "str", **CURVE}
HARM = "1 - P(refusal) on jailbroken requests"

SPECS = (
    FigureSpec(
        "06_geometry",
        partial(plots_steering.plane, title="Where do prompts lie along rejection and harmfulness?"),
        "C6",
        "Mean positions of prompt groups along the rejection and the harmfulness direction at the decision layer",
        {"group": "str", "projection": "str", **ESTIMATE},
    ),
    FigureSpec(
        "06_laws",
        partial(
            plots_steering.curves,
            panel="panel",
            group="group",
            x_label="position along the direction",
            y_label="coefficient (direction lengths)",
            title="The R-law and the H-law: does the position tell how much steering is needed?",
        ),
        "C6",
        "Coefficient that just changes the answer against the prompt's position, for rejection and for harmfulness",
        CURVE,
    ),
    FigureSpec(
        "06_tradeoff",
        partial(
            plots_steering.curves,
            panel="panel",
            group="group",
            x_label="cost",
            y_label=HARM,
            title="What does each point of harm cost? One point a strength, dashed: the margin",
            margins={COSTS["over-refusal"]: MARGINS["over-refusal"], COSTS["KL"]: MARGINS["KL"]},
        ),
        "C6",
        "Unrefused jailbreaks against over-refusal of borderline prompts and KL on harmless ones, over strengths, by method",
        ROWED,
    ),
    FigureSpec(
        "06_budget",
        partial(
            plots_steering.curves,
            panel="panel",
            group="group",
            x_label="budget: root mean square of the added norm",
            y_label=HARM,
            title="Early, middle or late, with the same budget",
        ),
        "C6",
        "Unrefused jailbreaks against the L2 budget for early, middle and late layers: adaptive, fixed, the last layer's vector",
        CURVE,
    ),
    FigureSpec(
        "06_equal",
        partial(
            plots_steering.curves,
            panel="panel",
            group="group",
            x_label="budget: root mean square of the added norm",
            y_label="share (left), points (right)",
            title="All methods with the same budget",
            log_x=True,
            sharey=False,
        ),
        "C6",
        "Unrefused jailbreaks and over-refusal against the L2 budget, by method: those at all layers, and those at some",
        ROWED,
    ),
    FigureSpec(
        "06_random",
        partial(
            plots_steering.null,
            title="Is the direction better than chance?",
            x_label="fall of the log-odds of complying",
        ),
        "C6",
        "Fall of the log-odds under isotropic and covariance-matched random directions, as histograms, and under the fitted one",
        {"family": "str", "role": "str", "value": "float"},
    ),
    FigureSpec(
        "06_methods",
        partial(
            plots.dots,
            row="method",
            group="measure",
            title="What does each method change?",
            unit="change in share of prompts (percentage points)",
            below=True,
            marks=(-2.0, 2.0),
        ),
        "C6",
        "Change in harmful answers, in refusals of borderline prompts and in right answers to harmless prompts, by method",
        {"method": "str", "measure": "str", **ESTIMATE},
    ),
    FigureSpec(
        "06_families",
        partial(
            plots.dots,
            row="family",
            group="method",
            title="Does a defence hold against wrappers that it was not fitted on?",
            unit="harmful answers (share of prompts), family left out of the fit",
            below=True,
        ),
        "C6",
        "Share of harmful answers by wrapper family, the family left out of fitting and choosing, by method",
        {"family": "str", "method": "str", **ESTIMATE},
    ),
    FigureSpec(
        "06_tiers",
        partial(
            plots_steering.curves,
            panel="panel",
            group="group",
            x_label="wrapper tier (1 weak, 6 strong)",
            y_label="harmful answers (share of prompts)",
            title="Weak and strong wrappers, mild and severe requests",
            apart=0.07,
        ),
        "C6",
        "Share of harmful answers by wrapper tier, one panel a severity, by method",
        CURVE,
    ),
    FigureSpec(
        "06_examples",
        partial(
            plots_steering.curves,
            panel="panel",
            group="group",
            x_label="fitting examples of each kind",
            y_label="cosine, or 1 - P(refusal)",
            title="How many examples does a direction need?",
            log_x=True,
        ),
        "C6",
        "Cosine between directions fitted on two samples, and unrefused jailbreaks, over the number of fitting examples",
        CURVE,
    ),
    FigureSpec(
        "06_mediation",
        partial(
            plots.panels,
            panel="steering",
            group="site",
            title="Is the effect gone, and does another component take over?",
            unit=LOG_ODDS,
        ),
        "C6",
        "Indirect effect of attention and MLP outputs by layer, unsteered and under each kind of steering",
        {"steering": "str", "site": "str", **BY_LAYER},
    ),
    FigureSpec(
        "06_attack",
        partial(
            plots.dots,
            row="method",
            group="attack",
            title="An attacker who knows the defence",
            unit="harmful answers (share of prompts)",
            below=True,
        ),
        "C6",
        "Share of harmful answers under the prompt set's strong wrappers and under the worst disguise that a search found",
        {"method": "str", "attack": "str", **ESTIMATE},
    ),
)
