"""Patches on one pair, and what they do.

What an intervention costs are the cells above it and to its right.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from companion.base.display import NotDefined
from companion.base.thresholds import COMPONENTS
from companion.mediation.estimands import measure_effects, mediators, run_clean
from companion.mediation.outcomes import log_odds
from companion.mediation.study import Study
from companion.prompts.tokens import TokenPair

__all__ = ["component_map", "effects_of_pair", "log_odds", "run_clean"]


def effects_of_pair(
    study: Study, pair: TokenPair, sites: Sequence[str], outcomes: Sequence[str] = ("Y1",)
) -> pd.DataFrame:
    """All effects of one pair at the last token: a row for each site and layer, with the four cells beside them.

    Sites are names such as "resid_post", "attn_out", "mlp_out", "mlp_out.direct". Units are log-odds.
    """
    return measure_effects(study.subject, [pair], study.openers, mediators(study.subject, sites), outcomes)


def component_map(study: Study, pair: TokenPair | NotDefined) -> pd.DataFrame | NotDefined:
    """Share of a pair's total effect in each layer's attention and MLP output at the last token: columns layer, site, share.

    The mean of both directions. A pair of your own that is not defined gives its reason.
    """
    if isinstance(pair, NotDefined):
        return pair
    table = effects_of_pair(study, pair, COMPONENTS)
    return table.assign(share=(table.nie0 + table.nie1) / 2 / table.te)[["layer", "site", "share"]]
