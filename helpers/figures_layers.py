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
        "Flow chart from prompts over pairs, clean runs, effects and statistics to figures and verdicts",
        dict.fromkeys(("step", "what", "file", "notebook"), "str"),
    ),
    FigureSpec(
        "01_tokens",
        drawings.tokens,
        "all",
        "Control and treated prompt of one pair, token under token, coloured by position group",
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
        "Rates of on-topic answers, refusals and harmful answers by prompt suite with Wilson intervals",
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
        "Probability of complying with a harmful request by wrapper, from weak to strong, for every model",
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
        "Total effect of every treatment with intervals; dashed lines mark the gate of 0.5 log-odds",
        {"treatment": "str", "split": "str", **ESTIMATE},
    ),
    FigureSpec(
        "02_grid",
        drawings.grid,
        "all",
        "Cells of the layer by position grid that an intervention recomputes, beside those kept from the clean run",
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
        "What each layer adds to the cumulative share of the total effect, trained model beside its untrained twin",
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
        "Indirect effect of attention and MLP outputs by layer, intervals as bars, simultaneous band shaded",
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
        "Indirect effects of attention and MLP outputs by layer, one panel a treatment",
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
        "Component shares of the total effect for harm, for the mean benign behaviour, and their difference",
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
        "Component shares of the total effect by layer for three seeds each of the windowed and full-attention model",
        {"model": "str", "site": "str", **BY_LAYER},
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
        "Indirect (total) and direct effects of attention and MLP outputs by layer as shares of the total effect",
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
        "NIE0 (sufficiency), NIE1 (necessity) and their difference, the mediated interaction, by layer and module",
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
        "Indirect and direct effect of every attention head at the last token, layer by head",
        {"layer": "int", "head": "int", "effect": "str", **ESTIMATE},
    ),
    FigureSpec(
        "08_claims",
        plots.verdicts,
        "all",
        "Verdict on every claim for every model",
        dict.fromkeys(("model", "claim", "verdict"), "str"),
    ),
)
