"""Evidence of C5b on hand-made models: which set is read, in which form, and what the rule makes of a contributor."""

from dataclasses import replace

import gate_models as gm
import pandas as pd
import pytest
from handmade import FIRST, OUT, SECOND, cue_pairs, word_tokenizer

from companion.base.files import EVIDENCE
from companion.claims.registered_rules import rule_c5b
from companion.claims.verdict import Rows
from companion.evidence import neurons
from companion.mediation.study import Study
from companion.neurons.gating import WRAPPER_HARM
from companion.neurons.teacher_forcing import STEPS
from companion.prompts.tokens import Openers

TOKENIZER = word_tokenizer()
YES_NO = Openers(*((TOKENIZER.convert_tokens_to_ids(word),) for word in ("yes", "no")), 0)
GATE = gm.Model((gm.Neuron(3, 0, gm.step(FIRST), {SECOND: 1.0}, {OUT: 3.0 / gm.STEEP}),))


def study(model: gm.Model, harmful: tuple[str, str], harmless: tuple[str, str] | None) -> Study:
    pairs = cue_pairs(TOKENIZER, *harmful, n=36)
    pairs += cue_pairs(TOKENIZER, *harmless, n=36, treatment="T2b") if harmless else []
    twins = {p.pair.id: p.pair.twin for p in pairs if p.pair.twin} if harmless else {}
    return Study("m", gm.build(model), tuple(pairs), {"T2": YES_NO, "T2b": YES_NO}, twins, {})


def measured(made: Study) -> tuple[neurons.Gates, pd.DataFrame]:
    found = neurons.measure_gates(made, neurons.measure_neurons(made, every=True).table)
    return found, pd.DataFrame(neurons.evidence_c5b(found, "m"), columns=list(EVIDENCE))


def test_evidence_finds_the_gate_inside_a_neuron_and_calls_it_a_readout() -> None:
    found, table = measured(study(GATE, ("off high", "on high"), ("off low", "on low")))
    assert found.headline is not None and found.headline.experiment == WRAPPER_HARM
    main = table[table.variant == "main"].set_index("quantity").estimate
    assert main["gate index"] == pytest.approx(1, abs=1e-3) and main["readout share"] == pytest.approx(1, abs=1e-3)
    assert main["timing share"] == pytest.approx(1 / STEPS, abs=1e-3)  # this model decides anew at every token


def test_evidence_finds_the_gate_below_the_last_layer() -> None:
    found, table = measured(study(gm.BELOW, ("off low", "on high"), None))
    assert found.headline is not None and found.headline.form == "c"
    main = table[table.variant == "main"].set_index("quantity").estimate
    assert main["gate index"] == pytest.approx(1, abs=0.02) and main["readout share"] == pytest.approx(0, abs=1e-3)


def test_the_quick_sweep_tests_the_last_layer_alone_and_finds_its_gate() -> None:
    swept = neurons.measure_last_layer(study(GATE, ("off high", "on high"), ("off low", "on low")))
    assert swept is not None
    this = swept.measured.study
    table = pd.DataFrame(neurons.gating_evidence(this, swept.table, "m", swept.caches), columns=list(EVIDENCE))
    again = pd.DataFrame(neurons.gating_evidence(this, swept.table, "m"), columns=list(EVIDENCE))
    pd.testing.assert_frame_equal(table, again)  # the runs of the sweep are those that it would make
    assert set(table[table.quantity == "gate index, form"].variant.str[:2]) == {"a:", "b:"}
    main = table[table.variant == "main"].set_index("quantity").estimate
    assert main["gate index"] == pytest.approx(1, abs=1e-3)


def test_no_wrapper_no_evidence() -> None:
    made = study(GATE, ("off high", "on high"), None)
    table = neurons.measure_neurons(made, every=True).table
    assert neurons.gating_evidence(replace(made, pairs=()), table, "m") == []


def test_evidence_of_a_contributor_contradicts_once_the_gate_is_passed() -> None:
    reader = gm.Model((gm.Neuron(3, 0, gm.OPEN, {FIRST: 1.0}, {OUT: 0.1}),))
    _, table = measured(study(reader, ("off low", "on low"), None))
    gate = pd.DataFrame([{"model": "m", "claim": "gate", "quantity": "TE T2", "variant": "main", "note": ""}])
    gate = gate.assign(estimate=3.0, ci_low=2.9, ci_high=3.1, n_pairs=60, n_topics=30)
    joint = gate.assign(quantity="joint probability T2", estimate=1.0)
    made = rule_c5b(Rows("m", pd.concat([gate, joint, table])))
    assert "capped" in made.reason and "contradicted by its numbers" in made.reason  # no benign behaviours here
