"""Evidence of the neuron analysis, and what thin or partial studies give."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from neuron_tools import tiny_study

from companion.base import files
from companion.evidence import neurons
from companion.evidence.neurons import (
    Neurons,
    curve,
    measure_last_layer,
    measure_neurons,
    neuron_evidence,
)
from companion.mediation.study import Study


@pytest.fixture(scope="module")
def study() -> Study:
    return tiny_study(n=24, treatments=("T2", "T2b", "T1", "B1", "B2"))


@pytest.fixture(scope="module")
def swept(study: Study) -> Neurons:
    return measure_neurons(study)


def test_rows_are_evidence(swept: Neurons) -> None:
    rows = pd.DataFrame(neuron_evidence(swept, "m"))
    assert set(rows) == set(files.EVIDENCE)
    assert not rows.duplicated(["claim", "quantity", "variant"]).any()
    found = rows.set_index(["claim", "quantity", "variant"])
    assert found.loc[("C5a", "neurons in the layer", "main"), "estimate"] == 48
    assert found.loc[("C7", "Moran's I", "main"), "note"] == "layers 0, 1, 2, 3"
    assert (rows.ci_low <= rows.ci_high).all()
    assert set(rows.n_topics) == {2}
    test = curve(swept, "T2-T2b")  # a ratio of sums over test pairs, both of T2 - T2b
    for quantity, value in (("psi1", "nie1"), ("psi0", "nie0")):
        share = test.values[value][:, -1].sum() / test.pairs.te.sum()
        assert found.loc[("C5a", quantity, "main"), "estimate"] == pytest.approx(share, abs=1e-6)


def test_without_twins_without_harm_and_without_neurons(study: Study) -> None:
    alone = measure_neurons(replace(study, pairs=tuple(study.of("T2")), twins={}))
    assert alone.primary == "T2"
    assert {row["claim"] for row in neuron_evidence(alone, "m")} == {"C5a", "C7"}
    recognition = replace(study, pairs=tuple(study.of("T1", "B1")), twins={})
    assert measure_neurons(recognition).primary == "T1"
    assert neuron_evidence(measure_neurons(recognition), "m") == [] == neuron_evidence(None, "m")
    no_neurons = replace(study, subject=replace(study.subject, d_mlp=0))
    assert measure_last_layer(recognition) is None is measure_last_layer(no_neurons)


def test_the_sweep_of_relatives_agrees_with_the_whole_one_where_it_looks(study: Study, swept: Neurons) -> None:
    """The last layer, discover and test, without recognition: the same means of the contrast."""
    last = measure_last_layer(study)
    assert last is not None and set(last.table.treatment) == {"T2", "T2b", "T2-T2b", "B1", "B2"}
    assert set(last.table.layer) == {3} and set(last.table.split) == {"discover", "test", "all"}
    assert last.caches is not None and set(last.caches) == {"T2", "T2b", "B1", "B2"}
    chosen = [
        table[(table.treatment == "T2-T2b") & (table.split == "test") & (table.layer == 3)].set_index("neuron").nie1
        for table in (last.table, swept.table)
    ]
    assert np.abs(chosen[0] - chosen[1]).max() < 1e-5


def test_a_model_that_does_nothing_gives_no_rows() -> None:
    study = tiny_study(n=12)
    with torch.no_grad():
        for parts in study.subject.layers:
            parts.o_proj.weight.zero_()  # no difference ever reaches the last token
    assert neuron_evidence(measure_neurons(study), "m") == []


def test_which_layers_are_measured(study: Study, swept: Neurons) -> None:
    layers = swept.table.groupby("treatment").layer.agg(lambda values: sorted(set(values))).to_dict()
    everywhere = {"T2", "T2b", "T2-T2b"}
    assert layers == {name: [0, 1, 2, 3] if name in everywhere else [3] for name in (*everywhere, "T1", "B1", "B2")}
    few = measure_neurons(study, layers=[3], benign=12)
    assert set(few.table.layer) == {3}
    assert len(few.measured.effects["B1"].pairs) == 12
    assert len(few.measured.effects["T2"].pairs) == 24


def test_benign_behaviours_must_have_an_effect(swept: Neurons) -> None:
    effects = dict(swept.measured.effects)
    for name, te in (("B1", 0.4), ("B2", -0.5)):
        effects[name] = replace(effects[name], pairs=effects[name].pairs.assign(te=te))
    assert replace(swept, measured=replace(swept.measured, effects=effects)).benign == ["B2"]


def test_a_screened_sweep_rechecks_the_top_exactly(
    study: Study, swept: Neurons, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neurons.screening.to_recheck, "__defaults__", (20, 30, 0))
    full, found = swept, measure_neurons(study, every=False)
    assert found.screen is not None
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
