"""Gate or contributor: gate against up inside neurons, with the harm signal switched by the harmless twin.

Within a pair (T2) the request is harmful in both prompts and only the wrapper changes. A neuron whose gate the wrapper
opens and whose up-projection carries the harm has nothing to multiply with there: its up never moves. The harmless twin
under the same wrapper (T2b) is what switches the harm signal off. Two roles: gate by wrapper and up by harm, or the other
way round. Values come from real runs; only those of the last token are taken, so that twins may differ in length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from helpers import mediation
from helpers.gate_cells import NeuronSet, Product, Rows, clamp_products, crossed, product, table_of
from helpers.progress import progress
from helpers.subject import Subject
from helpers.tokens import Openers, TokenPair

WRAPPER_HARM, HARM_WRAPPER = "gate by wrapper x up by harm", "gate by harm x up by wrapper"


@dataclass(frozen=True)
class _Harmless:
    """Factors of a layer in the treated runs of harmless twins, and each twin's row."""

    gate: Float[Tensor, "twin neuron"]
    up: Float[Tensor, "twin neuron"]
    row: Mapping[str, int]


def cells(
    subject: Subject,
    pairs: Sequence[TokenPair],
    twin_of: Mapping[str, str],
    openers: Mapping[str, Openers],
    sets: Sequence[NeuronSet],
) -> pd.DataFrame:
    """Rows as in `gate_cells.cells` with the two roles as forms, for T2 pairs with a twin, as treatment T2 - T2b.

    Sets are of one layer. The wrapper is switched by the pair itself, harm by the treated prompts of pair and twin. `te`
    is that of T2; the caller knows the twin's. No rows where neurons are no product or no pair has a twin.
    """
    layer = sets[0].layer
    harmless = _harmless(subject, [pair for pair in pairs if pair.pair.treatment == "T2b"], layer)
    harmful = [p for p in pairs if p.pair.treatment == "T2" and harmless and twin_of.get(p.pair.id) in harmless.row]
    rows: list[Rows] = []
    for group in progress(mediation.batches(harmful, subject), desc="gates, twins"):
        batch = mediation.run_clean(subject, group)
        factors = product(subject, batch, layer)
        assert factors is not None and harmless is not None
        at = [harmless.row[twin_of[pair.pair.id]] for pair in group]
        twin = Product(harmless.gate[at], harmless.up[at], factors[1].act)
        for form, crossings in _roles(sets, factors, twin).items():
            rows += clamp_products(subject, batch, openers["T2"], form, crossings)
    return table_of(rows).assign(treatment="T2-T2b") if rows else pd.DataFrame()


def _roles(
    sets: Sequence[NeuronSet], factors: tuple[Product, Product], twin: Product
) -> dict[str, dict[NeuronSet, list[Tensor]]]:
    """For each role the values of `crossed` for every set."""
    made: dict[str, dict[NeuronSet, list[Tensor]]] = {WRAPPER_HARM: {}, HARM_WRAPPER: {}}
    for one in sets:
        off, on, without = (product.only(one) for product in (*factors, twin))
        made[WRAPPER_HARM][one] = crossed((off.gate, on.gate), (without.up, on.up), on.act)
        made[HARM_WRAPPER][one] = crossed((without.gate, on.gate), (off.up, on.up), on.act)
    return made


def _harmless(subject: Subject, pairs: Sequence[TokenPair], layer: int) -> _Harmless | None:
    found, names = [], []
    for group in mediation.batches(pairs, subject):
        factors = product(subject, mediation.run_clean(subject, group), layer)
        if factors is None:
            return None
        found.append(factors[1])
        names += [pair.pair.id for pair in group]
    if not found:
        return None
    gate, up = (torch.cat([getattr(made, side) for made in found]) for side in ("gate", "up"))
    return _Harmless(gate, up, {name: i for i, name in enumerate(names)})
