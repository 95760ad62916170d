"""Effects of all pairs: the sweeps, and the contrast that a claim is about.

`measure_layers` and `measure_modules` measure; `primary` names the treatment that stands for harmful generation, and
`centroid_table` says how sure "later than harmless behaviours" is.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from companion.base.thresholds import COMPONENTS
from companion.claims.corrected_rules import centroid_over_behaviours
from companion.claims.verdict import Rows
from companion.evidence.layers import Layers, measure_layers, usable_benign
from companion.mediation.estimands import with_difference
from companion.mediation.study import Study
from companion.mediation.summaries import VARIANTS, Variant, averaged, primary, select, signed
from companion.mediation.sweeps import clean_outcomes, run_sweep

__all__ = [
    "Layers", "averaged_by_treatment", "centroid_table", "clean_runs", "contrast", "measure_layers",
    "measure_modules", "primary", "usable_benign",
]  # fmt: skip


def clean_runs(study: Study) -> pd.DataFrame:
    """Both clean runs of every pair: y00, y11, their difference TE, and the openers' joint probability.

    Where the set has harmless twins, rows of T2 - T2b stand behind the others. Units are log-odds.
    """
    return with_difference(clean_outcomes(study), study.twins)


def measure_modules(study: Study) -> pd.DataFrame:
    """Direct effects of attention and MLP outputs, and total and direct effects of heads, at the last token.

    One row a pair of T2 or T2b (of all treatments, where there is no T2), site, layer and head; T2 - T2b behind the others.
    """
    return with_difference(run_sweep(study, "modules")["effects"], study.twins)


def contrast(
    effects: pd.DataFrame,
    treatment: str,
    sites: Sequence[str] = COMPONENTS,
    *,
    outcome: str = "Y1",
    split: str | None = "test",
) -> pd.DataFrame:
    """Effects of one treatment at the last token, signed by its TE on discover, with `nie`, the mean of both directions.

    `split` keeps one split's pairs (None: all). What is chosen by these rows must be chosen on discover and shown on test.
    """
    chosen = signed(select(effects, treatment, Variant("main", outcome=outcome), sites))
    return chosen if split is None else chosen[chosen.split == split]


def averaged_by_treatment(effects: pd.DataFrame, treatments: Sequence[str]) -> pd.DataFrame:
    """Effects of attention and MLP outputs of several treatments on test, unsigned: up is towards complying.

    Treatments that were not measured are left out.
    """
    there = [name for name in treatments if (effects.treatment == name).any()]
    rows = pd.concat([averaged(select(effects, name, VARIANTS[0])) for name in there])
    return rows[rows.split == "test"]


def centroid_table(evidence: pd.DataFrame, models: Sequence[str]) -> pd.DataFrame:
    """C1's centroid difference, harm - benign, by model: its interval over topics, and the one that resamples behaviours, too.

    Models without one are left out. Units are the network's depth.
    """
    own = {model: Rows(model, evidence[evidence.model == model]) for model in models}
    pairs = {
        model: (rows.find("C1", "centroid difference"), centroid_over_behaviours(rows)) for model, rows in own.items()
    }
    columns = ["model", "difference", "low", "high", "low, behaviours resampled", "high, behaviours resampled"]
    found = [
        (model, one.estimate, one.ci_low, one.ci_high, wide.ci_low, wide.ci_high)
        for model, (one, wide) in pairs.items()
        if one is not None and wide is not None
    ]
    return pd.DataFrame(found, columns=columns).set_index("model")
