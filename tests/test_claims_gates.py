"""C5b's rule on evidence written by hand, and the evidence of hand-made models."""

from dataclasses import replace

import gate_models as gm
import pandas as pd
import pytest
from gate_models import GATE, TOKENIZER, YES_NO
from handmade import FIRST, OUT, cue_pairs

from companion.base.files import EVIDENCE
from companion.claims.registered_rules import rule_c5b
from companion.claims.verdict import Rows
from companion.evidence import gating, neurons
from companion.mediation.study import Study
from companion.neurons.gating import WRAPPER_HARM
from companion.neurons.teacher_forcing import STEPS

INDEX = ("gate index", "main")
NUMBERS = {
    ("gate", "TE T2-T2b", "main"): (5.0, 4.0, 6.0),
    ("gate", "joint probability T2", "main"): (0.95, 0.9, 1.0),
    ("C5b", *INDEX): (0.8, 0.7, 0.9),
    ("C5b", "gate index", "norm frozen"): (0.7, 0.6, 0.8),
    ("C5b", "gate index, signed", "main"): (0.8, 0.7, 0.9),
    ("C5b", "gate index, form", "a: last"): (0.0, 0.0, 0.0),
    ("C5b", "gate index, form", "b: inside"): (0.1, 0.0, 0.15),
    ("C5b", "gate index, form", "c: below"): (0.8, 0.7, 0.9),
    ("C5b", "readout share", "main"): (0.2, 0.1, 0.3),
    ("C5b", "benign share", "main"): (0.1, 0.05, 0.15),
    ("C5b", "perplexity ratio", "main"): (1.0, 0.99, 1.005),
}


def rows(**changed: tuple[float, float, float] | None) -> Rows:
    """The numbers of a gate; `changed` by "quantity|variant", None to leave one out."""
    numbers = dict(NUMBERS)
    for name, value in changed.items():
        key = next(key for key in NUMBERS if "|".join(key[1:]) == name)
        numbers.pop(key) if value is None else numbers.update({key: value})
    made = [(*key, *value, 120, 40, "c, layer 4") for key, value in numbers.items()]
    columns = [name for name in EVIDENCE if name != "model"]
    return Rows("m", pd.DataFrame(made, columns=columns).assign(model="m"))


def test_a_gate_is_supported() -> None:
    made = rule_c5b(rows())
    assert made.verdict == "supported" and made.estimate == 0.8


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        ("gate index|main", (0.8, 0.55, 0.9)),
        ("gate index, signed|main", (-0.8, -0.9, -0.7)),  # an OR
        ("readout share|main", (0.4, 0.3, 0.5)),
        ("benign share|main", (0.15, 0.1, 0.25)),
        ("perplexity ratio|main", (1.005, 1.0, 1.02)),
        ("perplexity ratio|main", None),
        ("benign share|main", None),
        ("gate index|norm frozen", (0.1, 0.0, 0.2)),
        ("joint probability T2|main", (0.5, 0.4, 0.6)),
    ],
)
def test_each_condition_can_withhold_support(quantity: str, value: tuple[float, float, float] | None) -> None:
    assert rule_c5b(rows(**{quantity: value})).verdict == "inconclusive"


def test_contradicted_needs_every_form_low() -> None:
    low = (0.1, 0.05, 0.15)
    small = {"gate index|main": low, "gate index|norm frozen": low, "gate index, signed|main": low}
    assert rule_c5b(rows(**small)).verdict == "inconclusive"  # form c is high
    assert rule_c5b(rows(**small, **{"gate index, form|c: below": low})).verdict == "contradicted"


def test_what_was_not_measured_is_not_testable() -> None:
    table = rows().table
    made = rule_c5b(Rows("m", table[table.claim == "gate"]))
    assert made.verdict == "not testable" and "notebook 04" in made.reason
    assert rule_c5b(Rows("m", table[table.claim == "C5b"])).verdict == "not testable"
    made = rule_c5b(Rows("m", table[(table.claim == "gate") | table.variant.str.startswith("a:")]))
    assert made.verdict == "inconclusive" and "nothing of which" in made.reason


def study(model: gm.Model, harmful: tuple[str, str], harmless: tuple[str, str] | None) -> Study:
    pairs = cue_pairs(TOKENIZER, *harmful, n=36)
    pairs += cue_pairs(TOKENIZER, *harmless, n=36, treatment="T2b") if harmless else []
    twins = {p.pair.id: p.pair.twin for p in pairs if p.pair.twin} if harmless else {}
    return Study("m", gm.build(model), tuple(pairs), {"T2": YES_NO, "T2b": YES_NO}, twins, {})


def measured(made: Study) -> tuple[gating.Gates, pd.DataFrame]:
    found = gating.measure_gates(made, neurons.measure_neurons(made, every=True).table)
    return found, pd.DataFrame(gating.evidence_c5b(found, "m"), columns=list(EVIDENCE))


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
    table = pd.DataFrame(gating.gating_evidence(this, swept.table, "m", swept.caches), columns=list(EVIDENCE))
    again = pd.DataFrame(gating.gating_evidence(this, swept.table, "m"), columns=list(EVIDENCE))
    pd.testing.assert_frame_equal(table, again)  # the runs of the sweep are those that it would make
    assert set(table[table.quantity == "gate index, form"].variant.str[:2]) == {"a:", "b:"}
    main = table[table.variant == "main"].set_index("quantity").estimate
    assert main["gate index"] == pytest.approx(1, abs=1e-3)


def test_no_wrapper_no_evidence() -> None:
    made = study(GATE, ("off high", "on high"), None)
    table = neurons.measure_neurons(made, every=True).table
    assert gating.gating_evidence(replace(made, pairs=()), table, "m") == []


def test_evidence_of_a_contributor_contradicts_once_the_gate_is_passed() -> None:
    reader = gm.Model((gm.Neuron(3, 0, gm.OPEN, {FIRST: 1.0}, {OUT: 0.1}),))
    _, table = measured(study(reader, ("off low", "on low"), None))
    gate = pd.DataFrame([{"model": "m", "claim": "gate", "quantity": "TE T2", "variant": "main", "note": ""}])
    gate = gate.assign(estimate=3.0, ci_low=2.9, ci_high=3.1, n_pairs=60, n_topics=30)
    joint = gate.assign(quantity="joint probability T2", estimate=1.0)
    made = rule_c5b(Rows("m", pd.concat([gate, joint, table])))
    assert "capped" in made.reason and "contradicted by its numbers" in made.reason  # no benign behaviours here
