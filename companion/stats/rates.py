"""Statistics of a defence: paired changes in rates, what the refitting of directions adds, and what n can detect.

The same prompts answer with and without steering, so comparisons are paired; topics are drawn, not prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from companion.base.errors import InputError
from companion.stats.bootstrap import interval
from companion.stats.clusters import Statistic, cluster_sums, mean, ratio, wilson


@dataclass(frozen=True)
class Change:
    """A mean or a change with its 95 % interval; `p` is the exact McNemar p-value (nan where it does not apply)."""

    estimate: float
    low: float
    high: float
    n: int
    n_topics: int
    p: float = float("nan")


def mean_change(values: Float[np.ndarray, "prompt"], topic: Shaped[np.ndarray, "prompt"]) -> Change:
    """Mean of per-prompt values with a BCa interval over topics, in the unit of the values."""
    return _change({"value": np.asarray(values, dtype=float)}, topic, mean)


def ratio_change(
    top: Float[np.ndarray, "prompt"], bottom: Float[np.ndarray, "prompt"], topic: Shaped[np.ndarray, "prompt"]
) -> Change:
    """Ratio of two means over the same prompts, topics drawn: never a mean of ratios."""
    return _change({"top": top, "bottom": bottom}, topic, ratio([True, False], [False, True]))


def _change(columns: dict[str, np.ndarray], topic: np.ndarray, statistic: Statistic) -> Change:
    made = interval(cluster_sums(pd.DataFrame({"topic": topic, **columns}), list(columns)), statistic)
    return Change(float(made.estimate[0]), float(made.low[0]), float(made.high[0]), len(topic), made.n_clusters)


def rate_change(
    before: Bool[np.ndarray, "prompt"], after: Bool[np.ndarray, "prompt"], topic: Shaped[np.ndarray, "prompt"]
) -> Change:
    """How far a yes/no rate moved, after - before, in percentage points.

    The limits are the wider of two: the bootstrap over topics, which knows that prompts of a topic are alike but calls
    nothing seen nothing possible, and Newcombe's score interval, which does not.
    """
    p = float(mcnemar(_paired_counts(before, after), exact=True).pvalue)
    boot = mean_change(100 * (after.astype(float) - before.astype(float)), topic)
    low, high = newcombe(before, after)
    return replace(boot, low=min(boot.low, 100 * low), high=max(boot.high, 100 * high), p=p)


def _paired_counts(before: Bool[np.ndarray, "prompt"], after: Bool[np.ndarray, "prompt"]) -> Int[np.ndarray, "2 2"]:
    """How many prompts are yes and no after (rows) and before (columns)."""
    return np.array([[np.sum(a & b) for b in (before, ~before)] for a in (after, ~after)])


def newcombe(before: Bool[np.ndarray, "prompt"], after: Bool[np.ndarray, "prompt"]) -> tuple[float, float]:
    """Interval of the paired difference of two proportions (after - before) by squared Wilson limits.

    Newcombe (1998), Statistics in Medicine 17, 2635, method 10 without his continuity correction of phi. Independent
    prompts are assumed; no discordant pair at all still leaves room for some.
    """
    both = _paired_counts(before, after)
    (rate1, low1, high1), (rate2, low2, high2) = ((x.mean(), *wilson(int(x.sum()), len(x))) for x in (after, before))
    margins = np.prod(both.sum(0)) * np.prod(both.sum(1))
    phi = 0.0 if margins == 0 else (both[0, 0] * both[1, 1] - both[0, 1] * both[1, 0]) / np.sqrt(margins)

    def half(first: float, second: float) -> float:
        return float(np.sqrt(max(0.0, first**2 - 2 * phi * first * second + second**2)))

    difference = rate1 - rate2
    low = difference - half(rate1 - low1, high2 - rate2)
    return float(low), float(difference + half(high1 - rate1, rate2 - low2))


def with_refits(change: Change, refits: Sequence[float]) -> Change:
    """The interval widened by the spread of the estimate over refits of the directions: squares of the two errors add."""
    if len(refits) < 2:
        raise InputError(f"{len(refits)} refits: their spread needs at least 2")
    more = float(st.norm.ppf(0.975)) * float(np.std(refits, ddof=1))
    low = change.estimate - float(np.hypot(change.estimate - change.low, more))
    return replace(change, low=low, high=change.estimate + float(np.hypot(change.high - change.estimate, more)))


def holm(p: Sequence[float]) -> Float[np.ndarray, "test"]:
    """Holm's adjusted p-values of one family of tests; an entry that is nan was not tested and stays nan."""
    values = np.asarray(p, dtype=float)
    tested = np.isfinite(values)
    adjusted = np.full(len(values), np.nan)
    if tested.any():
        adjusted[tested] = multipletests(values[tested], method="holm")[1]
    return adjusted


def rank_p(effect: float, null: Float[np.ndarray, "draw"]) -> float:
    """One-sided p-value of an effect among random draws, the effect counted among them: (1 + #) / (1 + draws)."""
    return float((1 + np.sum(np.asarray(null) >= effect)) / (1 + len(null)))


def detectable(values: Float[np.ndarray, "prompt"], topic: Shaped[np.ndarray, "prompt"]) -> float:
    """The smallest mean change that the test has a power of 0.8 to see at 5 %, in the unit of the values.

    Topics are the units of the t-test whose power it is. Values that do not vary tell nothing about it (nan).
    """
    means = pd.Series(np.asarray(values, dtype=float)).groupby(np.asarray(topic)).mean()
    spread = float(means.std(ddof=1)) if len(means) > 2 else 0.0
    if spread == 0:
        return float("nan")
    return spread * float(TTestPower().solve_power(nobs=len(means), alpha=0.05, power=0.8))
