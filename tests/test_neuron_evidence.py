"""Evidence of the neuron analysis, the gradient screen's own trust, and what thin or partial studies give."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from neuron_tools import made_effects, tiny_study
from scipy.stats import spearmanr

from companion.base import files
from companion.evidence import neurons
from companion.evidence.neurons import (
    all_curves,
    complete_layers,
    curve,
    evidence_c5a,
    measure_neurons,
    neuron_evidence,
    quick,
)
from companion.mediation.study import Study
from companion.neurons import screening
from companion.neurons.screening import Trust, estimates, is_small, to_recheck, trust
from companion.neurons.single import NEURONS, all_neurons, in_split


@pytest.fixture(scope="module")
def study() -> Study:
    return tiny_study(n=24, treatments=("T2", "T2b", "T1", "B1", "B2"))


def test_rows_are_evidence(study: Study) -> None:
    rows = pd.DataFrame(neuron_evidence(measure_neurons(study), "m"))
    assert set(rows) == set(files.EVIDENCE)
    assert not rows.duplicated(["claim", "quantity", "variant"]).any()
    found = rows.set_index(["claim", "quantity", "variant"])
    assert {("C5a", "psi1", "main"), ("C5a", "neurons in the layer", "main"), ("C7", "Moran's I", "main")} <= set(
        found.index
    )
    assert found.loc[("C5a", "neurons in the layer", "main"), "estimate"] == 48
    assert found.loc[("C7", "Moran's I", "main"), "note"] == "layers 0, 1, 2, 3"
    assert (rows.ci_low <= rows.ci_high).all()
    assert set(rows.n_topics) == {2}


def test_psi_is_that_of_the_whole_layer(study: Study) -> None:
    """A ratio of sums over test pairs, both of T2 - T2b."""
    found = measure_neurons(study)
    rows = {(row["quantity"], row["variant"]): row for row in evidence_c5a(found, "m", all_curves(found))}
    test = curve(found, "T2-T2b")
    assert rows["psi1", "main"]["estimate"] == pytest.approx(
        test.values["nie1"][:, -1].sum() / test.pairs.te.sum(), abs=1e-6
    )
    assert rows["psi0", "main"]["estimate"] == pytest.approx(
        test.values["nie0"][:, -1].sum() / test.pairs.te.sum(), abs=1e-6
    )


def test_without_twins_without_harm_and_without_neurons(study: Study) -> None:
    alone = replace(study, pairs=tuple(study.of("T2")), twins={})
    assert measure_neurons(alone).primary == "T2"
    assert {row["claim"] for row in neuron_evidence(measure_neurons(alone), "m")} == {"C5a", "C7"}
    recognition = replace(study, pairs=tuple(study.of("T1", "B1")), twins={})
    assert measure_neurons(recognition).primary == "T1"
    assert neuron_evidence(measure_neurons(recognition), "m") == []
    assert quick(recognition) is None
    assert quick(replace(study, subject=replace(study.subject, d_mlp=0))) is None and neuron_evidence(None, "m") == []


def test_the_quick_sweep_agrees_with_the_whole_one_where_it_looks(study: Study) -> None:
    """The last layer, discover and test, without recognition: the same means of the contrast."""
    swept, whole = quick(study), measure_neurons(study)
    assert swept is not None and set(swept.table.treatment) == {"T2", "T2b", "T2-T2b", "B1", "B2"}
    assert set(swept.table.layer) == {3} and set(swept.table.split) == {"discover", "test", "all"}
    chosen = [
        table[(table.treatment == "T2-T2b") & (table.split == "test") & (table.layer == 3)].set_index("neuron").nie1
        for table in (swept.table, whole.table)
    ]
    assert np.abs(chosen[0] - chosen[1]).max() < 1e-5


def test_a_model_that_does_nothing_gives_no_rows() -> None:
    study = tiny_study(n=12)
    with torch.no_grad():
        for parts in study.subject.layers:
            parts.o_proj.weight.zero_()  # no difference ever reaches the last token
    assert neuron_evidence(measure_neurons(study), "m") == []


def test_which_layers_are_measured(study: Study) -> None:
    table = measure_neurons(study).table
    assert list(table) == list(NEURONS)
    layers = table.groupby("treatment").layer.agg(lambda values: sorted(set(values))).to_dict()
    generation = {name for name, found in layers.items() if found == [0, 1, 2, 3]}
    assert generation == {"T2", "T2b", "T2-T2b"}
    assert {name for name, found in layers.items() if found == [3]} == {"T1", "B1", "B2"}
    quick = measure_neurons(study, layers=[3], benign=12)
    assert set(quick.table.layer) == {3}
    assert len(quick.measured.effects["B1"].pairs) == 12
    assert len(quick.measured.effects["T2"].pairs) == 24


def test_benign_behaviours_must_pass_the_gate(study: Study) -> None:
    found = measure_neurons(study)
    te = {name: abs(in_split(found.measured.effects[name], "discover").pairs.te.mean()) for name in ("B1", "B2")}
    assert found.benign == sorted(name for name, value in te.items() if value >= 0.5)
    found.measured.effects["B1"].pairs["te"] = 0.4
    found.measured.effects["B2"].pairs["te"] = -0.5
    assert found.benign == ["B2"]


# ---- the screen ----


def test_the_size_rule_is_one_of_shape() -> None:
    subject = tiny_study().subject
    assert is_small(subject)
    assert not is_small(replace(subject, n_layers=24, d_mlp=4864))


def test_estimates_follow_exact_effects(study: Study) -> None:
    """Signs, directions and twins included: on a random model the straight line is nearly right."""
    for name in ("T2", "T2-T2b"):
        guess = estimates(study, name)
        exact = in_split(measure_neurons(study).measured.effects[name], "discover").nie.mean(0)
        assert spearmanr(guess.estimate, exact).statistic > 0.9
        assert np.polyfit(exact, guess.estimate, 1)[0] == pytest.approx(1, abs=0.3)


def test_a_screened_sweep_rechecks_the_top_exactly(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurons.screening.to_recheck, "__defaults__", (20, 30, 0))
    full, found = measure_neurons(study), measure_neurons(study, every=False)
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
    # Places in a sample say nothing about neighbours.
    assert set(complete_layers(found, found.measured.effects["T2"]).columns.layer) == {3}
    assert [row["note"] for row in evidence_rows(found) if row["quantity"] == "Moran's I"] == ["layers 3"]


def evidence_rows(found: neurons.Neurons) -> list[dict[str, object]]:
    return neurons.evidence_c7(found, "m", neurons.moran(found), None)


def screened(estimate: np.ndarray, exact: np.ndarray, top: int = 50, random: int = 100) -> Trust:
    found = pd.DataFrame({"layer": 0, "neuron": np.arange(len(exact)), "estimate": estimate})
    chosen = to_recheck(found, top, random)
    return trust(chosen, made_effects(np.tile(exact[chosen.neuron], (12, 1))), len(exact), top=20)


def test_a_screen_says_when_it_cannot_be_trusted() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_t(3, size=2000)
    good = screened(exact + 0.01 * rng.normal(size=2000), exact)
    assert (good.warning, good.recall) == ("", 1.0)
    assert good.correlation > 0.95
    bad = screened(rng.normal(size=2000), exact)
    assert abs(bad.correlation) < 0.4
    assert "rank correlation" in bad.warning and "recall" in bad.warning
    blind = np.where(np.arange(2000) < 1000, exact, 0.0)  # saturated neurons, whose gradient vanishes
    half = screened(blind, exact, random=1000)
    assert half.recall < 0.8
    assert "recall" in half.warning
    assert np.isnan(screened(exact, np.zeros(2000)).correlation) and "nan" in screened(exact, np.zeros(2000)).warning


def test_what_is_rechecked() -> None:
    found = all_neurons(tiny_study().subject).assign(estimate=np.arange(192.0) - 96)
    chosen = to_recheck(found, 10, 15)
    assert chosen.estimate[chosen.is_top].abs().min() >= chosen.estimate[~chosen.is_top].abs().max()
    assert (chosen.is_top.sum(), (~chosen.is_top).sum()) == (10, 15)
    assert not chosen.duplicated(["layer", "neuron"]).any()
    assert screening.to_recheck(found, 500, 500).is_top.all()
