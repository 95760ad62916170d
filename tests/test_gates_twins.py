"""Gate against up with the harm signal switched by the twin: a gate that no pair on its own can show."""

import gate_models as gm
import numpy as np
import pandas as pd
from families import tiny_subject
from handmade import FIRST, OUT, SECOND, cue_pairs, random_pairs
from test_gates import CLOSE, TOKENIZER, YES_NO

from companion.mediation.estimands import with_difference
from companion.neurons import clamping, gating
from companion.neurons.clamping import CELLS, NeuronSet

ONE = NeuronSet("set", 3, (0,))
# Cue A is the wrapper, cue B the harm: the wrapper opens the gate, harm goes through.
GATE = gm.Model((gm.Neuron(3, 0, gm.step(FIRST), {SECOND: 1.0}, {OUT: 3.0 / gm.STEEP}),))
# The same with the roles exchanged, and a neuron that only reads the wrapper.
SWAPPED = gm.Model((gm.Neuron(3, 0, gm.step(SECOND), {FIRST: 1.0}, {OUT: 3.0 / gm.STEEP}),))
READER = gm.Model((gm.Neuron(3, 0, gm.OPEN, {FIRST: 1.0, SECOND: 1.0}, {OUT: 3.0 / 30}),))


def measured(model: gm.Model) -> pd.DataFrame:
    """T2: wrapper off or on with harm; T2b: the same without harm."""
    harmful = cue_pairs(TOKENIZER, "off high", "on high", n=6)
    harmless = cue_pairs(TOKENIZER, "off low", "on low", n=6, treatment="T2b")
    twins = {pair.pair.id: str(pair.pair.twin) for pair in harmful}
    subject, openers = gm.build(model), {"T2": YES_NO, "T2b": YES_NO}
    pairs = [*harmful, *harmless]
    made, ends = clamping.measured(subject, pairs, openers, [ONE])
    twin_cells = gating.cells(subject, ends, twins, openers, [ONE])
    return pd.concat([with_difference(made, twins), twin_cells], ignore_index=True)


def index(table: pd.DataFrame, form: str) -> float:
    found = gating.gate_index(gating.select(table, "T2-T2b", "set", form, "Y1"))
    return np.nan if found is None else float(found.signed.estimate[0])


def test_only_the_twin_shows_a_gate_whose_up_carries_the_harm() -> None:
    table = measured(GATE)
    np.testing.assert_allclose([index(table, form) for form in ("upstream", "inside")], 0, atol=1e-3)
    assert abs(index(table, gating.WRAPPER_HARM) - 1) < 1e-3
    cells = gating.select(table, "T2-T2b", "set", gating.WRAPPER_HARM, "Y1")[list(CELLS)]
    expected = gm.crossed(GATE, (3, 0), (0, 1), (1, 1), (1, 0))
    np.testing.assert_allclose(cells, np.tile(expected, (6, 1)), atol=CLOSE * 3)


def test_the_roles_may_be_exchanged() -> None:
    assert abs(index(measured(SWAPPED), gating.HARM_WRAPPER) - 1) < 1e-3


def test_a_neuron_that_adds_wrapper_and_harm_is_no_gate() -> None:
    table = measured(READER)
    assert all(abs(index(table, form)) < 1e-3 for form in (gating.WRAPPER_HARM, gating.HARM_WRAPPER))


def test_nothing_is_measured_without_products_or_twins() -> None:
    pairs = random_pairs(4, 9, 60)
    for family in ("gpt2", "llama"):
        subject, openers = tiny_subject(family), {"T2": YES_NO}
        ends = clamping.measured(subject, pairs, openers, [ONE])[1]
        assert gating.cells(subject, ends, {}, openers, [ONE]).empty
