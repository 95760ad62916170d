"""Where in a prompt a signal sits, what carries it on from the last token, and when an answer is decided."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from companion.base.device import to_host
from companion.base.display import NotDefined
from companion.base.files import write_table
from companion.base.paths import results_dir
from companion.evidence import tokens as evidence
from companion.evidence.tokens import Timing, measure_timing
from companion.generation import labels
from companion.generation.decode import Answers, end_tokens
from companion.mediation import mechanisms, outcomes
from companion.mediation.estimands import run_clean
from companion.mediation.mechanisms import PAIRS, group_shares, shares_by_layer
from companion.mediation.mechanisms import position_effects as map_of_pair
from companion.mediation.mechanisms import token_effects as measure_groups
from companion.mediation.study import Study
from companion.mediation.summaries import primary, signed_contrast
from companion.prompts.tokens import TokenPair

__all__ = ["STEPS", "end_tokens", "hand_over", "label", "map_of_pair", "measure_groups", "measure_paths",
           "measure_timing", "path_effects_of_pair", "primary", "rates", "share_by_group", "shares_by_layer",
           "signed_contrast", "tested_pairs", "write_evidence"]  # fmt: skip

STEPS = outcomes.STEPS  # tokens of an answer


def tested_pairs(study: Study, n: int | None = None) -> list[TokenPair]:
    """The first `n` (by default all) test pairs of the main treatment, among those that `measure_groups` measures."""
    return [pair for pair in study.thinned(PAIRS).of(study.main_treatment) if pair.pair.split == "test"][:n]


def share_by_group(study: Study, effects: pd.DataFrame, treatments: Sequence[str]) -> pd.DataFrame:
    """Share of the total effect by treatment, group and layer with intervals; treatments that were not measured are left out."""
    there = [name for name in treatments if (effects.treatment == name).any()] or [effects.treatment.iloc[0]]
    return pd.concat([group_shares(study, effects, name) for name in there], ignore_index=True)


def measure_paths(study: Study) -> pd.DataFrame:
    """Effects of the last token's residual stream after each layer, all parts above live, or attention or MLPs held.

    One row a pair, layer and what is held, in log-odds; kept as `05_carried.parquet`.
    """
    found = mechanisms.path_effects(study)
    write_table(found, results_dir(study.slug) / "05_carried.parquet")
    return found


def hand_over(paths: pd.DataFrame) -> pd.DataFrame:
    """First layer after which the last token has more than half of TE, by treatment: layer, low, high, n_pairs, n_topics.

    On test; the limits are those of 2,000 draws of whole topics. Without a crossing it is the last layer.
    """
    found = {name: mechanisms.hand_over_layer(paths, name, "test") for name in dict.fromkeys(paths.treatment)}
    return pd.concat(found).droplevel(1).rename_axis("treatment")


def path_effects_of_pair(study: Study, pair: TokenPair, layer: int) -> pd.Series:
    """Effect of the last token's residual stream after a layer, the treated value put into the control run, in log-odds.

    One entry for each way to hold what stands above: live, attention held, MLPs held, both held.
    """
    batch = run_clean(study.subject, [pair])
    resid = mechanisms.held_residuals(study.subject, batch, [layer])[0]
    openers = study.openers[pair.pair.treatment]
    clean = outcomes.log_odds(study.subject, batch.control.resid_post[-1][:, -1], openers)
    effects = to_host(outcomes.log_odds(study.subject, resid, openers)[0] - clean)
    return pd.Series(effects, list(mechanisms.HELD)).drop("all held")


@torch.no_grad()
def label(study: Study, pair: TokenPair, made: Sequence[int]) -> str:
    """What an answer to the treated prompt, given as token ids, is: harmful, refusal, on_topic or off_topic.

    In the invented language a judge reads it; else it is a refusal if it opens with a refusal token or holds a phrase of one.
    """
    text, ids = pair.pair.treated, np.array([list(made)])
    judge = labels.judge if labels.is_embedded([text]) else None
    own, openers = Answers(ids, np.ones_like(ids, dtype=bool)), study.openers[pair.pair.treatment]
    is_harmful = [pair.pair.treatment in ("T1", "T2")]
    return labels.label_answers(study.subject, [text], own, openers, judge=judge, harmful=is_harmful)[0]


def rates(study: Study, clamps: Timing | NotDefined) -> tuple[pd.DataFrame | NotDefined, str]:
    """Share of harmful answers by clamp and schedule with intervals; and who labelled."""
    if isinstance(clamps, NotDefined):
        return clamps, str(clamps)
    exact = labels.is_embedded(pair.pair.treated for pair in study.of("T2"))
    return evidence.harmful_rates(clamps.answers), labels.labeller(exact=exact)


def write_evidence(
    study: Study, model: str, profile: str, paths: pd.DataFrame, clamps: Timing | NotDefined
) -> pd.DataFrame:
    """Write `05_evidence.csv`, rows for C4 and C5c of this run (returned) and of other shipped models, measured here."""
    table = evidence.evidence_of_run(study, model, profile, paths, clamps)
    write_table(table, results_dir(study.slug) / "05_evidence.csv")
    return table[table.model == study.slug]
