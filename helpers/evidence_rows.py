"""Rows of an evidence table: one number with its interval, and how many pairs and topics it rests on."""

from __future__ import annotations

import numpy as np
import pandas as pd

from helpers import bootstrap as bs
from helpers import stats


def row(
    model: str, claim: str, quantity: str, variant: str, estimates: bs.Estimates, n_pairs: int, index: int = 0
) -> dict[str, object]:
    """One row of an evidence table from one entry of an `Estimates`."""
    return {
        "model": model,
        "claim": claim,
        "quantity": quantity,
        "variant": variant,
        "estimate": float(estimates.estimate[index]),
        "ci_low": float(estimates.low[index]),
        "ci_high": float(estimates.high[index]),
        "n_pairs": n_pairs,
        "n_topics": estimates.n_clusters,
        "note": "",
    }


def share_row(
    model: str, claim: str, quantity: str, variant: str, estimates: bs.Estimates | None, table: pd.DataFrame
) -> list[dict[str, object]]:
    """The row of a share measured on the table's test pairs, or no row where the share is not defined."""
    n_pairs = table.loc[table.split == "test", "pair_id"].nunique()
    return [] if estimates is None else [row(model, claim, quantity, variant, estimates, n_pairs)]


def mean_row(table: pd.DataFrame, value: str, model: str, claim: str, quantity: str) -> dict[str, object]:
    """One row with the mean of a column over pairs; its interval has no limits where all are of one topic."""
    several = pd.concat([table, table.assign(topic="the same again")]) if table.topic.nunique() < 2 else table
    made = row(model, claim, quantity, "main", bs.bootstrap(stats.cluster_sums(several, value), stats.mean), len(table))
    return made | {"ci_low": -np.inf, "ci_high": np.inf, "n_topics": 1} if several is not table else made
