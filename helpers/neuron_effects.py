"""Measuring neurons: NIE0, NIE1 and direct effect of many single neurons at the last token, all of them exact.

The last layer has a closed form, other layers go through the grid of cells, and layers that no difference can have
reached are exact zeros that cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers import closed_form, mediation, outcomes
from helpers.errors import InputError
from helpers.evidence import SATURATED
from helpers.grid import CleanRun
from helpers.grid_neurons import each_neuron
from helpers.grid_patch import projection
from helpers.mediation import Batch
from helpers.neurons import PairEffects
from helpers.progress import progress
from helpers.study import Study
from helpers.subject import Subject
from helpers.subject_parts import written_vectors
from helpers.tokens import Openers, TokenPair

SATURATION = np.log((1 - SATURATED) / SATURATED)
BLOCK = 1 << 24  # numbers that are alive at once


@dataclass(frozen=True)
class Ends:
    """What the last layer needs of both clean runs of some pairs, at the last token; side 0 is control, 1 treated."""

    treatment: str
    pairs: pd.DataFrame
    openers: Openers
    resid: Float[Tensor, "side pair d"]
    neurons: Float[Tensor, "side pair neuron"]


@dataclass(frozen=True)
class Part:
    """One batch's pairs, effects by name (pair, column) with both clean outcomes, and ends."""

    pairs: tuple[TokenPair, ...]
    values: dict[str, np.ndarray]
    resid: Float[Tensor, "side pair d"]
    neurons: Float[Tensor, "side pair neuron"]


def all_neurons(subject: Subject, layers: Sequence[int] | None = None) -> pd.DataFrame:
    """One row (layer, neuron) for every neuron of the layers (all by default).

    Raises InputError for a model whose MLPs have no neurons to name (a mixture of experts).
    """
    chosen = range(subject.n_layers) if layers is None else layers
    for layer in chosen:
        projection(subject.layers[layer], "neuron")
    index = pd.MultiIndex.from_product([list(chosen), range(subject.d_mlp)], names=["layer", "neuron"])
    return index.to_frame(index=False)


def measure(
    study: Study, treatment: str, columns: pd.DataFrame, watch: Callable[[Batch], None] | None = None
) -> tuple[PairEffects, Ends]:
    """NIE0, NIE1 and direct effect of the neurons in `columns` (layer, neuron) on every pair of a treatment, on Y1.

    The direct effect is the neuron's own write into the final residual stream, everything above it held and the final
    norm's scale frozen at the base run's; it is the mean of both directions. For the last layer that is its NIE but for
    the norm; for other layers it leaves out whatever later layers make of the write. `watch` is shown every batch of clean
    runs.
    """
    groups = mediation.batches(study.of(treatment), study.subject)
    if not groups:
        raise InputError(f"the study has no pairs of {treatment}: it has {', '.join(study.treatments)}")
    parts = []
    for group in progress(groups, desc=f"neurons, {treatment}"):
        batch = mediation.run_clean(study.subject, group)
        parts.append(part_of(study, batch, columns))
        if watch:
            watch(batch)
    return assembled(study, treatment, columns, parts)


def part_of(study: Study, batch: Batch, columns: pd.DataFrame) -> Part:
    """What `measure` takes from one batch of clean runs."""
    found = _batch_effects(study.subject, batch, columns, study.openers[batch.pairs[0].pair.treatment])
    runs = (batch.control, batch.treated)
    resid, neurons = (
        torch.stack([getattr(run, name)[-1][:, -1] for run in runs]) for name in ("resid_post", "neurons")
    )
    return Part(batch.pairs, found, resid, neurons)


def assembled(study: Study, treatment: str, columns: pd.DataFrame, parts: Sequence[Part]) -> tuple[PairEffects, Ends]:
    """What `measure` gives, from the parts of all batches of a treatment."""
    joined = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
    members = [token_pair.pair for part in parts for token_pair in part.pairs]
    named = [(pair.id, pair.topic, pair.split) for pair in members]
    y00, y11 = joined.pop("y00"), joined.pop("y11")
    pairs = pd.DataFrame(named, columns=["pair_id", "topic", "split"]).assign(
        te=y11 - y00, unsaturated=np.maximum(abs(y00), abs(y11)) <= SATURATION
    )
    made = PairEffects(treatment, pairs, columns.reset_index(drop=True), joined)
    resid, neurons = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("resid", "neurons"))
    return made, Ends(treatment, pairs, study.openers[treatment], resid, neurons)


def _batch_effects(
    subject: Subject, batch: Batch, columns: pd.DataFrame, openers: Openers
) -> dict[str, Float[np.ndarray, "pair column"]]:
    control, treated = batch.control, batch.treated
    # The shape of the grid's own read-out, so that a patch that changes nothing has an effect of exactly 0.
    clean = [outcomes.log_odds(subject, run.resid_post[-1][:, None, -1:], openers)[:, 0] for run in (control, treated)]
    shape = (len(batch.pairs), len(columns))
    found = {name: np.zeros(shape) for name in ("nie0", "nie1", "direct")}
    found["y00"], found["y11"] = (odds[:, 0].cpu().numpy() for odds in clean)
    layers, neurons = columns["layer"].to_numpy(), columns["neuron"].to_numpy()
    for layer in np.unique(layers):
        if torch.equal(control.neurons[layer][:, -1], treated.neurons[layer][:, -1]):
            continue  # no difference has reached this layer: exact zeros
        at = np.flatnonzero(layers == layer)
        chosen = torch.tensor(neurons[at], device=subject.device)
        for base, source, start, sign, name in (
            (control, treated, clean[0], 1, "nie0"),
            (treated, control, clean[1], -1, "nie1"),
        ):
            after = _after_each(subject, base, source, int(layer), chosen, openers)
            found[name][:, at] = sign * (after - start).cpu().numpy()
            own = _own_write(subject, base, source, int(layer), chosen, openers)
            found["direct"][:, at] += sign * (own - start).cpu().numpy() / 2
    return found


def _after_each(
    subject: Subject, base: CleanRun, source: CleanRun, layer: int, chosen: Int[Tensor, "neuron"], openers: Openers
) -> Float[Tensor, "pair neuron"]:
    """Y1 after each chosen neuron, on its own, is set to the source's at the last token."""
    if layer == subject.n_layers - 1:
        every = closed_form.last_layer_log_odds(subject, base, source, openers.comply, openers.refuse)
        return every[:, chosen]
    return each_neuron(subject, base, source, layer, chosen, lambda resid: outcomes.log_odds(subject, resid, openers))


def _own_write(
    subject: Subject, base: CleanRun, source: CleanRun, layer: int, chosen: Int[Tensor, "neuron"], openers: Openers
) -> Float[Tensor, "pair neuron"]:
    """Y1 if only what the neuron itself writes reaches the final norm, whose scale stays the base's."""
    resid = base.resid_post[-1][:, None, -1]
    vectors = written_vectors(projection(subject.layers[layer], "neuron"))[chosen]
    change = (source.neurons[layer] - base.neurons[layer])[:, -1, chosen]
    step = max(1, BLOCK // max(1, change.shape[0] * subject.d_model))
    read = []
    for first, end in pairwise([*range(0, len(chosen), step), len(chosen)]):
        writes = change[:, first:end, None] * vectors[first:end]
        moved = resid + residual_change(subject, layer, base.neurons[layer][:, -1], writes)
        read.append(outcomes.log_odds(subject, moved, openers, norm_like=resid))
    return torch.cat(read, dim=1)


def residual_change(
    subject: Subject,
    layer: int,
    neurons: Float[Tensor, "pair neuron"],
    change: Float[Tensor, "pair set d"],
) -> Float[Tensor, "pair set d"]:
    """What an MLP adds to the residual stream beyond its clean write, if its down projection's output changes.

    That is the change itself, except in families that normalise what the MLP writes. `neurons` are the clean inputs of
    the down projection.
    """
    parts = subject.layers[layer]
    if parts.mlp_post is None:
        return change
    raw = projection(parts, "neuron")(neurons)[:, None]
    return torch.as_tensor(parts.mlp_post(raw + change) - parts.mlp_post(raw))
