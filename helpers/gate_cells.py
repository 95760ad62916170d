"""Gate or contributor: the four cells of the factorial experiments on a set of neurons.

Two experiments, each with two switches. *Upstream*: the prompt (control, treated) against the set (closed: its values of
the control run; open: those of the treated run). *Inside*: the gate pre-activations of the set against its up
pre-activations, in families whose neurons are a product, act(gate) * up. Every value that is clamped is taken from one of
the pair's own two runs; nothing is set to zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from helpers import gate_ends, grid, mediation, outcomes
from helpers.gate_ends import End, NeuronSet, Product, product
from helpers.grid import Patch
from helpers.mediation import Batch
from helpers.progress import progress
from helpers.subject import Subject
from helpers.tokens import Openers, TokenPair

__all__ = ["End", "NeuronSet", "Product", "cells", "difference", "product"]

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
) -> tuple[pd.DataFrame, dict[str, End]]:
    """The table of `cells`, and what it kept of the last layer, by treatment."""
    rows: list[Rows] = []
    split = [one for one in sets if inside is None or one.name in inside]
    below = [one for one in sets if one.layer < subject.n_layers - 1]
    kept: list[tuple[str, End]] = []
    for group in progress(mediation.batches(pairs, subject), desc="gates"):
        batch, name = mediation.run_clean(subject, group), group[0].pair.treatment
        factors = {layer: product(subject, batch, layer) for layer in {one.layer for one in split}}
        rows += _rows(subject, batch, openers[name], below, {one: factors[one.layer] for one in below if one in split})
        kept.append((name, End(gate_ends.last_column(batch), factors.get(subject.n_layers - 1))))
        del batch  # before the next one is made
    ends = gate_ends.by_treatment(kept)
    for name, end in ends.items():
        rows += _top_rows(subject, end, openers[name], sets, split)
    return table_of(rows), ends


def of_end(
    subject: Subject, end: End, openers: Openers, sets: Sequence[NeuronSet], inside: Sequence[str]
) -> pd.DataFrame:
    """The table of `cells` for one treatment whose end is known; sets below the last layer are left out."""
    return table_of(_top_rows(subject, end, openers, sets, [one for one in sets if one.name in inside]))


def _top_rows(
    subject: Subject, end: End, openers: Openers, sets: Sequence[NeuronSet], split: Sequence[NeuronSet]
) -> list[Rows]:
    top = [one for one in sets if one.layer == subject.n_layers - 1]
    return _rows(gate_ends.still(subject), end.batch, openers, top, {one: end.factors for one in top if one in split})


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
        ("upstream", grid.interchange, OUTCOMES),
        ("write", grid.direct, ("contrast.frozen",)),
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
        grid.interchange(subject, run, run, patches)[:, :, 0].unflatten(1, (len(crossings), len(CELLS))) for run in runs
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
        weights = outcomes.camp_weights(subject, control, treated, openers)
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


def difference(table: pd.DataFrame, twins: Mapping[str, str]) -> pd.DataFrame:
    """The table with rows of T2 - T2b behind it, pair by pair, where there are twins."""
    if not set(twins) & set(table.pair_id):
        return table
    keys = ["set", "layer", "form", "outcome"]
    numbers = [name for name in (*CELLS, "te", "first", "every") if name in table]
    harmful = table[table.treatment == "T2"]
    harmful = harmful.assign(twin_id=harmful.pair_id.map(twins)).dropna(subset=["twin_id"])
    twin = table.loc[table.treatment == "T2b", ["pair_id", *keys, *numbers]].rename(columns={"pair_id": "twin_id"})
    joined = harmful.merge(twin, on=["twin_id", *keys], suffixes=("", "_twin"), validate="many_to_one")
    if joined.empty:
        return table
    for name in numbers:
        joined[name] = joined[name] - joined[f"{name}_twin"]
    return pd.concat([table, joined[list(table.columns)].assign(treatment="T2-T2b")], ignore_index=True)
