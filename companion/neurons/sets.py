"""Sets of last-layer neurons: the joint effect of swapping many at once, exactly, on the residual stream.

Nothing follows the last MLP but the final norm and the unembedding, so a set S changes the final residual stream by the
sum of d_j w_j over S (in families with a norm behind the MLP: by what that norm makes of it), and the outcome is read
off. No set costs a forward pass, and the norm and the log-sum-exp are applied to the sum, not to each neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.base.errors import InputError
from companion.mediation import outcomes
from companion.mediation.estimands import Batch
from companion.mediation.study import Study
from companion.model.architecture import Subject, written_vectors
from companion.model.interventions import projection
from companion.neurons.logit_contributions import Reads, cumulative_effects, joint_effects, products, reads
from companion.neurons.single import (
    BLOCK,
    Ends,
    PairEffects,
    difference,
    measure_chosen,
    residual_change,
    sign_on_discover,
)

PAIRS = 16  # pairs at once: few enough for what is made of them to stay in a cache


# Up to here the vectors' products with each other cost less than a vector for each set: members of a set, neurons of a layer.
FEW, SMALL = 32, 1024


EVERY = 512  # up to here every set size is measured


# Takes the change of every neuron, (pair, neuron); gives which columns, and the change of the MLP's output for each.
Writes = Callable[[Tensor], Iterator[tuple[np.ndarray, Tensor]]]


# Takes residual streams, neurons and their change; gives which columns, and the change of Y1 for each.
Scores = Callable[[Tensor, Tensor, Tensor], Iterator[tuple[np.ndarray, Tensor]]]


@dataclass(frozen=True)
class Measured:
    """Single-neuron effects by treatment (T2 - T2b behind the others) and the ends of the clean runs, for sets."""

    study: Study
    effects: Mapping[str, PairEffects]
    ends: Mapping[str, Ends]

    @property
    def last(self) -> int:
        """The last layer."""
        return self.study.subject.n_layers - 1


def measure_all(
    study: Study, columns: Mapping[str, pd.DataFrame], watch: Callable[[Batch], None] | None = None
) -> Measured:
    """`measure` for each treatment that `columns` names and the study has, and the contrast T2 - T2b where it can be."""
    return collected(
        study,
        {
            name: measure_chosen(study, name, wanted, watch)
            for name, wanted in columns.items()
            if name in study.treatments
        },
    )


def collected(study: Study, found: Mapping[str, tuple[PairEffects, Ends]]) -> Measured:
    """What was measured of each treatment, with the contrast T2 - T2b where it can be."""
    effects = {name: made for name, (made, _) in found.items()}
    if study.twins and {"T2", "T2b"} <= set(effects):
        effects["T2-T2b"] = difference(effects["T2"], effects["T2b"], study.twins)
    return Measured(study, effects, {name: ends for name, (_, ends) in found.items()})


def sizes(d_mlp: int) -> Int[np.ndarray, size]:
    """Set sizes from 1 to all neurons: every one up to 512, from there in steps of about 2 %."""
    more = np.geomspace(EVERY, max(d_mlp, EVERY), 1 + int(np.log(max(d_mlp / EVERY, 1)) / np.log(1.02)))
    return np.unique([*range(1, min(d_mlp, EVERY) + 1), *np.rint(more[more < d_mlp]).astype(int), d_mlp])


@torch.no_grad()
def joint(subject: Subject, ends: Ends, members: Int[np.ndarray, "set member"]) -> PairEffects:
    """NIE0 and NIE1 of each set of last-layer neurons, its members swapped together at the last token.

    Raises InputError if a set names a neuron twice or one that is not there.
    """
    members = np.asarray(members)
    is_double = members.ndim != 2 or bool((np.diff(np.sort(members, axis=1), axis=1) == 0).any())
    if is_double or members.min() < 0 or members.max() >= subject.d_mlp:
        raise InputError(
            f"sets of neurons {members.shape}: expected rows of different neurons of 0 to {subject.d_mlp - 1}"
        )
    vectors, known = _vectors(subject), reads(subject, ends.openers)
    step = max(1, BLOCK // (max(PAIRS, members.shape[1]) * subject.d_model))
    columns = pd.DataFrame({"set": range(len(members))})
    if known is not None and members.shape[1] <= FEW:
        return _effects(ends, columns, _joint_scores(known, torch.tensor(members, device=vectors.device), step))

    def writes(change: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        for first in range(0, len(members), step):
            part = torch.tensor(members[first : first + step], device=change.device)
            yield (
                np.arange(first, first + len(part)),
                torch.einsum("psm,smd->psd", change[:, part], vectors[part]),
            )

    return _effects(ends, columns, _formed(subject, ends, writes))


@torch.no_grad()
def cumulative(
    subject: Subject, ends: Ends, order: Int[np.ndarray, neuron], ks: Sequence[int] | Int[np.ndarray, size]
) -> PairEffects:
    """NIE0 and NIE1 of the first k neurons of an order together, for each k (increasing); a column is one k."""
    vectors, ks, known = _vectors(subject), np.asarray(ks), reads(subject, ends.openers)
    step = max(1, BLOCK // (PAIRS * subject.d_model))
    columns = pd.DataFrame({"k": ks})

    if known is not None and subject.d_mlp <= SMALL:
        first = torch.tensor(order[: int(ks[-1])].copy(), device=vectors.device)
        return _effects(ends, columns, _cumulative_scores(known, first, ks))

    def writes(change: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        total = change.new_zeros(len(change), 1, subject.d_model)
        for first in range(0, int(ks[-1]), step):
            part = torch.tensor(order[first : first + step].copy(), device=change.device)
            running = total + (change[:, part, None] * vectors[part]).cumsum(1)
            total = running[:, -1:]
            at = np.flatnonzero((ks > first) & (ks <= first + len(part)))
            yield at, running[:, ks[at] - first - 1]

    return _effects(ends, columns, _formed(subject, ends, writes))


@torch.no_grad()
def whole_layer(subject: Subject, ends: Ends, is_frozen: bool = False) -> PairEffects:
    """NIE0 and NIE1 of all last-layer neurons together, the MLP's whole output; a single column.

    With `is_frozen` the final norm keeps the scale of the control run in all four cells, TE's too.
    """
    like = ends.resid[0] if is_frozen else None
    write = (ends.neurons[1] - ends.neurons[0]) @ _vectors(subject)
    cells = [*ends.resid]
    for base, sign in ((0, 1), (1, -1)):
        moved = residual_change(subject, subject.n_layers - 1, ends.neurons[base], sign * write[:, None])[:, 0]
        cells.append(ends.resid[base] + moved)
    odds = [outcomes.log_odds(subject, cell, ends.openers, like).cpu().numpy()[:, None] for cell in cells]
    y00, y11, y01, y10 = odds
    pairs = ends.pairs.assign(te=(y11 - y00)[:, 0])
    return PairEffects(ends.treatment, pairs, pd.DataFrame({"set": [0]}), {"nie0": y01 - y00, "nie1": y11 - y10})


def _vectors(subject: Subject) -> Float[Tensor, "neuron d"]:
    return written_vectors(projection(subject.layers[-1], "neuron"))


def _joint_scores(known: Reads, members: Int[Tensor, "set member"], step: int) -> Scores:
    parts = [members[first : first + step] for first in range(0, len(members), step)]
    made = [(part, products(known, part), known.outputs[part]) for part in parts]

    def scores(resid: Tensor, _: Tensor, change: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        for i, (part, *theirs) in enumerate(made):
            yield i * step + np.arange(len(part)), joint_effects(known, resid, change, part, *theirs)

    return scores


def _cumulative_scores(known: Reads, order: Int[Tensor, neuron], ks: Int[np.ndarray, size]) -> Scores:
    theirs = products(known, order)

    def scores(resid: Tensor, _: Tensor, change: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        yield np.arange(len(ks)), cumulative_effects(known, resid, change, order, theirs)[:, ks - 1]

    return scores


def _formed(subject: Subject, ends: Ends, writes: Writes) -> Scores:
    """The change of Y1 from the change of the MLP's output, formed for each set."""

    def scores(resid: Tensor, neurons: Tensor, change: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        start = outcomes.log_odds(subject, resid[:, None], ends.openers)
        for at, write in writes(change):
            moved = resid[:, None] + residual_change(subject, subject.n_layers - 1, neurons, write)
            yield at, outcomes.log_odds(subject, moved, ends.openers) - start

    return scores


def _effects(ends: Ends, columns: pd.DataFrame, scores: Scores) -> PairEffects:
    values = {}
    for name, base, sign in (("nie0", 0, 1), ("nie1", 1, -1)):
        found = np.empty((len(ends.pairs), len(columns)))
        for first in range(0, len(found), PAIRS):
            rows = slice(first, first + PAIRS)
            resid, neurons, others = ends.resid[base, rows], ends.neurons[base, rows], ends.neurons[1 - base, rows]
            for at, change in scores(resid, neurons, others - neurons):
                found[rows, at] = sign * change.cpu().numpy()
        values[name] = found
    return PairEffects(ends.treatment, ends.pairs, columns, values)


def on_contrast(measured: Measured, treatment: str, split: str, apply: Callable[[Ends], PairEffects]) -> PairEffects:
    """A measurement of sets on one split of a treatment or of the contrast T2 - T2b, signed by TE on discover."""
    sign = sign_on_discover(measured.effects[treatment].pairs)
    harmful = _in_split(measured.ends[treatment.removesuffix("-T2b")], split)
    made = apply(harmful)
    if treatment.endswith("-T2b"):
        needed = set(harmful.pairs.pair_id.map(measured.study.twins).dropna())
        twin = measured.ends["T2b"]
        made = difference(made, apply(_only(twin, twin.pairs.pair_id.isin(needed).to_numpy())), measured.study.twins)
    values = {name: sign * array for name, array in made.values.items()}
    return replace(made, pairs=made.pairs.assign(te=sign * made.pairs.te), values=values)


def _in_split(ends: Ends, split: str) -> Ends:
    return ends if split == "all" else _only(ends, (ends.pairs.split == split).to_numpy())


def _only(ends: Ends, keep: np.ndarray) -> Ends:
    at = torch.tensor(np.flatnonzero(keep), device=ends.resid.device)
    pairs = ends.pairs[keep].reset_index(drop=True)
    return replace(ends, pairs=pairs, resid=ends.resid[:, at], neurons=ends.neurons[:, at])
