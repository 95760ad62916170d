"""Patches on one pair: which cells they recompute, and what they do.

What an intervention costs is the cells above it and to its right.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from companion.mediation.estimands import measure_effects, mediators, prompt_tokens, run_clean
from companion.mediation.outcomes import log_odds
from companion.mediation.study import Study
from companion.mediation.tokens import earliest_layers, recomputed_cells
from companion.prompts.positions import distance, token_labels
from companion.prompts.tokens import TokenPair

__all__ = ["distance_and_earliest_layer", "effects_of_pair", "log_odds", "prompt_tokens", "recomputed_grid", "run_clean",
           "shares_of_pair"]  # fmt: skip


def effects_of_pair(
    study: Study, pair: TokenPair, sites: Sequence[str], outcomes: Sequence[str] = ("Y1",)
) -> pd.DataFrame:
    """All effects of one pair at the last token: a row for each site and layer, with the four cells beside them.

    Sites are names such as "resid_post", "attn_out", "mlp_out", "mlp_out.direct". Units are log-odds.
    """
    return measure_effects(study.subject, [pair], study.openers, mediators(study.subject, sites), outcomes)


def shares_of_pair(study: Study, pair: TokenPair, sites: Sequence[str]) -> pd.DataFrame:
    """Share of the pair's total effect, the mean of both directions: layers (rows) by sites (columns).

    A share of 1 in the last layer's residual stream is true of any network.
    """
    table = effects_of_pair(study, pair, sites)
    return table.assign(share=(table.nie0 + table.nie1) / 2 / table.te).pivot(
        index="layer", columns="site", values="share"
    )


def recomputed_grid(study: Study, pair: TokenPair, layer: int) -> pd.DataFrame:
    """Which cells two patches recompute, for a drawing: one at the first token that differs, one at the last token.

    Columns: panel, layer, position, state, token. `layer` is that of the patch at the last token.
    """
    first = int((pair.control != pair.treated).nonzero()[0][0])
    corners = {"a wrapper token, layer 1": (1, first), "last token, middle layer": (layer, len(pair.control) - 1)}
    return recomputed_cells(study.subject.n_layers, token_labels(pair, "treated", study.subject.tokenizer), corners)


def distance_and_earliest_layer(study: Study, pair: TokenPair) -> tuple[int, int | None]:
    """How many tokens before the last one the prompts differ, and the first layer in which that can have arrived.

    The layer follows from the attention masks alone: where it is late, "late" is a fact about the architecture.
    """
    return distance(pair), earliest_layers(run_clean(study.subject, [pair]).control, [pair])[0]
