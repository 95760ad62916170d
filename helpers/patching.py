"""Patches on one pair: what single and joint patches do.

`interchange` and `Patch` are the exact replay itself: what an intervention costs is the cells above it and to its right.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from companion.base.display import NotDefined
from companion.base.thresholds import COMPONENTS
from companion.mediation.estimands import measure_effects, mediators, prompt_tokens, run_clean
from companion.mediation.outcomes import log_odds
from companion.mediation.study import Study
from companion.model.interventions import Patch
from companion.model.replay import interchange
from companion.prompts.tokens import TokenPair

__all__ = ["Patch", "component_map", "effects_of_pair", "interchange", "joint_effect", "log_odds", "prompt_tokens", "run_clean",
           "shares_of_pair"]  # fmt: skip


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


def shares_of_pair(study: Study, pair: TokenPair, sites: Sequence[str]) -> pd.DataFrame:
    """Share of the pair's total effect, the mean of both directions: layers (rows) by sites (columns).

    A share of 1 in the last layer's residual stream is true of any network.
    """
    table = effects_of_pair(study, pair, sites)
    return table.assign(share=(table.nie0 + table.nie1) / 2 / table.te).pivot(
        index="layer", columns="site", values="share"
    )


def joint_effect(study: Study, pair: TokenPair, site: str) -> float:
    """NIE0 of all layers' outputs of one kind, patched together at the last token, in log-odds.

    All attention outputs together carry exactly TE where the prompts differ only before the last token.
    """
    batch = run_clean(study.subject, [pair])
    last = torch.zeros_like(batch.control.tokens, dtype=torch.bool)
    last[:, -1] = True
    together = [Patch(site, layer, last) for layer in range(study.subject.n_layers)]
    patched = interchange(study.subject, batch.control, batch.treated, [together])
    openers = study.openers[pair.pair.treatment]
    clean = log_odds(study.subject, batch.control.resid_post[-1][:, -1], openers)
    return float(log_odds(study.subject, patched[:, 0, 0], openers) - clean)
