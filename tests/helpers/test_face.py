"""The face: each helper gives what the library calls behind it give, on the shipped model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from companion.base import paths
from companion.base.display import NotDefined
from companion.mediation.study import Study
from companion.plots import figures
from companion.stats import clusters
from helpers import layers, model, plots, prompts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Results and figures of this module's runs."""
    folder = tmp_path_factory.mktemp("face")
    with pytest.MonkeyPatch.context() as patch:
        for module in (paths, figures):
            patch.setattr(module, "RESULTS", folder / "results")
            patch.setattr(module, "FIGURES", folder / "figures")
        yield folder


@pytest.fixture(scope="module")
def sweep(study: Study, folders: Path) -> layers.Layers:
    return layers.measure_layers(study)


def test_the_log_odds_of_a_plain_forward_pass_are_those_of_the_clean_run(study: Study) -> None:
    pair = model.example_pair(study)
    openers, batch = study.openers["T2"], model.run_clean(study.subject, [pair])
    with torch.no_grad():
        by_hand = model.log_odds_of_logits(study.subject.model(batch.treated.tokens).logits, openers)
    kept = model.log_odds(study.subject, batch.treated.resid_post[-1][:, -1], openers)
    assert pair.pair.treatment == study.main_treatment == "T2"
    assert by_hand == pytest.approx(float(kept), abs=1e-3)


def test_tokens_are_aligned_and_differ_where_the_ids_do(study: Study) -> None:
    pair = model.example_pair(study)
    table = prompts.align_tokens(study, pair)
    assert list(table.columns) == ["position", "group", "control", "treated", "differ"]
    assert table.differ.tolist() == (pair.control != pair.treated).tolist() == (table.control != table.treated).tolist()


def test_the_last_layer_carries_all(study: Study) -> None:
    pair = model.example_pair(study)
    effects = model.effects_of_pair(study, pair, ["resid_post"])
    assert len(effects) == study.subject.n_layers
    assert effects.nie0.iloc[-1] == pytest.approx(effects.te.iloc[-1], rel=1e-4)


def test_a_contrast_is_signed_on_discover_and_shown_on_test(sweep: layers.Layers) -> None:
    made = layers.signed_contrast(sweep.effects, "T2-T2b")
    assert set(made.split) == {"test"} and set(made.site) == {"attn_out", "mlp_out"}
    assert made.te.mean() > 0 and np.allclose(made.nie, (made.nie0 + made.nie1) / 2)
    whole = layers.signed_contrast(sweep.effects, "T2-T2b", split=None)
    assert set(whole.split) == {"discover", "validate", "test"}
    turned = sweep.effects.assign(te=-sweep.effects.te, nie0=-sweep.effects.nie0, nie1=-sweep.effects.nie1)
    assert np.allclose(layers.signed_contrast(turned, "T2-T2b").nie, made.nie), "the sign is that of TE on discover"
    shares = layers.shares_by_treatment(sweep.effects)
    assert list(shares.treatment.unique()) == ["T1", "T2", "T2-T2b"], "T2b has no effect to be a share of"
    assert (
        str(layers.shares_by_treatment(sweep.effects.assign(te=0.1)))
        == "No treatment has a total effect of at least 0.5 log-odds."
    )


def test_centroids_have_each_behaviour_and_both_intervals_of_the_difference(sweep: layers.Layers) -> None:
    table = layers.centroids(sweep).set_index("quantity")
    own = table[table.contrast == "benign"].estimate
    narrow, wide = (table.loc[name] for name in ("topics drawn", "topics and behaviours drawn"))
    assert narrow.estimate == wide.estimate == pytest.approx(table.estimate["T2-T2b"] - own.mean(), abs=1e-6)
    assert wide.low < narrow.low and narrow.high < wide.high and len(own) == 6
    assert "no benign behaviour" in str(layers.centroids(replace(sweep, evidence=sweep.evidence[:3])))


def test_what_is_read_and_what_is_carried_stand_on_one_axis(sweep: layers.Layers) -> None:
    pairs = [one for one in sweep.study.of("T1") if one.pair.split == "test"]
    perfect = np.tile([0.0, 1.0], (len(pairs), 1))
    table = layers.read_and_carried(sweep, {1: perfect, 4: 1 - perfect}, [one.pair.topic for one in pairs])
    assert table[table.what.str.contains("activations")].estimate.tolist() == [1.0, 0.0]
    carried = table[table.what.str.startswith("carried")].set_index("layer").estimate
    assert carried[sweep.study.subject.n_layers - 1] == pytest.approx(1, abs=1e-4)
    (psi,) = [
        one["estimate"] for one in sweep.evidence if one["quantity"].startswith("psi0") and one["variant"] == "main"
    ]
    assert carried[layers.deepest_early_layer(6)] == pytest.approx(psi, abs=1e-6)


def test_the_evidence_is_that_of_the_model_and_of_its_twin(sweep: layers.Layers, folders: Path) -> None:
    relatives = layers.measure_relatives(sweep.study, "embedded", "smoke")
    curves = layers.cumulative(sweep, relatives)
    assert set(curves.model) == {"embedded", "embedded (untrained)"}
    assert curves[curves.layer == 5].estimate.round(4).tolist() == [1, 1]
    computed = layers.computed_effects(sweep.study)
    assert set(layers.passed_and_computed(sweep.effects, computed).panel) == {"passes through", "computed here"}
    rows = layers.write_evidence(sweep, relatives, computed, "embedded", "smoke")
    whole = pd.read_csv(folders / "results/embedded/02_evidence.csv")
    assert set(rows.model) == {"embedded"} and set(whole.model) == {"embedded", "embedded (untrained)"}
    assert "late share of what is computed" in set(rows.quantity)
    assert (folders / "results/embedded/02_relatives.parquet").is_file()


def test_total_effects_are_means_with_intervals_over_topics(study: Study) -> None:
    clean = prompts.clean_outcomes(study)
    table = prompts.total_effects(clean).set_index(["treatment", "split"])
    part = clean[(clean.treatment == "T2") & (clean.split == "test")]
    row = table.loc[("T2", "test")]
    assert row.estimate == pytest.approx(part.te.mean()) and row.low < row.estimate < row.high
    sums = clusters.cluster_sums(part, "te")
    assert len(sums.sums) == part.topic.nunique()


def test_a_figure_and_its_table_are_files_and_an_undefined_one_is_a_frame(tmp_path, monkeypatch):
    for module in (paths, figures):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(module, "FIGURES", tmp_path / "figures")
    table = pd.DataFrame({"treatment": ["T1"], "split": ["test"], "estimate": [1.0], "low": [0.5], "high": [1.5]})
    shown = plots.draw("01_total_effects", table, "made")
    csv, png = tmp_path / "results/made/01_total_effects.csv", tmp_path / "figures/made/01_total_effects.png"
    assert "1.00 [0.50, 1.50]" in shown.alt and csv.is_file()
    before = png.read_bytes()
    assert plots.draw("01_total_effects", NotDefined("no pair is left"), "made").alt == "no pair is left"
    assert not csv.exists() and png.read_bytes() != before
