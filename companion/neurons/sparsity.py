"""How few neurons carry an effect: k50, k90 and areas of a curve of growing sets, and concentration of single effects.

Neurons are ranked on the discover split and the curve of the first k is drawn on the test split, as joint effects.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from companion.base.errors import InputError
from companion.neurons.single import PairEffects
from companion.stats import bootstrap
from companion.stats.bootstrap import interval
from companion.stats.clusters import ClusterSums


def topic_sums(pairs: pd.DataFrame, values: Float[np.ndarray, "pair column"]) -> ClusterSums:
    """Sums of many columns within each topic, straight from an array; column names are their numbers."""
    names, code = np.unique(pairs["topic"].to_numpy(str), return_inverse=True)
    member = (np.arange(len(names))[:, None] == code).astype(float)
    counts = np.repeat(member.sum(1, keepdims=True), values.shape[1], axis=1)
    columns = pd.DataFrame({"value": range(values.shape[1])})
    return ClusterSums(member @ values, counts, columns, pd.Index(names), np.zeros(len(names), int))


def settles(share: Float[np.ndarray, "... size"], ks: Int[np.ndarray, "size"], level: float) -> Float[np.ndarray, ...]:
    """The smallest k whose share is at least `level` and after which it stays in [level, 2 - level]; NaN if none.

    With level 0.9 this is k90: a curve that still overshoots 1.1 later on has not arrived, however early it first passed
    0.9, because neurons are to come that undo a part of it. At k itself the share may be above the band, as in the third
    curve below. The share of all neurons is 1, so a k exists where the whole layer has an effect of the treatment's sign.

    >>> ks = np.array([1, 2, 3, 4])
    >>> settles(np.array([[0.5, 0.95, 1.0, 1.0], [0.95, 0.8, 1.0, 1.0], [0.5, 1.2, 1.0, 1.0]]), ks, 0.9)
    array([2., 3., 2.])
    """
    inside = (share >= level) & (share <= 2 - level)
    stays = np.flip(np.minimum.accumulate(np.flip(inside, -1), axis=-1), -1)
    later = np.concatenate([stays[..., 1:], np.ones_like(stays[..., :1])], axis=-1)
    arrived = (share >= level) & later
    return np.where(arrived.any(-1), np.asarray(ks, float)[arrived.argmax(-1)], np.nan)


def areas(share: Float[np.ndarray, "... size"], ks: Int[np.ndarray, "size"]) -> Float[np.ndarray, "... 2"]:
    """Area under a curve, and between it and 1, over the share of neurons swapped: both from the empty set to all.

    The first is large if few neurons do much, also beyond the whole (as MIB's integrated circuit performance ratio);
    the second is small if few neurons do *as much as* the whole (as its circuit-model distance). Mueller et al. 2025,
    arXiv 2504.13151. A random order of equal additive neurons gives one half in both.
    """
    x = np.concatenate([[0], ks]) / ks[-1]
    y = np.concatenate([np.zeros_like(share[..., :1]), share], axis=-1)
    # Trapezoids of |1 - y| are exact where the curve does not cross 1 within a step.
    return np.stack([np.trapezoid(y, x, axis=-1), np.trapezoid(abs(1 - y), x, axis=-1)], axis=-1)


def gini(size: Float[np.ndarray, "... neuron"]) -> Float[np.ndarray, ...]:
    """Gini coefficient of sizes >= 0: 0 if all are equal, 1 - 1/n if one has everything.

    >>> gini(np.array([0.0, 0.0, 0.0, 5.0])).item()
    0.75
    """
    n = size.shape[-1]
    ordered, place = np.sort(size, axis=-1), 2 * np.arange(1, n + 1) - n - 1
    return (ordered * place).sum(-1) / (n * ordered.sum(-1))


def participation(size: Float[np.ndarray, "... neuron"]) -> Float[np.ndarray, ...]:
    """Effective number of neurons, (sum of sizes)^2 / sum of squares: n if all are equal, 1 if one has everything."""
    return size.sum(-1) ** 2 / (size**2).sum(-1)


SUMMARY = ("psi", "k50", "k90", "area", "distance")


def curve_summary(curve: PairEffects, value: str = "nie") -> bootstrap.Estimates:
    """psi of the whole layer, k50, k90 and both areas of a curve, with intervals by topic, in the order of `SUMMARY`.

    psi is a share of TE, the others are of the curve as a share of the whole layer's joint effect. Where no k settles,
    k counts as one more than there are neurons: such an estimate is "none". For the contrast T2 - T2b joint effects are
    subtracted pair by pair first, and the share is that of two differences in differences.
    """
    ks = curve.columns["k"].to_numpy()
    sums = topic_sums(curve.pairs, np.column_stack([curve.effect(value), curve.pairs.te]))

    def statistic(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        mean = total / count
        whole = np.where(mean[:, -2] > 0, mean[:, -2], np.nan)  # against the treatment's sign nothing can settle
        share = mean[:, :-1] / whole[:, None]
        settled = [np.nan_to_num(settles(share, ks, level), nan=ks[-1] + 1) for level in (0.5, 0.9)]
        return np.column_stack([mean[:, -2] / mean[:, -1], *settled, np.nan_to_num(areas(share, ks))])

    return interval(sums, statistic)


def curve_shares(curve: PairEffects, value: str, ks: Int[np.ndarray, "size"]) -> pd.DataFrame:
    """The curve at some k as a share of the whole layer's joint effect: k, estimate, low, high (no rows without an effect)."""
    effect = curve.effect(value)
    at = np.searchsorted(curve.columns["k"].to_numpy(), ks)
    sums = topic_sums(curve.pairs, effect[:, [*at, -1]])
    if effect[:, -1].mean() <= 0:
        return pd.DataFrame(columns=["k", "estimate", "low", "high"])
    estimates = interval(sums, lambda total, count: total[:, :-1] / total[:, -1:])
    return estimates.to_frame(pd.DataFrame({"k": ks})).drop(columns="n_clusters")


def concentration(effects: PairEffects) -> bootstrap.Estimates:
    """Gini coefficient and participation ratio of |mean NIE| over neurons, with intervals by topic.

    Sampling noise makes every neuron's |mean| larger than 0 and so both look less concentrated than they are; means over
    more pairs have less of it.
    """
    if not np.any(effects.nie):
        raise InputError("no neuron has any effect: nothing can be concentrated")

    def statistic(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        size = abs(total / count)
        return np.column_stack([gini(size), participation(size)])

    return interval(topic_sums(effects.pairs, effects.nie), statistic)
