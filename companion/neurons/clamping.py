"""Gate or contributor: the four cells of the factorial experiments on a set of neurons, at the last token.

Two experiments, each with two switches. *Upstream*: the prompt (control, treated) against the set (closed: its values of
the control run; open: those of the treated run). *Inside*: the gate pre-activations of the set against its up
pre-activations, where neurons are a product, act(gate) * up. Every value comes from one of the pair's own two runs. Sets of
the last layer need no more than its own sites at the last token, of pairs of any lengths together (`LastLayerCache`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from companion.base.device import to_host
from companion.base.display import progress
from companion.base.errors import InputError
from companion.mediation import estimands, outcomes
from companion.mediation.estimands import CELLS, Batch
from companion.model import replay
from companion.model.activations import CleanRun, first, on_output
from companion.model.architecture import Subject
from companion.model.interventions import Patch, position_mask
from companion.prompts.tokens import Openers, TokenPair

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "neurons")
ROUNDINGS = 64  # neurons are a product up to this many of the type's roundings of the largest one
OUTCOMES = ("Y1", "Y1.frozen", "contrast.frozen")
Rows = dict[str, np.ndarray]  # columns of a table, by name


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

    def at(self, index: Any) -> Product:
        """Some entries of both factors."""
        return replace(self, gate=self.gate[index], up=self.up[index])


@dataclass(frozen=True)
class LastLayerCache:
    """The last layer of both clean runs at the last token, as runs of a single token; `factors` (control, treated), if known."""

    batch: Batch
    factors: tuple[Product, Product] | None

    def only(self, rows: Sequence[int]) -> LastLayerCache:
        """Some of the pairs."""
        at, sides = list(rows), (self.batch.control, self.batch.treated)
        factors = self.factors and (self.factors[0].at(at), self.factors[1].at(at))
        return LastLayerCache(Batch(tuple(self.batch.pairs[i] for i in at), *(run.rows(at) for run in sides)), factors)


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
    seen, parts = list[Tensor](), subject.layers[layer]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(on_output(getattr(parts.mlp, name), lambda out: seen.append(first(out)[:, -1])))
        parts.block(run.resid_pre[layer], **run.calls[layer])
    gate, up = seen if len(seen) == 2 else seen[0].chunk(2, dim=-1)
    return gate, up


def last_column(run: CleanRun) -> CleanRun:
    """The last layer's sites at the last token, as a run of a single token; what lies below is empty."""
    kept: dict[str, Any] = {}
    for name in SITES:
        *lower, last = getattr(run, name)
        # Copies, or the slices would keep the whole run alive.
        kept[name] = (*(layer[:0].clone() for layer in lower), last[:, -1:].clone())
    return replace(run, tokens=run.tokens[:, -1:], keys=(), values=(), calls=(), **kept)


def _joined(caches: Sequence[LastLayerCache]) -> LastLayerCache:
    """The caches of all batches of one treatment as one."""
    pairs = tuple(pair for one in caches for pair in one.batch.pairs)
    runs = zip(*((one.batch.control, one.batch.treated) for one in caches), strict=True)
    control, treated = (reduce(CleanRun.above, side) for side in runs)
    factors = [
        Product(torch.cat([one.gate for one in side]), torch.cat([one.up for one in side]), side[0].act)
        for side in zip(*(one.factors for one in caches if one.factors), strict=True)
    ]
    return LastLayerCache(Batch(pairs, control, treated), (factors[0], factors[1]) if factors else None)


def four_cells(
    subject: Subject, pairs: Sequence[TokenPair], openers: Mapping[str, Openers], sets: Sequence[NeuronSet],
    inside: Sequence[str] | None = None, caches: dict[str, LastLayerCache] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """One row for each pair, set, form and outcome: the four cells, first digit the first switch of the form.

    Forms: "upstream", "write" (upstream, but only what the set itself writes into the last residual stream changes;
    contrast.frozen) and "inside" (the mean over both runs as the background; no rows where neurons are no product; for
    the sets named in `inside`, by default all). `te` is the outcome's total effect in every row. A treatment whose pairs
    are in `caches` is not run again if all sets are of the last layer; caches of the others are added.
    """
    last, caches = subject.n_layers - 1, {} if caches is None else caches
    below, top = ([one for one in sets if (one.layer < last) == is_below] for is_below in (True, False))
    split = [one for one in sets if inside is None or one.name in inside]
    treatments = sorted({one.pair.treatment for one in pairs})
    ids = {name: {one.pair.id for one in pairs if one.pair.treatment == name} for name in treatments}
    known = {name for name, one in caches.items() if {pair.pair.id for pair in one.batch.pairs} == ids.get(name)}
    wanted = [pair for pair in pairs if below or pair.pair.treatment not in known]
    rows, made = list[Rows](), dict[str, list[LastLayerCache]]()
    for group in progress(estimands.batches(wanted, subject), desc="gates"):
        batch, treatment = estimands.run_clean(subject, group), group[0].pair.treatment
        factors = {layer: product(subject, batch, layer) for layer in {one.layer for one in split}}
        of_sets = {one: factors[one.layer] for one in below if one in split}
        rows += _rows(subject, batch, openers[treatment], below, of_sets)
        column = Batch(batch.pairs, last_column(batch.control), last_column(batch.treated))
        made.setdefault(treatment, []).append(LastLayerCache(column, factors.get(last)))
        del batch  # before the next one is made
    caches |= {name: _joined(some) for name, some in made.items()}
    for name in treatments:
        of_sets = {one: caches[name].factors for one in top if one in split}
        rows += _rows(subject, caches[name].batch, openers[name], top, of_sets)
    return table_of(rows)


def _rows(
    subject: Subject, batch: Batch, openers: Openers, sets: Sequence[NeuronSet],
    factors: Mapping[NeuronSet, tuple[Product, Product] | None],
) -> list[Rows]:  # fmt: skip
    """Rows of every form; `factors` of the sets that are split into gate and up."""
    if not sets:
        return []
    runs, made = (batch.control, batch.treated), []
    patches = [Patch("neuron", one.layer, position_mask(runs[0].tokens, -1), one.neurons) for one in sets]
    control, treated = (run.resid_post[-1][:, -1, None, None] for run in runs)  # (pair, set, cell, d)
    forms = {"upstream": (replay.interchange, OUTCOMES), "write": (replay.direct, ("contrast.frozen",))}
    for form, (effect, names) in forms.items():
        moved = [effect(subject, runs[base], runs[1 - base], patches)[:, :, 0] for base in (0, 1)]
        off, on = (clean[:, :, 0].expand_as(moved[0]) for clean in (control, treated))
        four = torch.stack([off, *moved, on], dim=2)  # y00, y01, y10, y11
        for name in names:
            found = outcomes.named_outcome(subject, four, control, treated, openers, name)
            made += [_rows_of(batch, one, form, name, found[:, i]) for i, one in enumerate(sets)]
    crossings = {}
    for one, factors_of in factors.items():
        if factors_of is not None:
            closed, opened = (side.at((slice(None), list(one.neurons))) for side in factors_of)
            crossings[one] = crossed((closed.gate, opened.gate), (closed.up, opened.up), opened.act)
    return made + (clamped_products(subject, batch, openers, "inside", crossings) if crossings else [])


def crossed(gates: tuple[Tensor, Tensor], ups: tuple[Tensor, Tensor], act: nn.Module) -> list[Tensor]:
    """What neurons are with each gate (off, on) against each up (off, on), as values of a patch."""
    return [(act(gate) * up)[:, None] for gate in gates for up in ups]


def clamped_products(
    subject: Subject, batch: Batch, openers: Openers, form: str, crossings: Mapping[NeuronSet, Sequence[Tensor]]
) -> list[Rows]:
    """Rows of a form from the values of `crossed` for each set: the mean over both backgrounds, with their own TE."""
    runs, at = (batch.control, batch.treated), position_mask(batch.control.tokens, -1)
    patches = [Patch("neuron", one.layer, at, one.neurons, value) for one in crossings for value in crossings[one]]
    shape = (len(crossings), len(CELLS))
    backgrounds = [replay.interchange(subject, run, run, patches)[:, :, 0].unflatten(1, shape) for run in runs]
    clean, made = [run.resid_post[-1][:, -1, None, None] for run in runs], []
    for name in OUTCOMES:
        score = partial(outcomes.named_outcome, subject, control=clean[0], treated=clean[1], openers=openers, name=name)
        four = torch.stack([score(cells) for cells in backgrounds]).mean(0)
        control, treated = score(torch.cat(clean, dim=2))[:, 0].unbind(1)
        made += [_rows_of(batch, one, form, name, four[:, i], treated - control) for i, one in enumerate(crossings)]
    return made


def _rows_of(batch: Batch, one: NeuronSet, form: str, outcome: str, four: Tensor, te: Tensor | None = None) -> Rows:
    values, n, columns = to_host(four.double()), len(batch.pairs), estimands.pair_columns(batch.pairs)
    columns |= {"set": np.full(n, one.name, object), "layer": np.full(n, one.layer)}
    columns |= {"form": np.full(n, form, object), "outcome": np.full(n, outcome, object)}
    columns |= dict(zip(CELLS, values.T, strict=True))
    return columns | {"te": values[:, 3] - values[:, 0] if te is None else to_host(te.double())}


def table_of(rows: Sequence[Rows]) -> pd.DataFrame:
    """One table of the rows of all batches, made at once: a frame for each would cost more than what it holds."""
    return pd.DataFrame({name: np.concatenate([part[name] for part in rows]) for name in rows[0]})
