"""What the last layer needs of clean runs: its own sites at the last token, of pairs of any lengths together.

Nothing above the last layer reads another token, so an intervention there on the last token needs no more than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.grid_run import CleanRun, Layers, first, on_output
from helpers.mediation import Batch
from helpers.subject import Subject

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "neurons")
# A product is found to be one by arithmetic: relative to the largest neuron, in units of the type's rounding.
ROUNDINGS = 64


@dataclass(frozen=True)
class NeuronSet:
    """Neurons of one layer that are clamped together, at the last token."""

    name: str
    layer: int
    neurons: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """The two factors of a layer's neurons at the last token: `act`(gate) * up."""

    gate: Float[Tensor, "pair neuron"]
    up: Float[Tensor, "pair neuron"]
    act: nn.Module

    def only(self, one: NeuronSet) -> Product:
        """The factors of a set's neurons alone."""
        index = list(one.neurons)
        return Product(self.gate[:, index], self.up[:, index], self.act)


@dataclass(frozen=True)
class End:
    """Pairs of one treatment, whatever their length, in the last layer at the last token: a batch of `last_column`, and the
    factors of its neurons (control, treated) where they were asked for and neurons are products.
    """

    batch: Batch
    factors: tuple[Product, Product] | None


def product(subject: Subject, batch: Batch, layer: int) -> tuple[Product, Product] | None:
    """Gate and up pre-activations of the control and the treated run; None for an MLP whose neurons are no product.

    Raises InputError if the MLP has both projections but its neurons are not act(gate) * up.
    """
    mlp = subject.layers[layer].mlp
    act = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    names = [name for name in ("gate_proj", "up_proj", "gate_up_proj") if hasattr(mlp, name)]
    if act is None or not names:
        return None
    found = []
    for run in (batch.control, batch.treated):
        made = Product(*_factors(subject, run, layer, names), act)
        neurons = run.site("neuron", layer)[:, -1]
        slack = ROUNDINGS * torch.finfo(neurons.dtype).eps * float(neurons.abs().max())
        if not torch.allclose(act(made.gate) * made.up, neurons, rtol=0, atol=slack):
            raise InputError(f"the neurons of layer {layer} are not act(gate) * up: leave out the test inside a neuron")
        found.append(made)
    return found[0], found[1]


@torch.no_grad()
def _factors(subject: Subject, run: CleanRun, layer: int, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Both projections' outputs at the last token, from the one block run again."""
    seen: list[Tensor] = []
    parts = subject.layers[layer]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(on_output(getattr(parts.mlp, name), lambda out: seen.append(first(out)[:, -1])))
        parts.block(run.resid_pre[layer], **run.calls[layer])
    gate, up = seen if len(seen) == 2 else seen[0].chunk(2, dim=-1)
    return gate, up


def still(subject: Subject) -> Subject:
    """The subject for interventions on an end: no layer is called, so none must be replayable."""
    return replace(subject, replayable=True)


def last_column(batch: Batch) -> Batch:
    """The last layer's sites at the last token, as runs of a single token; what lies below is empty."""
    return replace(batch, control=_last_column(batch.control), treated=_last_column(batch.treated))


def _last_column(run: CleanRun) -> CleanRun:
    def top(layers: Layers) -> Layers:
        # A copy, or the slice would keep the whole run alive.
        return tuple(
            tensor[:, -1:].clone() if i == len(layers) - 1 else tensor[:0].clone() for i, tensor in enumerate(layers)
        )

    kept = {name: top(getattr(run, name)) for name in SITES}
    return replace(run, tokens=run.tokens[:, -1:], mask=None, keys=(), values=(), calls=(), **kept)


def joined_batch(batches: Sequence[Batch]) -> Batch:
    """Several batches of `last_column` as one."""
    pairs = tuple(pair for batch in batches for pair in batch.pairs)
    return Batch(pairs, *(_joined([getattr(batch, side) for batch in batches]) for side in ("control", "treated")))


def _joined(runs: Sequence[CleanRun]) -> CleanRun:
    kept: dict[str, Any] = {
        name: tuple(map(_cat, zip(*(getattr(run, name) for run in runs), strict=True))) for name in SITES
    }
    return replace(runs[0], tokens=_cat([run.tokens for run in runs]), **kept)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors[0]) else tensors[0]


def only(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some pairs of a batch of `last_column`."""
    at = list(rows)

    def chosen(run: CleanRun) -> CleanRun:
        kept: dict[str, Any] = {name: tuple(t[at] if len(t) else t for t in getattr(run, name)) for name in SITES}
        return replace(run, tokens=run.tokens[at], **kept)

    return Batch(tuple(batch.pairs[i] for i in at), chosen(batch.control), chosen(batch.treated))


def end_of(subject: Subject, batch: Batch) -> End:
    """What last-layer sets need of a batch, its factors among it."""
    return End(last_column(batch), product(subject, batch, subject.n_layers - 1))


def keep(subject: Subject, ends: list[tuple[str, End]], batch: Batch) -> None:
    """Put a batch's end behind the others, with its treatment."""
    ends.append((batch.pairs[0].pair.treatment, end_of(subject, batch)))


def by_treatment(ends: Sequence[tuple[str, End]]) -> dict[str, End]:
    """What `keep` has gathered, joined."""
    names = dict.fromkeys(name for name, _ in ends)
    return {name: joined([end for other, end in ends if other == name]) for name in names}


def joined(ends: Sequence[End]) -> End:
    """The ends of all batches of a treatment as one."""
    batch, first = joined_batch([end.batch for end in ends]), ends[0].factors
    if first is None:
        return End(batch, None)
    sides = zip(*(end.factors for end in ends if end.factors), strict=True)
    off, on = (
        Product(torch.cat([one.gate for one in side]), torch.cat([one.up for one in side]), first[0].act)
        for side in sides
    )
    return End(batch, (off, on))
