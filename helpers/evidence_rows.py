"""Rows of an evidence table: one number with its interval, and how many pairs and topics it rests on."""

from __future__ import annotations

import numpy as np
import pandas as pd

from helpers import bootstrap as bs
from helpers import stats


def interval(sums: stats.ClusterSums, statistic: stats.Statistic) -> bs.Estimates:
    """`bootstrap`, with intervals without limits where all pairs are of one topic: nothing says how topics differ."""
    if len(sums.clusters) > 1:
        return bs.bootstrap(sums, statistic)
    estimate = statistic(sums.sums, sums.counts)[0]
    endless = np.full_like(estimate, np.inf)
    undefined, t = np.zeros(len(estimate), dtype=int), endless[None]
    return bs.Estimates(estimate, -endless, endless, endless, undefined, 1, sums.n_rows, estimate[None], t)


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
    """One row with the mean of a column over pairs."""
    return row(model, claim, quantity, "main", interval(stats.cluster_sums(table, value), stats.mean), len(table))
