"""Bootstrap of whole topics: an interval for any statistic of sums over prompt pairs, all cells at once.

Drawing topics with replacement is the same as giving each topic an integer weight. So B resamples are one matrix of
multinomial weights, and the resampled sums of all cells are one matrix product, to which `bootstrap` applies the statistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from scipy import stats as st

from companion.base.errors import InputError
from companion.base.files import EVIDENCE
from companion.stats.clusters import ClusterSums, Statistic, cluster_sums, mean

# Effects are log-odds, probabilities or shares, all of order 1: a spread below this is rounding error.
ROUNDING = 1e-12
TAIL = (1 - 0.95) / 2  # not 0.025, by one bit: stored limits rest on it


@dataclass(frozen=True)
class Estimates:
    """Point estimates with intervals, one entry per stat, in the statistic's unit.

    `se` is cluster-robust, `t` the deviation of each resample over its own standard error. Where some resample is 0/0 the
    interval is (-inf, inf); a stat that does not vary has low = high and se 0.
    """

    estimate: Float[np.ndarray, "stat"]
    low: Float[np.ndarray, "stat"]
    high: Float[np.ndarray, "stat"]
    se: Float[np.ndarray, "stat"]
    n_clusters: int
    replicates: Float[np.ndarray, "replicate stat"] = field(repr=False)
    t: Float[np.ndarray, "replicate stat"] = field(repr=False)

    def to_frame(self, labels: pd.DataFrame) -> pd.DataFrame:
        """Tidy table: `labels` (one row per stat, such as `ClusterSums.columns`), then estimate, low, high, n_clusters."""
        return labels.reset_index(drop=True).assign(
            estimate=self.estimate, low=self.low, high=self.high, n_clusters=self.n_clusters
        )


@dataclass(frozen=True)
class Quantity:
    """A statistic of a table's sums per topic: the value columns and cells that it takes, in the order of `cluster_sums`."""

    table: pd.DataFrame
    values: Sequence[str]
    by: Sequence[str]
    statistic: Statistic

    def estimates(self) -> Estimates:
        """The `interval` over topics."""
        return interval(cluster_sums(self.table, self.values, by=self.by), self.statistic)


def bootstrap(
    sums: ClusterSums, statistic: Statistic, *, n_boot: int = 2000, seed: int = 0, small_sample: bool = True
) -> Estimates:
    """Estimate with 95 % BCa interval (Efron 1987), clusters drawn with replacement within their stratum.

    `small_sample` replaces the normal quantile z in BCa by t * sqrt(n / (n - 1)) (Hesterberg 2015): without it (textbook)
    intervals of 30 topics hold about 92 %. Raises `InputError` for a stratum of one cluster, and a statistic that is 0/0.
    """
    sizes = np.bincount(sums.strata)
    if sizes.min() < 2:
        raise InputError(f"{len(sums.clusters)} clusters in strata of {sizes}: an interval needs at least 2 in each")
    estimate = _evaluate(statistic, sums.sums.sum(0)[None], sums.counts.sum(0)[None])[0]
    if not np.isfinite(estimate).all():
        raise InputError(f"stats {np.flatnonzero(~np.isfinite(estimate))} are 0/0 on the whole table: leave them out")
    weights = _weights(tuple(sums.strata.tolist()), n_boot, seed)
    # In blocks, because the weighted sums of 1e5 columns would take gigabytes.
    blocks = np.array_split(weights, 1 + len(weights) * sums.sums.shape[1] // 10**7)
    replicates = np.concatenate([_evaluate(statistic, block @ sums.sums, block @ sums.counts) for block in blocks])
    influence = _jackknife(sums, statistic)
    ok = np.isfinite(replicates).all(0) & np.isfinite(influence).all(0)
    influence, ordered = np.where(ok, influence, 0), np.sort(np.where(ok, replicates, estimate), axis=0)
    varies = ordered.std(0) > ROUNDING * np.maximum(1, abs(estimate))
    acceleration, df, widen = _shape(influence, sums.strata)
    z = st.t.isf(TAIL, df) * widen if small_sample else st.norm.isf(TAIL)
    low, high = (_bca_limit(ordered, estimate, deviate, acceleration) for deviate in (-z, z))
    se, t = _studentise(replicates - estimate, weights, influence, sums.strata)
    low = np.where(ok, np.where(varies, low, estimate), -np.inf)
    high = np.where(ok, np.where(varies, high, estimate), np.inf)
    se = np.select([~ok, ~varies, se <= ROUNDING], [np.inf, 0, np.inf], se)
    return Estimates(estimate, low, high, se, len(sums.clusters), replicates, t)


def _evaluate(statistic: Statistic, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        value = statistic(sums, counts)
    if value.ndim != 2 or len(value) != len(sums):
        raise InputError(f"the statistic returned shape {value.shape}: expected ({len(sums)}, stats)")
    return value


@lru_cache(maxsize=16)  # drawing takes nine tenths of the time of an interval, and most are over the same few topics
def _weights(codes: tuple[int, ...], n_boot: int, seed: int) -> Float[np.ndarray, "replicate cluster"]:
    strata, rng = np.array(codes), np.random.default_rng(seed)
    weights = np.empty((n_boot, len(strata)))
    for stratum, size in enumerate(np.bincount(strata)):
        weights[:, strata == stratum] = rng.multinomial(size, np.full(size, 1 / size), size=n_boot)
    weights.flags.writeable = False  # shared by all that draw the same topics
    return weights


def _members(strata: np.ndarray) -> np.ndarray:
    return (np.arange(strata.max() + 1)[:, None] == strata).astype(float)


def _jackknife(sums: ClusterSums, statistic: Statistic) -> np.ndarray:
    """Influence of each cluster, [cluster, stat], by leaving it out and weighting its stratum up to its old size."""
    member = _members(sums.strata)
    size = member.sum(1)[sums.strata][:, None]

    def left_out(x: np.ndarray) -> np.ndarray:
        stratum = (member @ x)[sums.strata]
        return (x.sum(0) - stratum) + size / (size - 1) * (stratum - x)

    value = _evaluate(statistic, left_out(sums.sums), left_out(sums.counts))
    centre = (member @ value / member.sum(1, keepdims=True))[sums.strata]
    return (size - 1) / size * (centre - value)


def _shape(influence: np.ndarray, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Acceleration (Davison & Hinkley 1997, 5.3), Satterthwaite's df and sqrt(n / (n - 1)), pooled over strata."""
    member = _members(strata)
    size = member.sum(1, keepdims=True)
    second, third = member @ influence**2, member @ influence**3
    second = np.where(second.sum(0) <= ROUNDING**2, 1, second)  # no influence at all: no skewness either
    total = second.sum(0)
    unbiased = second * size / (size - 1)
    df = unbiased.sum(0) ** 2 / (unbiased**2 / (size - 1)).sum(0)
    return third.sum(0) / (6 * total**1.5), df, np.sqrt(unbiased.sum(0) / total)


def _studentise(
    deviation: np.ndarray, weights: np.ndarray, influence: np.ndarray, strata: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Standard error, and each resample's deviation over its own, from the influence of the clusters it drew."""
    size = np.bincount(strata)[strata][:, None]
    scaled = influence * np.sqrt(size / (size - 1))
    se = np.sqrt((scaled**2).sum(0))
    square = weights @ scaled**2
    for member in _members(strata):
        square -= ((weights * member) @ scaled) ** 2 / member.sum()
    own = np.sqrt(np.maximum(square, 0))
    # Where a resample drew no cluster that matters, its own error vanishes (up to cancellation) and t has no meaning.
    meaningful = own > 1e-6 * se
    return se, np.where(meaningful, deviation / np.where(meaningful, own, 1), np.inf)


def _bca_limit(ordered: np.ndarray, estimate: np.ndarray, z: np.ndarray, acceleration: np.ndarray) -> np.ndarray:
    """Quantile of each sorted column of replicates at the level that BCa assigns to the normal deviate `z`."""
    n_boot, tied = len(ordered), ROUNDING * np.maximum(1, abs(estimate))
    below = ((ordered < estimate - tied).mean(0) + (ordered <= estimate + tied).mean(0)) / 2
    bias = st.norm.ppf(np.clip(below, 1 / n_boot, 1 - 1 / n_boot))
    shifted = bias + z
    level = st.norm.cdf(bias + shifted / np.maximum(1 - acceleration * shifted, ROUNDING))
    position = level * (n_boot - 1)
    start = np.minimum(position.astype(int), n_boot - 2)
    lower, upper = (np.take_along_axis(ordered, row[None], axis=0)[0] for row in (start, start + 1))
    return lower + (position - start) * (upper - lower)


def max_t_band(estimates: Estimates) -> tuple[Float[np.ndarray, "stat"], Float[np.ndarray, "stat"]]:
    """Limits that hold for all stats at once with 95 % confidence: estimate -+ quantile of max |t| times `se`.

    Each resample has its own standard error (bootstrap-t; Romano & Wolf 2005): with one for all, bands covered about 88 %. Stats
    that do not vary keep [estimate, estimate], and those that fewer than about 8 clusters inform get (-inf, inf).
    """
    estimate, se = estimates.estimate, estimates.se
    usable = np.isfinite(estimates.t).all(0) & (se > 0)
    critical = float(np.quantile(abs(estimates.t[:, usable]).max(1, initial=0), 0.95))
    half = np.select([usable, se == 0], [critical * np.where(usable, se, 0), 0], np.inf)
    return estimate - half, estimate + half


def interval(sums: ClusterSums, statistic: Statistic) -> Estimates:
    """`bootstrap`, with intervals without limits where all pairs are of one topic: nothing says how topics differ."""
    if len(sums.clusters) > 1:
        return bootstrap(sums, statistic)
    return _without_limits(statistic(sums.sums, sums.counts)[0])


def _without_limits(estimate: np.ndarray) -> Estimates:
    endless = np.full_like(estimate, np.inf)
    return Estimates(estimate, -endless, endless, endless, 1, estimate[None], endless[None])


def two_way(
    sums: ClusterSums, statistic: Statistic, first: Shaped[np.ndarray, "cluster"], second: Shaped[np.ndarray, "cluster"]
) -> Estimates:
    """Estimate with an interval that takes two crossed samples into account, such as topics and families of wrappers.

    Pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1, 386): levels of both factors are drawn on their own, and
    a cell (a cluster of `sums`, with levels `first` and `second`) counts as often as its two levels together; counts are
    stretched by sqrt(n / (n - 1)). The limits are half the spread of the middle 68 % of draws, times a t quantile with
    Satterthwaite's degrees of freedom; (-inf, inf) where a factor has one level. They hold rather too much than too little.
    """
    codes = [np.unique(np.asarray(labels), return_inverse=True)[1] for labels in (first, second)]
    sizes, rng = [int(code.max()) + 1 for code in codes], np.random.default_rng(0)
    estimate = _evaluate(statistic, sums.sums.sum(0)[None], sums.counts.sum(0)[None])[0]
    if min(sizes) < 2:
        return _without_limits(estimate)
    drawn = [rng.multinomial(n, np.full(n, 1 / n), size=2000) for n in sizes]
    weights = [(1 + (x - 1) * math.sqrt(n / (n - 1)))[:, code] for x, n, code in zip(drawn, sizes, codes, strict=True)]

    def replicates_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        made = _evaluate(statistic, weight @ sums.sums, weight @ sums.counts)
        # A ratio has tails that would swamp a standard deviation.
        middle = np.quantile(made, st.norm.cdf([-1, 1]), axis=0)
        return made, (middle[1] - middle[0]) / 2

    (_, first_se), (_, second_se) = map(replicates_of, weights)
    replicates, se = replicates_of(weights[0] * weights[1])
    spread = first_se**4 / (sizes[0] - 1) + second_se**4 / (sizes[1] - 1)
    df = np.full_like(se, min(sizes) - 1.0)
    np.divide((first_se**2 + second_se**2) ** 2, spread, out=df, where=spread > 0)
    half = st.t.isf(0.025, df) * se
    t = (replicates - estimate) / np.where(se > 0, se, 1)
    return Estimates(estimate, estimate - half, estimate + half, se, min(sizes), replicates, t)


def row(
    model: str, claim: str, quantity: str, variant: str, estimates: Estimates, n_pairs: int, index: int = 0
) -> dict[str, object]:
    """One row of an evidence table from one entry of an `Estimates`."""
    limits = (float(values[index]) for values in (estimates.estimate, estimates.low, estimates.high))
    values = (model, claim, quantity, variant, *limits, n_pairs, estimates.n_clusters, "")
    return dict(zip(EVIDENCE, values, strict=True))


def exact_row(
    model: str, claim: str, quantity: str, value: float, n_pairs: int, n_topics: int = 0, note: str = ""
) -> dict[str, object]:
    """One row, variant main, of a number without sampling error."""
    values = (model, claim, quantity, "main", *[float(value)] * 3, n_pairs, n_topics, note)
    return dict(zip(EVIDENCE, values, strict=True))


def share_row(model: str, claim: str, quantity: str, variant: str, share: Quantity | None) -> list[dict[str, object]]:
    """The row of a quantity of test pairs, or no row where it is not defined."""
    if share is None:
        return []
    return [row(model, claim, quantity, variant, share.estimates(), share.table.pair_id.nunique())]


def mean_row(table: pd.DataFrame, value: str, model: str, claim: str, quantity: str) -> dict[str, object]:
    """One row with the mean of a column over pairs."""
    return row(model, claim, quantity, "main", interval(cluster_sums(table, value), mean), len(table))
