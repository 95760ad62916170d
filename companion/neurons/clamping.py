"""What the last layer needs of clean runs: its own sites at the last token, of pairs of any lengths together.

Nothing above the last layer reads another token, so an intervention there on the last token needs no more than this.

Gate or contributor: the four cells of the factorial experiments on a set of neurons.

Two experiments, each with two switches. *Upstream*: the prompt (control, treated) against the set (closed: its values of
the control run; open: those of the treated run). *Inside*: the gate pre-activations of the set against its up
pre-activations, in families whose neurons are a product, act(gate) * up. Every value that is clamped is taken from one of
the pair's own two runs; nothing is set to zero.

Gate or contributor: tests on whole answers, teacher-forced: when a set acts, and what closing it costs elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from companion.base.display import progress
from companion.base.errors import InputError
from companion.mediation import estimands, outcomes
from companion.mediation.estimands import Batch, batches, prompt_tokens
from companion.model import activations, replay
from companion.model.activations import CleanRun, Layers, first, on_output
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.prompts.tokens import Openers, TokenPair

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
class LastLayerCache:
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


def end_of(subject: Subject, batch: Batch) -> LastLayerCache:
    """What last-layer sets need of a batch, its factors among it."""
    return LastLayerCache(last_column(batch), product(subject, batch, subject.n_layers - 1))


def keep(subject: Subject, ends: list[tuple[str, LastLayerCache]], batch: Batch) -> None:
    """Put a batch's end behind the others, with its treatment."""
    ends.append((batch.pairs[0].pair.treatment, end_of(subject, batch)))


def by_treatment(ends: Sequence[tuple[str, LastLayerCache]]) -> dict[str, LastLayerCache]:
    """What `keep` has gathered, joined."""
    names = dict.fromkeys(name for name, _ in ends)
    return {name: joined([end for other, end in ends if other == name]) for name in names}


def joined(ends: Sequence[LastLayerCache]) -> LastLayerCache:
    """The ends of all batches of a treatment as one."""
    batch, first = joined_batch([end.batch for end in ends]), ends[0].factors
    if first is None:
        return LastLayerCache(batch, None)
    sides = zip(*(end.factors for end in ends if end.factors), strict=True)
    off, on = (
        Product(torch.cat([one.gate for one in side]), torch.cat([one.up for one in side]), first[0].act)
        for side in sides
    )
    return LastLayerCache(batch, (off, on))


# As they are; with the final norm's scale frozen; and with a linear read-out in the log-odds' place as well.
OUTCOMES = ("Y1", "Y1.frozen", "contrast.frozen")


CELLS = ("y00", "y01", "y10", "y11")


Rows = dict[str, np.ndarray]  # columns of a table, by name


def cells(
    subject: Subject,
    pairs: Sequence[TokenPair],
    openers: Mapping[str, Openers],
    sets: Sequence[NeuronSet],
    inside: Sequence[str] | None = None,
) -> pd.DataFrame:
    """One row for each pair, set, form and outcome: the four cells, first digit the first switch of the form.

    Forms: "upstream", "write" (upstream, but only what the set itself writes into the last residual stream changes;
    contrast.frozen) and "inside" (the mean over both runs as the background; no rows where neurons are no product; for
    the sets named in `inside`, by default all). `te` is the outcome's total effect in every row.
    """
    return measured(subject, pairs, openers, sets, inside)[0]


def measured(
    subject: Subject,
    pairs: Sequence[TokenPair],
    openers: Mapping[str, Openers],
    sets: Sequence[NeuronSet],
    inside: Sequence[str] | None = None,
) -> tuple[pd.DataFrame, dict[str, LastLayerCache]]:
    """The table of `cells`, and what it kept of the last layer, by treatment."""
    rows: list[Rows] = []
    split = [one for one in sets if inside is None or one.name in inside]
    below = [one for one in sets if one.layer < subject.n_layers - 1]
    kept: list[tuple[str, LastLayerCache]] = []
    for group in progress(estimands.batches(pairs, subject), desc="gates"):
        batch, name = estimands.run_clean(subject, group), group[0].pair.treatment
        factors = {layer: product(subject, batch, layer) for layer in {one.layer for one in split}}
        rows += _rows(subject, batch, openers[name], below, {one: factors[one.layer] for one in below if one in split})
        kept.append((name, LastLayerCache(last_column(batch), factors.get(subject.n_layers - 1))))
        del batch  # before the next one is made
    ends = by_treatment(kept)
    for name, end in ends.items():
        rows += _top_rows(subject, end, openers[name], sets, split)
    return table_of(rows), ends


def of_end(
    subject: Subject, end: LastLayerCache, openers: Openers, sets: Sequence[NeuronSet], inside: Sequence[str]
) -> pd.DataFrame:
    """The table of `cells` for one treatment whose end is known; sets below the last layer are left out."""
    return table_of(_top_rows(subject, end, openers, sets, [one for one in sets if one.name in inside]))


def _top_rows(
    subject: Subject, end: LastLayerCache, openers: Openers, sets: Sequence[NeuronSet], split: Sequence[NeuronSet]
) -> list[Rows]:
    top = [one for one in sets if one.layer == subject.n_layers - 1]
    return _rows(still(subject), end.batch, openers, top, {one: end.factors for one in top if one in split})


def _rows(
    subject: Subject,
    batch: Batch,
    openers: Openers,
    sets: Sequence[NeuronSet],
    factors: Mapping[NeuronSet, tuple[Product, Product] | None],
) -> list[Rows]:
    """Rows of every form; `factors` of the sets that are split into gate and up."""
    products = {one: found for one, found in factors.items() if found is not None}
    upstream = _upstream(subject, batch, openers, sets) if sets else []
    return upstream + _inside(subject, batch, openers, products)


def last_token(batch: Batch) -> Bool[Tensor, "pair pos"]:
    """The mask of the last token."""
    mask = torch.zeros_like(batch.control.tokens, dtype=torch.bool)
    mask[:, -1] = True
    return mask


def _upstream(subject: Subject, batch: Batch, openers: Openers, sets: Sequence[NeuronSet]) -> list[Rows]:
    runs = (batch.control, batch.treated)
    patches = [Patch("neuron", one.layer, last_token(batch), one.neurons) for one in sets]
    clean = [run.resid_post[-1][:, -1] for run in runs]
    made = []
    for form, effect, names in (
        ("upstream", replay.interchange, OUTCOMES),
        ("write", replay.direct, ("contrast.frozen",)),
    ):
        moved = [effect(subject, runs[base], runs[1 - base], patches)[:, :, 0] for base in (0, 1)]
        off, on = (one[:, None].expand_as(moved[0]) for one in clean)
        four = torch.stack([off, *moved, on], dim=2)  # y00, y01, y10, y11
        for name in names:
            found = _score(subject, four, clean, openers, name)
            made += [rows_of(batch, one, form, name, found[:, i]) for i, one in enumerate(sets)]
    return made


def _inside(
    subject: Subject, batch: Batch, openers: Openers, products: Mapping[NeuronSet, tuple[Product, Product]]
) -> list[Rows]:
    crossings = {}
    for one, factors in products.items():
        off, on = (made.only(one) for made in factors)
        crossings[one] = crossed((off.gate, on.gate), (off.up, on.up), on.act)
    return clamp_products(subject, batch, openers, "inside", crossings) if crossings else []


def crossed(gates: tuple[Tensor, Tensor], ups: tuple[Tensor, Tensor], act: nn.Module) -> list[Tensor]:
    """What neurons are with each gate (off, on) against each up (off, on), as values of a patch."""
    return [(act(gate) * up)[:, None] for gate in gates for up in ups]


def clamp_products(
    subject: Subject, batch: Batch, openers: Openers, form: str, crossings: Mapping[NeuronSet, Sequence[Tensor]]
) -> list[Rows]:
    """Rows of a form from the values of `crossed` for each set: the mean over both backgrounds, with their own TE."""
    runs = (batch.control, batch.treated)
    at = last_token(batch)
    patches = [
        Patch("neuron", one.layer, at, one.neurons, value) for one, values in crossings.items() for value in values
    ]
    backgrounds = [
        replay.interchange(subject, run, run, patches)[:, :, 0].unflatten(1, (len(crossings), len(CELLS)))
        for run in runs
    ]
    clean, made = [run.resid_post[-1][:, -1] for run in runs], []
    for name in OUTCOMES:
        four = torch.stack([_score(subject, cell, clean, openers, name) for cell in backgrounds]).mean(0)
        control, treated = _score(subject, torch.stack(clean, dim=1)[:, None], clean, openers, name)[:, 0].unbind(1)
        made += [rows_of(batch, one, form, name, four[:, i], treated - control) for i, one in enumerate(crossings)]
    return made


def _score(
    subject: Subject, resid: Float[Tensor, "pair set cell d"], clean: Sequence[Tensor], openers: Openers, name: str
) -> Float[Tensor, "pair set cell"]:
    control, treated = (one[:, None, None] for one in clean)
    like = control if name.endswith(".frozen") else None
    if name.startswith("contrast"):
        weights = outcomes.opener_weights(subject, control, treated, openers)
        return outcomes.contrast(subject, resid, openers, like, weights)
    return outcomes.log_odds(subject, resid, openers, like)


def rows_of(batch: Batch, one: NeuronSet, form: str, outcome: str, four: Tensor, te: Tensor | None = None) -> Rows:
    """Rows of `cells` for one batch, set, form and outcome from its four cells."""
    values = four.double().cpu().numpy()
    members = [token_pair.pair for token_pair in batch.pairs]
    keys = {"pair_id": "id", "topic": "topic", "treatment": "treatment", "split": "split"}
    columns = {name: np.array([getattr(pair, field) for pair in members], object) for name, field in keys.items()}
    constant = {"set": one.name, "layer": one.layer, "form": form, "outcome": outcome}
    columns |= {
        name: np.full(len(members), value, None if name == "layer" else object) for name, value in constant.items()
    }
    columns |= {name: values[:, i] for i, name in enumerate(CELLS)}
    columns["te"] = values[:, 3] - values[:, 0] if te is None else te.double().cpu().numpy()
    return columns


def table_of(rows: Sequence[Rows]) -> pd.DataFrame:
    """One table of the rows of all batches, made at once: a frame for each would cost more than what it holds."""
    return pd.DataFrame({name: np.concatenate([part[name] for part in rows]) for name in rows[0]})


STEPS = 12  # tokens of an answer, its opener included


def timing(
    subject: Subject, pairs: Sequence[TokenPair], openers: Mapping[str, Openers], sets: Sequence[NeuronSet]
) -> pd.DataFrame:
    """Effect (mean of both directions, nats) of each set on log p(answer) - log p(refusal), teacher-forced.

    `first` clamps the set where the first answer token is decided only, `every` there and at every later answer token.
    Answer and refusal are the model's own words (`outcomes.continuations`), the same for all runs of a pair.
    """
    rows: list[tuple[object, ...]] = []
    for group in progress(batches(pairs, subject, mixed=True), desc="timing"):
        prompts = prompt_tokens(subject, group)
        texts = outcomes.continuations(subject, *prompts, [openers[pair.pair.treatment] for pair in group], STEPS)
        effect = _forced(subject, prompts, texts.answer, texts.answer_mask, sets)
        effect -= _forced(subject, prompts, texts.refusal, texts.refusal_mask, sets)
        for i, token_pair in enumerate(group):
            pair = token_pair.pair
            keys = (pair.id, pair.topic, pair.treatment, pair.split)
            rows += [(*keys, one.name, one.layer, *effect[i, k]) for k, one in enumerate(sets)]
    names = ["pair_id", "topic", "treatment", "split", "set", "layer", "first", "every"]
    return pd.DataFrame(rows, columns=names).assign(form="timing", outcome="Y2")


def _forced(
    subject: Subject,
    prompts: tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair pos"]],
    tokens: Int[Tensor, "pair step"],
    mask: Bool[Tensor, "pair step"],
    sets: Sequence[NeuronSet],
) -> Float[np.ndarray, "pair set when"]:
    """Effects on log p of one continuation, clamped at the first or at every one of its tokens."""
    start, n_steps = prompts[0].shape[1] - 1, tokens.shape[1]
    runs = [activations.clean_run(subject, torch.cat([prompt, tokens[:, :-1]], dim=1)) for prompt in prompts]
    patches = [
        Patch("neuron", one.layer, _between(runs[0], start, end), one.neurons)
        for one in sets
        for end in (start + 1, start + n_steps)
    ]
    read = range(start, start + n_steps)
    both = []
    for base, source, sign in ((runs[0], runs[1], 1), (runs[1], runs[0], -1)):
        clean = outcomes.sequence_log_prob(subject, base.resid_post[-1][:, None, list(read)], tokens, mask)
        resid = replay.interchange(subject, base, source, patches, read=tuple(read))
        both.append(sign * (outcomes.sequence_log_prob(subject, resid, tokens, mask) - clean))
    effect = (both[0] + both[1]) / 2
    return effect.reshape(len(tokens), len(sets), 2).cpu().numpy()


def _between(run: CleanRun, start: int, end: int) -> Bool[Tensor, "pair pos"]:
    mask = torch.zeros_like(run.tokens, dtype=torch.bool)
    mask[:, start:end] = True
    return mask


Closed = dict[NeuronSet, Float[Tensor, "run neuron"]]


def closed_values(subject: Subject, pairs: Sequence[TokenPair], sets: Sequence[NeuronSet]) -> Closed:
    """Each set's values at the last token of the control prompts: what "closed" looks like."""
    found: dict[NeuronSet, list[Tensor]] = {one: [] for one in sets}
    for group in batches(pairs, subject):
        run = activations.clean_run(subject, prompt_tokens(subject, group)[0], keep=("neurons",))
        for one, values in found.items():
            values.append(run.neurons[one.layer][:, -1, list(one.neurons)])
    return {one: torch.cat(values) for one, values in found.items()}


def closing_cost(
    subject: Subject, pairs: Sequence[TokenPair], openers: Mapping[str, Openers], closed: Closed
) -> pd.DataFrame:
    """Nats that the model's own answers to treated prompts lose if a set is held closed at every answer token.

    Each pair is given the closed values of one real run, in turn. Columns `lost` (summed over the answer) and `n_tokens`.
    """
    rows: list[tuple[object, ...]] = []
    turn = {pair.pair.id: i for i, pair in enumerate(pair for group in batches(pairs, subject) for pair in group)}
    for group in progress(batches(pairs, subject, mixed=True), desc="perplexity"):
        prompt = prompt_tokens(subject, group)[1]
        camps = [openers[pair.pair.treatment].comply for pair in group]
        answer, mask = outcomes.opened_with(subject, prompt, camps, STEPS)
        turns = torch.tensor([turn[pair.pair.id] for pair in group], device=prompt.device)
        values = {one: runs[turns % len(runs)][:, None] for one, runs in closed.items()}
        lost = _lost(subject, prompt, answer, mask, values).cpu().numpy()
        n_tokens = mask.sum(1).cpu().numpy().astype(float)
        for i, token_pair in enumerate(group):
            pair = token_pair.pair
            keys = (pair.id, pair.topic, pair.treatment, pair.split)
            rows += [(*keys, one.name, lost[i, k], n_tokens[i]) for k, one in enumerate(closed)]
    return pd.DataFrame(rows, columns=["pair_id", "topic", "treatment", "split", "set", "lost", "n_tokens"])


def _lost(
    subject: Subject, prompt: Tensor, tokens: Tensor, mask: Tensor, values: Mapping[NeuronSet, Tensor]
) -> Float[Tensor, "pair set"]:
    start, n_steps = prompt.shape[1] - 1, tokens.shape[1]
    run = activations.clean_run(subject, torch.cat([prompt, tokens[:, :-1]], dim=1))
    read = range(start, start + n_steps)
    clean = outcomes.sequence_log_prob(subject, run.resid_post[-1][:, None, list(read)], tokens, mask)
    at = _between(run, start, start + n_steps)
    patches = [Patch("neuron", one.layer, at, one.neurons, value) for one, value in values.items()]
    moved = replay.interchange(subject, run, run, patches, read=tuple(read))
    return clean - outcomes.sequence_log_prob(subject, moved, tokens, mask)
