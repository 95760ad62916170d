"""The figures of notebook 05."""

from __future__ import annotations

from functools import partial

from helpers import plots, plots_tokens
from helpers.figure_spec import BY_LAYER, ESTIMATE, LOG_ODDS, FigureSpec

SIGNED = f"{LOG_ODDS}; above 0: with the treatment"
HATCHED = "; hatched where the architecture lets no difference arrive"
SPECS = (
    FigureSpec(
        "05_tokens",
        partial(plots_tokens.tokens, unit=SIGNED),
        "C4",
        f"Effect of the residual stream at every token and layer of one pair{HATCHED}",
        {"layer": "int", "position": "int", "token": "str", "earliest": "float", "nie": "float"},
    ),
    FigureSpec(
        "05_groups",
        partial(
            plots_tokens.groups,
            panel="treatment",
            title="Residual stream: where is the signal, layer by layer?",
            unit=SIGNED,
        ),
        "C4",
        f"Effect of each position group's residual stream by layer, one panel a treatment{HATCHED}",
        {"treatment": "str", "group": "str", "earliest": "float", **BY_LAYER},
    ),
    FigureSpec(
        "05_components",
        partial(plots_tokens.groups, panel="site", title="Attention and MLP outputs: who moves it?", unit=SIGNED),
        "C4",
        f"Effect of attention and MLP outputs by position group and layer{HATCHED}",
        {"site": "str", "group": "str", "earliest": "float", **BY_LAYER},
    ),
    FigureSpec(
        "05_hand_over",
        partial(
            plots.panels,
            panel="treatment",
            group="where",
            title="When does the last token take over?",
            unit="share of total effect",
        ),
        "C4",
        "Share of the total effect in the residual stream of the last token, of all others, of the last instruction "
        "token, and of verb and object",
        {"treatment": "str", "where": "str", **BY_LAYER},
    ),
    FigureSpec(
        "05_carriers",
        plots_tokens.carriers,
        "C4",
        "Share of the effect of the last token's residual stream that MLPs, attention and the skip path above carry",
        {"path": "str", **BY_LAYER},
    ),
    FigureSpec(
        "05_timing",
        partial(
            plots.dots,
            row="schedule",
            group="clamp",
            title="When must the last layer be closed?",
            unit="share of harmful answers",
            limits=(-0.05, 1.05),
            below=True,
        ),
        "C5c",
        "Harmful answers to jailbroken prompts with the last layer clamped at different times, with Wilson intervals",
        {"schedule": "str", "clamp": "str", **ESTIMATE},
    ),
    FigureSpec(
        "05_input",
        partial(
            plots.dots,
            row="group",
            group="view",
            title="What is read, and where the signal is",
            unit=LOG_ODDS,
            marks=(0.0,),
            below=True,
        ),
        "C4",
        "Effect of each position group replaced in the prompt, beside that of its activations after the first layer",
        {"group": "str", "view": "str", **ESTIMATE},
    ),
)
