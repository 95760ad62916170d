"""Sums per topic, the statistics made of them, and the tests that respect topics.

Pairs of one topic share wording and are not independent. `mean`, `contrast` and `ratio` are functions of `cluster_sums`, on which
`companion.stats.bootstrap` puts intervals. Neurons are too many and too sparse for a bootstrap: `clustered_t` tests them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped
from numpy.typing import ArrayLike
from scipy import stats as st
from statsmodels.stats.proportion import proportion_confint

from companion.base.errors import InputError

# Takes sums and counts, both [replicate, column], and returns [replicate, stat].
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ClusterSums:
    """Sums and numbers of rows of each cell (column) in each cluster; 0 and 0 where a cluster lacks the cell."""

    sums: Float[np.ndarray, "cluster column"]
    counts: Float[np.ndarray, "cluster column"]
    columns: pd.DataFrame  # describes the columns of `sums`, one row each: `sums.columns["layer"] > 20` selects cells
    clusters: pd.Index
    strata: Int[np.ndarray, "cluster"]  # clusters of the same code are resampled among themselves


def cluster_sums(
    table: pd.DataFrame, values: str | Sequence[str], *, by: Sequence[str] = (), strata: str | None = None
) -> ClusterSums:
    """Sum the value column(s) of a tidy table within each topic, separately for each combination of `by`, sorted.

    A wide table has one value column per cell; a long one has one value column and names the cell in `by`. `strata` names
    a column: topics in which the same set of its values occurs form one stratum.
    Raises `InputError` for no rows, and for missing or infinite entries.

    >>> table = pd.DataFrame({"topic": ["a", "a", "b"], "layer": [0, 1, 0], "nie": [1.0, 2.0, 3.0]})
    >>> cluster_sums(table, "nie", by=["layer"]).sums.tolist()
    [[1.0, 2.0], [3.0, 0.0]]
    """
    values, by = [values] if isinstance(values, str) else list(values), list(by)
    if table.empty or table[["topic", *by, *([strata] if strata else [])]].isna().any(axis=None):
        raise InputError("no rows, or rows without a topic or a cell: check the filter that made the table")
    for name in values:
        finite = np.isfinite(pd.to_numeric(table[name], errors="coerce").to_numpy(float, na_value=np.nan))
        if not finite.all():
            lost = f"{(~finite).sum()} of {len(finite)} entries of {name!r}"
            raise InputError(f"{lost} are not finite numbers: look for a prompt of zero probability")
    row, clusters = pd.factorize(table["topic"], sort=True)
    if by:
        grouped = table.groupby(by, sort=True, observed=True)
        column, cells = grouped.ngroup().to_numpy(), grouped.size().index.to_frame(index=False)
    else:
        column, cells = np.zeros(len(table), dtype=int), pd.DataFrame(index=[0])
    flat, shape = row * len(cells) + column, (len(clusters), len(cells))
    counts = np.bincount(flat, minlength=math.prod(shape)).reshape(shape).astype(float)
    sums = [np.bincount(flat, table[name].to_numpy(float), math.prod(shape)).reshape(shape) for name in values]
    codes = np.zeros(len(clusters), dtype=int)
    if strata:
        occurs = pd.crosstab(table["topic"], table[strata]).to_numpy() > 0
        codes = np.unique(occurs, axis=0, return_inverse=True)[1]
    columns = pd.concat([cells.assign(value=name) for name in values], ignore_index=True)[["value", *by]]
    return ClusterSums(np.hstack(sums), np.tile(counts, len(values)), columns, pd.Index(clusters, name="topic"), codes)


def mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over rows of every column."""
    return sums / counts


def contrast(weights: ArrayLike) -> Statistic:
    """Statistic that adds up column means with these weights, [column] or [stat, column] (a mask is 0 and 1)."""
    weight = np.atleast_2d(np.asarray(weights, dtype=float))

    def statistic(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        empty = counts == 0
        means = np.divide(sums, counts, out=np.zeros_like(sums), where=~empty)
        # An empty column must spoil the stats that use it, and no other.
        spoiled = empty.astype(float) @ (weight != 0).T.astype(float) > 0
        return np.where(spoiled, np.nan, means @ weight.T)

    return statistic


def ratio(num: ArrayLike, den: ArrayLike) -> Statistic:
    """Ratio of two contrasts: a share with two masks, a proportion mediated, or a centroid with `depth * mask, mask`.

    It is a ratio of means, never a mean of ratios, so pairs with a small denominator do not dominate.
    """
    top, bottom = contrast(num), contrast(den)
    return lambda sums, counts: top(sums, counts) / bottom(sums, counts)


class ClusteredT(NamedTuple):
    """One-sample t-test per cell: mean over rows (unit of the values), its standard error, two-sided p."""

    mean: Float[np.ndarray, "cell"]
    se: Float[np.ndarray, "cell"]
    p: Float[np.ndarray, "cell"]
    df: int


def clustered_t(values: Float[np.ndarray, "row cell"], cluster: Shaped[np.ndarray, "row"]) -> ClusteredT:
    """Test that the mean of each cell is 0, rows of one cluster being dependent; made for 1e5 cells at once.

    The variance is the cluster-robust one (Liang & Zeger 1986) with the factor G / (G - 1), and t has G - 1 degrees
    of freedom for G clusters. A cell that is 0 in every row has p = 1.
    """
    labels, code = np.unique(cluster, return_inverse=True)
    n_clusters, n_rows = len(labels), len(values)
    if n_clusters < 2:
        raise InputError(f"{n_clusters} cluster: the spread between clusters needs at least 2, add topics")
    if not np.isfinite(values).all():
        raise InputError("values are missing or infinite: leave out rows that were not measured")
    member = (np.arange(n_clusters)[:, None] == code).astype(float)
    mean = values.mean(0, dtype=float)
    residual = member @ values - member.sum(1, keepdims=True) * mean
    se = np.sqrt(n_clusters / (n_clusters - 1) * (residual**2).sum(0)) / n_rows
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, mean / se)
    return ClusteredT(mean, se, 2 * st.t.sf(abs(t), n_clusters - 1), n_clusters - 1)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson (1927) 95 % interval of a proportion of independent trials."""
    low, high = proportion_confint(successes, n, alpha=1 - 0.95, method="wilson")
    return float(low), float(high)


def rate(hits: int, n: int) -> tuple[float, float, float]:
    """Share with its 95 % interval (Wilson); NaN and the whole range where nothing was drawn."""
    return (hits / n, *wilson(hits, n)) if n else (math.nan, 0.0, 1.0)
