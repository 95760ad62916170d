"""Evidence of C5a and C7 on a small model and what partial studies give; that of C5b (gates) on models made by hand."""

from dataclasses import replace

import gate_models as gm
import numpy as np
import pandas as pd
import pytest
import torch
from models import cue_pairs
from oracles import tiny_study
from rows import row
from rows import table as evidence_table

from companion.base.files import EVIDENCE
from companion.claims.registered_rules import rule_c5b
from companion.claims.verdict import Rows
from companion.evidence import neurons
from companion.evidence.neurons import Neurons, curve, measure_last_layer, measure_neurons, neuron_evidence
from companion.mediation.study import Study
from companion.neurons.gating import WRAPPER_HARM
from companion.neurons.timing import FORCED_STEPS


@pytest.fixture(scope="module")
def study() -> Study:
    return tiny_study(n=24, treatments=("T2", "T2b", "T1", "B1", "B2"))


@pytest.fixture(scope="module")
def swept(study: Study) -> Neurons:
    return measure_neurons(study)


def test_rows_are_evidence(swept: Neurons) -> None:
    rows = pd.DataFrame(neuron_evidence(swept, "m"))
    assert set(rows) == set(EVIDENCE) and not rows.duplicated(["claim", "quantity", "variant"]).any()
    found = rows.set_index(["claim", "quantity", "variant"])
    assert found.loc[("C5a", "neurons in the layer", "main"), "estimate"] == 48
    assert found.loc[("C7", "Moran's I", "main"), "note"] == "layers 0, 1, 2, 3"
    assert (rows.ci_low <= rows.ci_high).all() and set(rows.n_topics) == {2}
    test = curve(swept, "T2-T2b")  # a ratio of sums over test pairs, both of T2 - T2b
    for quantity, value in (("psi1", "nie1"), ("psi0", "nie0")):
        share = test.values[value][:, -1].sum() / test.pairs.te.sum()
        assert found.loc[("C5a", quantity, "main"), "estimate"] == pytest.approx(share, abs=1e-6)


def test_without_twins_and_without_harm(study: Study) -> None:
    alone = measure_neurons(replace(study, pairs=tuple(study.of("T2")), twins={}))
    assert alone.primary == "T2" and {row["claim"] for row in neuron_evidence(alone, "m")} == {"C5a", "C7"}
    recognition = replace(study, pairs=tuple(study.of("T1", "B1")), twins={})
    assert measure_neurons(recognition).primary == "T1"
    assert neuron_evidence(measure_neurons(recognition), "m") == [] == neuron_evidence(None, "m")
    assert measure_last_layer(recognition) is None
    idle = tiny_study(n=12)
    with torch.no_grad():
        for parts in idle.subject.layers:
            parts.o_proj.weight.zero_()  # no difference ever reaches the last token
    assert neuron_evidence(measure_neurons(idle), "m") == []


def test_the_sweep_of_relatives_agrees_with_the_whole_one_where_it_looks(study: Study, swept: Neurons) -> None:
    last = measure_last_layer(study)
    assert set(last.table.treatment) == {"T2", "T2b", "T2-T2b", "B1", "B2"}
    assert set(last.table.layer) == {3} and set(last.table.split) == {"discover", "test", "all"}
    same = "treatment == 'T2-T2b' and split == 'test' and layer == 3"
    few, whole = (table.query(same).set_index("neuron").nie1 for table in (last.table, swept.table))
    assert (few - whole).abs().max() < 1e-5


def test_which_layers_and_benign_behaviours_are_measured(
    study: Study, swept: Neurons, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neurons, "BENIGN_PAIRS", 12)
    layers = swept.table.groupby("treatment").layer.agg(lambda values: sorted(set(values))).to_dict()
    everywhere = {"T2", "T2b", "T2-T2b"}
    assert layers == {name: [0, 1, 2, 3] if name in everywhere else [3] for name in (*everywhere, "T1", "B1", "B2")}
    few = measure_neurons(study, [3])
    assert set(few.table.layer) == {3}
    assert [len(few.measured.effects[name].pairs) for name in ("B1", "T2")] == [12, 24]
    effects = dict(swept.measured.effects)  # a benign behaviour counts if it has an effect
    for name, te in (("B1", 0.4), ("B2", -0.5)):
        effects[name] = replace(effects[name], pairs=effects[name].pairs.assign(te=te))
    assert replace(swept, measured=replace(swept.measured, effects=effects)).benign == ["B2"]


def test_a_screened_sweep_rechecks_the_top(study: Study, swept: Neurons, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurons.screening, "RECHECKED", {False: 25})
    monkeypatch.setattr(neurons.screening, "is_small", lambda _: False)
    full, found = swept, measure_neurons(study)
    keys = ["treatment", "split", "layer", "neuron"]
    both = found.table[found.table.exact].merge(full.table, on=keys, suffixes=("", "_full"))
    assert len(both) == found.table.exact.sum()
    np.testing.assert_allclose(both.nie0, both.nie0_full, atol=1e-6)
    guessed = found.table[~found.table.exact]
    assert len(guessed) == 3 * 48 - 50  # the last layer needs no screen
    assert set(guessed.split) == {"discover"} and (guessed.q_value == 1).all()
    top = full.table.query("treatment == 'T2-T2b' and split == 'discover' and layer < 3")
    largest = top.assign(size=(top.nie0 + top.nie1).abs()).nlargest(10, "size")
    assert len(largest.merge(both[keys], on=keys)) >= 8
    rows = neurons.evidence_c7(found, "m", neurons.moran(found), None)
    assert [row["note"] for row in rows if row["quantity"] == "Moran's I"] == ["layers 3"]


def gated(model: gm.Model, *harmful: str, harmless: tuple[str, ...] = ()) -> Study:
    pairs = cue_pairs(gm.TOKENIZER, *harmful, n=36)
    pairs += cue_pairs(gm.TOKENIZER, *harmless, n=36, treatment="T2b") if harmless else []
    twins = {p.pair.id: p.pair.twin for p in pairs if p.pair.twin} if harmless else {}
    return Study("m", gm.build(model), tuple(pairs), {"T2": gm.YES_NO, "T2b": gm.YES_NO}, twins)


@pytest.fixture(scope="module")
def gate() -> Study:
    return gated(gm.GATE, "off high", "on high", harmless=("off low", "on low"))


def measured(study: Study) -> tuple[neurons.Gates, pd.DataFrame, dict[str, float]]:
    """What the tests of gates find, their evidence rows, and the main estimates by quantity."""
    found = neurons.measure_gates(study, measure_neurons(study).table)
    table = pd.DataFrame(neurons.evidence_c5b(found, "m"), columns=list(EVIDENCE))
    return found, table, table[table.variant == "main"].set_index("quantity").estimate.to_dict()


def test_the_gate_is_found_inside_a_neuron_as_a_readout_and_below_the_last_layer(gate: Study) -> None:
    found, _, main = measured(gate)
    assert found.headline.experiment == WRAPPER_HARM
    assert main["gate index"] == pytest.approx(1, abs=1e-3) and main["readout share"] == pytest.approx(1, abs=1e-3)
    assert main["timing share"] == pytest.approx(1 / FORCED_STEPS, abs=1e-3)  # this model decides anew at every token
    found, _, main = measured(gated(gm.BELOW, "off low", "on high"))
    assert found.headline.form == "c"
    assert main["gate index"] == pytest.approx(1, abs=0.02) and main["readout share"] == pytest.approx(0, abs=1e-3)


def test_the_quick_sweep_tests_the_last_layer_alone_and_finds_its_gate(gate: Study) -> None:
    swept = measure_last_layer(gate)
    this = neurons.quick_study(gate)
    assert this.pairs == swept.measured.study.pairs
    rows = neurons.gating_evidence(this, swept.table, "m")
    table = pd.DataFrame(rows)
    assert set(table[table.quantity == "gate index, form"].variant.str[:2]) == {"a:", "b:"}
    index = table[(table.quantity == "gate index") & (table.variant == "main")]
    assert index.estimate.item() == pytest.approx(1, abs=1e-3)
    assert neurons.gating_evidence(replace(this, pairs=()), swept.table, "m") == [], "no wrapper"


def test_a_contributor_contradicts_once_the_gate_is_passed() -> None:
    _, table, _ = measured(gated(gm.READER, "off low", "on low"))
    known = row("gate", "TE T2", (3.0, 2.9, 3.1)) | row("gate", "joint probability T2", (1.0, 1.0, 1.0))
    made = rule_c5b(Rows("m", pd.concat([evidence_table(known), table])))
    assert "capped" in made.reason and "contradicted by its numbers" in made.reason  # no benign behaviours here
