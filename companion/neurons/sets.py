"""Sets of last-layer neurons: joint effects of swapping many at once, and how few neurons carry an effect.

Nothing follows the last MLP but the final norm and the unembedding, so a set S changes the final residual stream by the
sum of d_j w_j over S (in families with a norm behind the MLP: by what that norm makes of it), and the outcome is read
off, exactly and without a forward pass. Neurons are ranked on the discover split; the curve of the first k is drawn on test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.base.device import running_sum, to_host
from companion.base.errors import InputError
from companion.mediation import outcomes
from companion.mediation.study import Study
from companion.model.architecture import Subject
from companion.neurons import single
from companion.neurons.closed_form import last_layer_vectors, opener_readout
from companion.neurons.single import BLOCK, FinalStates, PairEffects, residual_change
from companion.stats import bootstrap
from companion.stats.bootstrap import interval
from companion.stats.clusters import ClusterSums

PAIRS = 16  # pairs at once: few enough for what is made of them to stay in a cache
# Up to here the vectors' products with each other cost less than a vector for each set: members of a set, neurons of a layer.
FEW, SMALL = 32, 1024
EVERY, EVERY_COSTLY = 512, 64  # up to here every set size is measured
SUMMARY = ("psi", "k50", "k90")  # what `curve_summary` gives
# Takes the change of every neuron, (pair, neuron); gives which columns, and the change of the MLP's output for each.
Writes = Callable[[Tensor], Iterator[tuple[np.ndarray, Tensor]]]
# Takes residual streams, neurons and their change; gives which columns, and the change of Y1 for each.
Scores = Callable[[Tensor, Tensor, Tensor], Iterator[tuple[np.ndarray, Tensor]]]


@dataclass(frozen=True)
class Measured:
    """Single-neuron effects by treatment (T2 - T2b behind the others) and the final states of the clean runs, for sets."""

    study: Study
    effects: Mapping[str, PairEffects]
    states: Mapping[str, FinalStates]

    @property
    def last(self) -> int:
        """The last layer."""
        return self.study.subject.n_layers - 1


def measure_all(study: Study, columns: Mapping[str, pd.DataFrame]) -> Measured:
    """`measure_chosen` for each treatment that `columns` names and the study has, and T2 - T2b where it can be."""
    columns = {name: chosen for name, chosen in columns.items() if name in study.treatments}
    said = single.last_outputs(study, columns)
    found = {name: single.measure_chosen(study, name, chosen, said) for name, chosen in columns.items()}
    effects = {name: made for name, (made, _) in found.items()}
    if study.twins and {"T2", "T2b"} <= set(effects):
        effects["T2-T2b"] = single.difference(effects["T2"], effects["T2b"], study.twins)
    return Measured(study, effects, {name: states for name, (_, states) in found.items()})


def sizes(d_mlp: int, every: int = EVERY) -> Int[np.ndarray, "size"]:
    """Set sizes from 1 to all neurons: every one up to 512 (or `every`), from there in steps of about 2 %."""
    more = np.geomspace(every, max(d_mlp, every), 1 + int(np.log(max(d_mlp / every, 1)) / np.log(1.02)))
    return np.unique([*range(1, min(d_mlp, every) + 1), *np.rint(more[more < d_mlp]).astype(int), d_mlp])


@torch.no_grad()
def joint(subject: Subject, states: FinalStates, members: Int[np.ndarray, "set member"]) -> PairEffects:
    """NIE0 and NIE1 of each set of different last-layer neurons (else InputError), swapped together at the last token."""
    members = np.asarray(members)
    is_double = members.ndim != 2 or bool((np.diff(np.sort(members, axis=1), axis=1) == 0).any())
    if is_double or members.min() < 0 or members.max() >= subject.d_mlp:
        raise InputError(f"sets {members.shape}: expected rows of different neurons of 0 to {subject.d_mlp - 1}")
    vectors, known = last_layer_vectors(subject), opener_readout(subject, states.openers)
    step = max(1, BLOCK // (max(PAIRS, members.shape[1]) * subject.d_model))
    columns, starts = pd.DataFrame({"set": range(len(members))}), range(0, len(members), step)
    parts = [torch.tensor(members[first : first + step], device=vectors.device) for first in starts]
    places = [np.arange(first, first + len(part)) for first, part in zip(starts, parts, strict=True)]

    def writes(change: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        for at, part in zip(places, parts, strict=True):
            yield at, torch.einsum("psm,smd->psd", change[:, part], vectors[part])

    if known is None or members.shape[1] > FEW:
        return _effects(states, columns, _formed(subject, states, writes))
    made = [(part, known.products(part), known.outputs[part]) for part in parts]

    def scores(resid: Tensor, _: Tensor, change: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        for at, theirs in zip(places, made, strict=True):
            yield at, known.joint_effects(resid, change, *theirs)

    return _effects(states, columns, scores)


@torch.no_grad()
def cumulative(
    subject: Subject, states: FinalStates, order: Int[np.ndarray, "neuron"], ks: Sequence[int] | Int[np.ndarray, "size"]
) -> PairEffects:
    """NIE0 and NIE1 of the first k neurons of an order together, for each k (increasing); a column is one k."""
    vectors, ks, known = last_layer_vectors(subject), np.asarray(ks), opener_readout(subject, states.openers)
    step, columns = max(1, BLOCK // (PAIRS * subject.d_model)), pd.DataFrame({"k": ks})
    members = torch.tensor(order[: int(ks[-1])].copy(), device=vectors.device)

    def writes(change: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        total = change.new_zeros(len(change), 1, subject.d_model)
        for first in range(0, len(members), step):
            part = members[first : first + step]
            running = total + running_sum(change[:, part, None] * vectors[part], 1)
            total = running[:, -1:]
            at = np.flatnonzero((ks > first) & (ks <= first + len(part)))
            yield at, running[:, ks[at] - first - 1]

    if known is None or subject.d_mlp > SMALL:
        return _effects(states, columns, _formed(subject, states, writes))
    products = known.products(members)

    def scores(resid: Tensor, _: Tensor, change: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        yield np.arange(len(ks)), known.cumulative_effects(resid, change, members, products)[:, ks - 1]

    return _effects(states, columns, scores)


@torch.no_grad()
def whole_layer(subject: Subject, states: FinalStates, is_frozen: bool = False) -> PairEffects:
    """NIE0 and NIE1 of all last-layer neurons together, one column; `is_frozen`: norm's scale of the control run, TE's too."""
    like = states.resid[0] if is_frozen else None
    write = (states.neurons[1] - states.neurons[0]) @ last_layer_vectors(subject)
    cells = [*states.resid]
    for base, sign in ((0, 1), (1, -1)):
        moved = residual_change(subject, subject.n_layers - 1, states.neurons[base], sign * write[:, None])[:, 0]
        cells.append(states.resid[base] + moved)
    y00, y11, y01, y10 = (to_host(outcomes.log_odds(subject, one, states.openers, like))[:, None] for one in cells)
    pairs = states.pairs.assign(te=(y11 - y00)[:, 0])
    return PairEffects(states.treatment, pairs, pd.DataFrame({"set": [0]}), {"nie0": y01 - y00, "nie1": y11 - y10})


def _formed(subject: Subject, states: FinalStates, writes: Writes) -> Scores:
    """The change of Y1 from the change of the MLP's output, formed for each set."""

    def scores(resid: Tensor, neurons: Tensor, change: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        start = outcomes.log_odds(subject, resid[:, None], states.openers)
        for at, write in writes(change):
            moved = resid[:, None] + residual_change(subject, subject.n_layers - 1, neurons, write)
            yield at, outcomes.log_odds(subject, moved, states.openers) - start

    return scores


def _effects(states: FinalStates, columns: pd.DataFrame, scores: Scores) -> PairEffects:
    values = {}
    for name, base, sign in (("nie0", 0, 1), ("nie1", 1, -1)):
        found = np.empty((len(states.pairs), len(columns)))
        for first in range(0, len(found), PAIRS):
            rows = slice(first, first + PAIRS)
            resid, neurons = states.resid[base, rows], states.neurons[base, rows]
            for at, change in scores(resid, neurons, states.neurons[1 - base, rows] - neurons):
                found[rows, at] = sign * to_host(change)
        values[name] = found
    return PairEffects(states.treatment, states.pairs, columns, values)


def on_contrast(
    measured: Measured, treatment: str, split: str, apply: Callable[[FinalStates], PairEffects]
) -> PairEffects:
    """A measurement of sets on one split of a treatment or of the contrast T2 - T2b, signed by TE on discover."""
    harmful = measured.states[treatment.removesuffix("-T2b")]
    harmful = harmful if split == "all" else harmful.only((harmful.pairs.split == split).to_numpy())
    made = apply(harmful)
    if treatment.endswith("-T2b"):
        twin, twins = measured.states["T2b"], measured.study.twins
        needed = set(harmful.pairs.pair_id.map(twins).dropna())
        made = single.difference(made, apply(twin.only(twin.pairs.pair_id.isin(needed).to_numpy())), twins)
    return single.signed(made, single.sign_on_discover(measured.effects[treatment].pairs))


# ---- how few neurons carry an effect ----


def topic_sums(pairs: pd.DataFrame, values: Float[np.ndarray, "pair column"]) -> ClusterSums:
    """Sums of many columns within each topic, straight from an array; column names are their numbers."""
    names, code = np.unique(pairs["topic"].to_numpy(str), return_inverse=True)
    member = (np.arange(len(names))[:, None] == code).astype(float)
    counts = np.repeat(member.sum(1, keepdims=True), values.shape[1], axis=1)
    columns = pd.DataFrame({"value": range(values.shape[1])})
    return ClusterSums(member @ values, counts, columns, pd.Index(names), np.zeros(len(names), int))


def settles(share: Float[np.ndarray, "... size"], ks: Int[np.ndarray, "size"], level: float) -> Float[np.ndarray, ...]:
    """The smallest k whose share is at least `level` and after which it stays in [level, 2 - level]; NaN if none.

    With level 0.9 this is k90: a curve that still overshoots 1.1 later on has not arrived, because neurons are to come that
    undo a part of it. At k itself the share may be above the band, as in the third curve below.

    >>> ks = np.array([1, 2, 3, 4])
    >>> settles(np.array([[0.5, 0.95, 1.0, 1.0], [0.95, 0.8, 1.0, 1.0], [0.5, 1.2, 1.0, 1.0]]), ks, 0.9)
    array([2., 3., 2.])
    """
    inside = (share >= level) & (share <= 2 - level)
    stays = np.flip(np.minimum.accumulate(np.flip(inside, -1), axis=-1), -1)
    later = np.concatenate([stays[..., 1:], np.ones_like(stays[..., :1])], axis=-1)
    arrived = (share >= level) & later
    return np.where(arrived.any(-1), np.asarray(ks, float)[arrived.argmax(-1)], np.nan)


def curve_summary(curve: PairEffects, value: str = "nie") -> bootstrap.Estimates:
    """psi of the whole layer, k50 and k90 of a curve, with intervals by topic, in the order of `SUMMARY`.

    psi is a share of TE, the others are of the curve as a share of the whole layer's joint effect. Where no k settles,
    k counts as one more than there are neurons.
    """
    ks, effect = curve.columns["k"].to_numpy(), curve.nie if value == "nie" else curve.values[value]
    sums = topic_sums(curve.pairs, np.column_stack([effect, curve.pairs.te]))

    def statistic(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        mean = total / count
        whole = np.where(mean[:, -2] > 0, mean[:, -2], np.nan)  # against the treatment's sign nothing can settle
        share = mean[:, :-1] / whole[:, None]
        settled = [np.nan_to_num(settles(share, ks, level), nan=ks[-1] + 1) for level in (0.5, 0.9)]
        return np.column_stack([mean[:, -2] / mean[:, -1], *settled])

    return interval(sums, statistic)


def curve_shares(curve: PairEffects) -> pd.DataFrame:
    """The curve at some k as a share of the whole layer's joint effect: k, estimate, low, high; no rows without an effect."""
    effect, every = curve.nie, curve.columns["k"].to_numpy()
    if effect[:, -1].mean() <= 0:
        return pd.DataFrame(columns=["k", "estimate", "low", "high"])
    at = np.unique(np.searchsorted(every, np.geomspace(1, every[-1], 40)).clip(max=len(every) - 1))
    sums = topic_sums(curve.pairs, effect[:, [*at, -1]])
    estimates = interval(sums, lambda total, count: total[:, :-1] / total[:, -1:])
    return estimates.to_frame(pd.DataFrame({"k": every[at]})).drop(columns="n_clusters")
