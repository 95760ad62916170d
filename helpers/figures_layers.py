"""The figures of notebooks 00 to 03 and 08."""

from __future__ import annotations

from functools import partial

from helpers import drawings, plots
from helpers.figure_spec import BY_LAYER, ESTIMATE, LOG_ODDS, FigureSpec

SPECS = (
    FigureSpec(
        "00_pipeline",
        drawings.pipeline,
        "all",
        "Seven boxes in a row, prompts, pairs, clean runs, effects, statistics, verdicts and figures, each with the file that it "
        "leaves and the notebook that makes it; arrows lead to the right only",
        dict.fromkeys(("step", "what", "file", "notebook"), "str"),
    ),
    FigureSpec(
        "00_estimands",
        drawings.estimands,
        "all",
        "The four cells as corners of a square: prompt control above, treated below, mediator control left, treated right. "
        "Arrows along the upper and lower edge are NIE0 and NIE1, down the left and right edge NDE0 and NDE1, the diagonal is TE",
        dict.fromkeys(("estimand", "from_cell", "to_cell", "reads"), "str"),
    ),
    FigureSpec(
        "01_tokens",
        drawings.tokens,
        "all",
        "Control and treated prompt of one pair, token under token, coloured by position group from system turn to last token; "
        "only outlined tokens differ, all others are the same in both prompts",
        {"position": "int", **dict.fromkeys(("group", "control", "treated"), "str"), "differ": "bool"},
    ),
    FigureSpec(
        "01_behaviours",
        partial(
            plots.dots,
            row="suite",
            group="label",
            title="What does the model do with each kind of prompt?",
            unit="share of answers, greedy decoding",
        ),
        "all",
        "Rates of on-topic answers, refusals and harmful answers with Wilson intervals, one row for each kind of prompt from "
        "harmless over plainly harmful and wrapped to never seen",
        {"suite": "str", "label": "str", **ESTIMATE},
    ),
    FigureSpec(
        "01_wrappers",
        partial(
            plots.dots,
            row="wrapper",
            group="model",
            title="How strong is each wrapper?",
            unit="mean P(comply) at the first answer token",
            marks=(0.5,),
        ),
        "all",
        "Probability of complying with a harmful request, one row a wrapper from none to the strongest, one symbol a model; "
        "a dashed line marks one half",
        {"wrapper": "str", "model": "str", **ESTIMATE},
    ),
    FigureSpec(
        "01_total_effects",
        partial(
            plots.dots,
            row="treatment",
            group="split",
            title="Is there an effect to mediate?",
            unit="total effect (log-odds)",
            marks=(-0.5, 0.5),
        ),
        "all",
        "Total effect of every treatment in log-odds with intervals, discover, validate and test side by side; dashed lines mark "
        "the gate at 0.5 to either side of 0",
        {"treatment": "str", "split": "str", **ESTIMATE},
    ),
    FigureSpec(
        "02_grid",
        drawings.grid,
        "all",
        "Two grids of cells, layer by position: a patch at a wrapper token changes all cells above and to the right of it, a "
        "patch at the last token only the column above it; the rest is kept from the clean run",
        {"panel": "str", "layer": "int", "position": "int", "state": "str", "token": "str"},
    ),
    FigureSpec(
        "02_cumulative",
        plots.cumulative,
        "C1",
        "Share of the total effect in the last-token residual stream after each layer, trained model beside its "
        "untrained twin: both end at 1",
        {"model": "str", "earliest": "float", **BY_LAYER},
    ),
    FigureSpec(
        "02_increments",
        partial(
            plots.by_layer,
            group="model",
            title="Which layer adds what to the curve?",
            unit="increment (share of total effect)",
        ),
        "C1",
        "What each layer adds to the cumulative share of the total effect, trained model beside its untrained twin, with "
        "intervals that tell whether the two differ in any layer",
        {"model": "str", **BY_LAYER},
    ),
    FigureSpec(
        "02_components",
        partial(
            plots.by_layer,
            group="site",
            title="Where does the effect pass at the last token?",
            unit=LOG_ODDS,
        ),
        "C1",
        "Indirect effect of attention and MLP outputs at the last token by layer, in log-odds; bars are pointwise intervals, the "
        "shaded band holds for all cells at once",
        {"site": "str", **BY_LAYER, "band_low": "float", "band_high": "float"},
    ),
    FigureSpec(
        "02_treatments",
        partial(
            plots.panels,
            panel="treatment",
            group="site",
            title="Recognition (T1), generation (T2), wrapper alone (T2b), and the contrast",
            unit=LOG_ODDS,
        ),
        "C1",
        "Indirect effects of attention and MLP outputs by layer, one panel for recognition (T1), generation (T2), the wrapper on "
        "a harmless request (T2b) and the contrast T2 - T2b; up is towards complying",
        {"treatment": "str", "site": "str", **BY_LAYER},
    ),
    FigureSpec(
        "02_benign",
        partial(
            plots.panels,
            panel="contrast",
            group="site",
            title="Is harm later than any other first-token decision?",
            unit="share of total effect",
        ),
        "C1",
        "Shares of the total effect by layer for attention and MLP outputs in three panels: harm, the mean benign behaviour, and "
        "harm minus benign, which is flat at 0 where harm is decided like anything else",
        {"contrast": "str", "site": "str", **BY_LAYER},
    ),
    FigureSpec(
        "02_models",
        partial(
            plots.panels,
            panel="model",
            group="site",
            title="Does the picture hold over seeds, and without the sliding window?",
            unit="share of total effect",
        ),
        "C1",
        "Shares of the total effect by layer for attention and MLP outputs, one panel a model: seeds of the windowed model, then "
        "of the same model with full attention",
        {"model": "str", "site": "str", **BY_LAYER},
    ),
    FigureSpec(
        "02_computed",
        partial(
            plots.panels,
            panel="panel",
            group="site",
            title="What is passed on, and what is computed?",
            unit="share of total effect",
        ),
        "C1",
        "Attention and MLP outputs by layer, for each model what passes through them beside what they compute from wrapper and "
        "request together, which few components do",
        {"panel": "str", "site": "str", **BY_LAYER},
    ),
    FigureSpec(
        "03_total_direct",
        partial(
            plots.panels,
            panel="effect",
            group="site",
            title="Passing through is not writing: indirect against direct effects",
            unit="share of total effect",
        ),
        "C2",
        "Attention and MLP outputs by layer in two panels, left what passes through them (indirect effects), right what they "
        "write themselves (direct effects), both as shares of the total effect",
        {"effect": "str", "site": "str", **BY_LAYER},
    ),
    FigureSpec(
        "03_normalised",
        partial(
            plots.dots,
            row="normalisation",
            group="effect",
            title="Does MLP beat attention under every normalisation?",
            unit="MLP share of positive component effects",
            marks=(0.5, 0.6),
            limits=(-0.3, 1.3),
        ),
        "C2",
        "MLP share of direct and of indirect effects: raw, per unit of patch norm, per parameter, and robustness checks",
        {"normalisation": "str", "effect": "str", **ESTIMATE},
    ),
    FigureSpec(
        "03_directions",
        partial(
            plots.panels,
            panel="site",
            group="estimand",
            title="Sufficient, necessary, or only together?",
            unit=LOG_ODDS,
        ),
        "C2",
        "By layer, one panel for attention and one for MLP outputs: NIE0 (sufficient), NIE1 (necessary), and NIE1 - NIE0, the "
        "interaction, above 0 where a component needs others and below where others would do",
        {"site": "str", "estimand": "str", **BY_LAYER},
    ),
    FigureSpec(
        "03_heads",
        partial(
            plots.heatmap,
            row="layer",
            column="head",
            panel="effect",
            title="Which heads carry the effect, and which write it?",
            unit=LOG_ODDS,
        ),
        "C2",
        "Two maps of attention heads, layer by head, indirect and direct effect on one scale from against to with the treatment; "
        "a dot marks an interval that excludes 0",
        {"layer": "int", "head": "int", "effect": "str", **ESTIMATE},
    ),
    FigureSpec(
        "08_claims",
        plots.verdicts,
        "all",
        "Table of verdicts, a row for each model and a column for each claim, by colour and letter: supported, contradicted, "
        "inconclusive or not testable",
        dict.fromkeys(("model", "claim", "verdict"), "str"),
    ),
)
