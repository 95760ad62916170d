"""Are related neurons adjacent? Windows of neighbours against exact single neurons, and against any other groups.

The neurons of an MLP can be permuted without changing what the model computes. They start independent and identically
distributed, and an optimiser that treats coordinates alike (SGD, Adam, Muon, weight decay) never learns their numbers:
before the data speak, every order of them is equally likely. A window is then a random group with a suggestive name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats as st

from companion.base.errors import InputError
from companion.neurons.sets import Measured, joint, on_contrast, topic_sums
from companion.neurons.single import PairEffects, in_columns, in_split, signed
from companion.stats import bootstrap

HALF_WIDTH = 8
N_PERMUTATIONS = 9_999
N_ORDERS = 19  # with the training order that makes 20, so that the smallest p-value is 0.05


def morans_i(
    values: Float[np.ndarray, "... neuron"], layer: Int[np.ndarray, "neuron"], half_width: int = HALF_WIDTH
) -> Float[np.ndarray, ...]:
    """Moran's (1950) I of values along the neuron index: about 0 for exchangeable ones, towards 1 if neighbours are alike.

    Neighbours are the `half_width` neurons to either side in the same layer, weight 1, no wrapping around; columns are in
    index order within a layer. Values are centred within their layer, so that differences between layers do not count;
    I is N / S0 * sum_ij w_ij z_i z_j / sum_i z_i^2, pooled over layers.

    >>> round(float(morans_i(np.array([1.0, -1.0] * 50), np.zeros(100, int), half_width=1)), 6)
    -1.0
    """
    product, square, weight = (np.zeros(values.shape[:-1]) for _ in range(3))
    for one in np.unique(layer):
        z = values[..., layer == one]
        z = z - z.mean(-1, keepdims=True)
        n = z.shape[-1]
        before = np.concatenate([np.zeros_like(z[..., :1]), z.cumsum(-1)], axis=-1)
        low, high = (np.arange(n) - half_width).clip(min=0), (np.arange(n) + half_width + 1).clip(max=n)
        product += (z * (before[..., high] - before[..., low] - z)).sum(-1)
        square += (z**2).sum(-1)
        weight += (high - low - 1).sum()
    with np.errstate(invalid="ignore"):
        return len(layer) / weight * product / square


def ranks_in_layer(values: Float[np.ndarray, "... neuron"], layer: Int[np.ndarray, "neuron"]) -> Float[np.ndarray, ...]:
    """Rank of |value| within its layer, ties averaged."""
    made = np.empty(values.shape)
    for one in np.unique(layer):
        made[..., layer == one] = st.rankdata(abs(values[..., layer == one]), axis=-1)
    return made


@dataclass(frozen=True)
class MoranTest:
    """Moran's I of rank |mean NIE| with its interval and its values under permuted indices; p is one-sided (I large)."""

    estimate: float
    low: float
    high: float
    p: float
    permuted: Float[np.ndarray, "permutation"]
    layers: tuple[int, ...]


def moran_test(effects: PairEffects, n_permutations: int = N_PERMUTATIONS, seed: int = 0) -> MoranTest:
    """Moran's I of rank |mean NIE| over the pairs given, pooled over the layers that have effects.

    Indices are permuted within layers. The interval adds the variances of other prompts (jackknife over topics) and of other
    indices (the permutations): exact where these are exchangeable, and too narrow where I is far above 0.
    """
    live = effects.columns.layer.isin(effects.columns.layer[np.any(effects.nie != 0, axis=0)]).to_numpy()
    if not live.any():
        raise InputError("no neuron has any effect: there is nothing whose place could matter")
    sums = topic_sums(effects.pairs, effects.nie[:, live])
    layer = effects.columns.layer.to_numpy()[live]
    ranked = ranks_in_layer(sums.sums.sum(0), layer)
    estimate = float(morans_i(ranked, layer))
    permuted, n = _permutations(ranked, layer, n_permutations, seed), len(sums.clusters)
    without = morans_i(ranks_in_layer(sums.sums.sum(0) - sums.sums, layer), layer) if n > 1 else np.full(2, np.nan)
    variance = permuted.var() + (n - 1) / n * ((without - without.mean()) ** 2).sum()
    half = float(st.norm.isf(0.025) * np.sqrt(variance)) if np.isfinite(variance) else np.inf
    p = float((1 + (permuted >= estimate).sum()) / (1 + n_permutations))
    return MoranTest(estimate, estimate - half, estimate + half, p, permuted, tuple(np.unique(layer).tolist()))


def _permutations(
    ranked: Float[np.ndarray, "neuron"], layer: Int[np.ndarray, "neuron"], n: int, seed: int
) -> Float[np.ndarray, "permutation"]:
    rng, made = np.random.default_rng(seed), []
    step = max(1, (1 << 22) // len(layer))
    for first in range(0, n, step):
        drawn = np.tile(ranked, (min(step, n - first), 1))
        for one in np.unique(layer):
            drawn[:, layer == one] = rng.permuted(drawn[:, layer == one], axis=1)
        made.append(morans_i(drawn, layer))
    return np.concatenate(made)


def moran_histogram(found: MoranTest) -> pd.DataFrame:
    """Moran's I under permuted indices, binned; the model's own estimate and interval repeated in every row."""
    counts, edges = np.histogram(found.permuted, bins=50)
    own = {"observed": found.estimate, "least": found.low, "most": found.high}
    return pd.DataFrame({"start": edges[:-1], "end": edges[1:], "count": counts}).assign(**own)


def windows(order: Int[np.ndarray, "neuron"], half_width: int = HALF_WIDTH) -> Int[np.ndarray, "window member"]:
    """Every full window of neighbours in an order of the neurons: their indices as they stand, or a random order."""
    width = 2 * half_width + 1
    if len(order) < width:
        raise InputError(f"{len(order)} neurons in the layer: a window of half-width {half_width} needs {width}")
    return np.lib.stride_tricks.sliding_window_view(order, width)


@dataclass(frozen=True)
class WindowContest:
    """The best group of each kind, chosen on discover, and its joint effect on test.

    `shares` are shares of TE with intervals, in the order of `CONTEST`; random groups are averaged over their orders, and
    as many top-ranked neurons stand beside. `p`: how often a random order's best did as well as the best window.
    """

    shares: bootstrap.Estimates
    p: float


CONTEST = ("best window", "best random group", "best window - best random group", "top ranked")


def window_contest(
    measured: Measured, treatment: str, ranked: Int[np.ndarray, "neuron"], *, half_width: int = HALF_WIDTH
) -> WindowContest:
    """Best contiguous window of last-layer neurons against the best of as many random groups, joint exact effects.

    Random groups are the windows of a random order, so that the best of them had the same chance to be lucky. `ranked` is
    the discover ranking. Where each pair is costly the best are chosen by the sum of their members' own effects; the effects
    on test are joint and exact all the same.
    """
    subject, rng = measured.study.subject, np.random.default_rng(0)
    effects = in_split(signed(measured.effects[treatment]), "discover")
    alone = in_columns(effects, (effects.columns.layer == measured.last).to_numpy()).nie.mean(0)
    orders = [np.arange(subject.d_mlp), *(rng.permutation(subject.d_mlp) for _ in range(N_ORDERS))]
    best = []
    for order in orders:
        members = windows(order, half_width)
        if measured.study.is_costly:
            size = alone[members].sum(1)
        else:
            size = on_contrast(measured, treatment, "discover", partial(joint, subject, members=members)).nie.mean(0)
        best.append(members[size.argmax()])
    groups = np.stack([*best, ranked[: 2 * half_width + 1]])
    test = on_contrast(measured, treatment, "test", partial(joint, subject, members=groups))

    def statistic(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        share = total[:, :-1] / total[:, -1:]
        window, others = share[:, 0], share[:, 1:-1].mean(1)
        return np.column_stack([window, others, window - others, share[:, -1]])

    shares = bootstrap.bootstrap(topic_sums(test.pairs, np.column_stack([test.nie, test.pairs.te])), statistic)
    means = test.nie.mean(0)
    return WindowContest(shares, (1 + int((means[1:-1] >= means[0]).sum())) / (1 + N_ORDERS))
