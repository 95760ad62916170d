"""Gate or contributor: gate against up inside neurons, with the harm signal switched by the harmless twin.

Within a pair (T2) the request is harmful in both prompts and only the wrapper changes. A neuron whose gate the wrapper
opens and whose up-projection carries the harm has nothing to multiply with there: its up never moves. The harmless twin
under the same wrapper (T2b) is what switches the harm signal off. Two roles: gate by wrapper and up by harm, or the other
way round. Values come from real runs; only those of the last token are taken, so that twins may differ in length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
from torch import Tensor

from helpers import gate_ends
from helpers.gate_cells import End, NeuronSet, Product, Rows, clamp_products, crossed, table_of
from helpers.subject import Subject
from helpers.tokens import Openers

WRAPPER_HARM, HARM_WRAPPER = "gate by wrapper x up by harm", "gate by harm x up by wrapper"


def cells(
    subject: Subject,
    ends: Mapping[str, End],
    twin_of: Mapping[str, str],
    openers: Mapping[str, Openers],
    sets: Sequence[NeuronSet],
) -> pd.DataFrame:
    """Rows as in `gate_cells.cells` with the two roles as forms, for T2 pairs with a twin, as treatment T2 - T2b.

    `ends` are those of `gate_cells.measured`, sets are of the last layer. The wrapper is switched by the pair itself, harm
    by the treated prompts of pair and twin. `te` is that of T2; the caller knows the twin's. No rows where neurons are no
    product or no pair has a twin.
    """
    harmful, harmless = ends.get("T2"), ends.get("T2b")
    if harmful is None or harmless is None or harmful.factors is None or harmless.factors is None:
        return pd.DataFrame()
    row = {pair.pair.id: i for i, pair in enumerate(harmless.batch.pairs)}
    own = [i for i, pair in enumerate(harmful.batch.pairs) if twin_of.get(pair.pair.id) in row]
    if not own:
        return pd.DataFrame()
    batch = gate_ends.only(harmful.batch, own)
    off, on = (replace(side, gate=side.gate[own], up=side.up[own]) for side in harmful.factors)
    at, treated = [row[twin_of[pair.pair.id]] for pair in batch.pairs], harmless.factors[1]
    twin = replace(treated, gate=treated.gate[at], up=treated.up[at])
    rows: list[Rows] = []
    for form, crossings in _roles(sets, (off, on), twin).items():
        rows += clamp_products(gate_ends.still(subject), batch, openers["T2"], form, crossings)
    return table_of(rows).assign(treatment="T2-T2b")


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
