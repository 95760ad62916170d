"""The face: each helper gives what the library calls behind it give, on the shipped model."""

from dataclasses import replace

import ledger_rows
import numpy as np
import pandas as pd
import pytest
import torch

from companion.base import paths
from companion.base.display import NotDefined
from companion.claims import corrected_rules
from companion.claims.verdict import Rows
from companion.mediation import summaries
from companion.mediation.study import Study
from companion.plots import figures
from companion.stats import clusters
from helpers import mediation, model, patching, plots, prompts, statistics


@pytest.fixture(scope="module")
def study() -> Study:
    return model.begin("embedded", "embedded", "embedded", profile="smoke")


@pytest.fixture(scope="module")
def layers(study: Study) -> pd.DataFrame:
    return mediation.measure_layers(study, "embedded").effects


def test_the_log_odds_of_a_plain_forward_pass_are_those_of_the_clean_run(study: Study) -> None:
    pair = model.example_pair(study)
    openers, batch = study.openers["T2"], patching.run_clean(study.subject, [pair])
    with torch.no_grad():
        by_hand = model.log_odds_of_logits(study.subject.model(batch.treated.tokens).logits, openers)
    kept = patching.log_odds(study.subject, batch.treated.resid_post[-1][:, -1], openers)
    assert pair.pair.treatment == model.main_treatment(study) == "T2"
    assert by_hand == pytest.approx(float(kept), abs=1e-3)


def test_tokens_are_aligned_and_differ_where_the_ids_do(study: Study) -> None:
    pair = model.example_pair(study)
    table = prompts.align_tokens(study, pair)
    assert list(table.columns) == ["position", "group", "control", "treated", "differ"]
    assert table.differ.tolist() == (pair.control != pair.treated).tolist() == (table.control != table.treated).tolist()
    control, treated = prompts.tokens_that_differ(study, pair)
    assert control == table.control[table.differ].tolist() and treated == table.treated[table.differ].tolist()


def test_pairs_are_counted_with_their_topics() -> None:
    prompt_set = prompts.load_set("embedded")
    counts = prompts.count_pairs(prompt_set)
    assert counts["pairs"].sum().sum() == len(prompt_set.pairs)
    test = {pair.topic for pair in prompt_set.pairs if pair.treatment == "T2" and pair.split == "test"}
    assert counts.loc["T2", ("topics", "test")] == len(test)


def test_the_last_layer_carries_all(study: Study) -> None:
    pair = model.example_pair(study)
    shares = patching.shares_of_pair(study, pair, ["resid_post", "mlp_out"])
    assert shares.shape == (study.subject.n_layers, 2)
    assert shares.resid_post.iloc[-1] == pytest.approx(1, abs=1e-4)


def test_the_grid_marks_what_two_patches_recompute(study: Study) -> None:
    pair = model.example_pair(study)
    table = patching.recomputed_grid(study, pair, 3)
    early, late = (table[table.panel == panel] for panel in table.panel.unique())
    assert len(early) == len(late) == study.subject.n_layers * len(pair.control)
    assert (early.state == "recomputed").sum() > (late.state == "recomputed").sum() > 0
    distance, layer = patching.distance_and_earliest_layer(study, pair)
    assert pair.control[-1 - distance] != pair.treated[-1 - distance] and layer is not None and layer > 0


def test_a_contrast_is_signed_on_discover_and_shown_on_test(layers: pd.DataFrame) -> None:
    made = mediation.contrast(layers, "T2-T2b")
    assert set(made.split) == {"test"} and set(made.site) == {"attn_out", "mlp_out"}
    assert made.te.mean() > 0 and np.allclose(made.nie, (made.nie0 + made.nie1) / 2)
    whole = mediation.contrast(layers, "T2-T2b", split=None)
    assert set(whole.split) == {"discover", "validate", "test"}
    turned = layers.assign(te=-layers.te, nie0=-layers.nie0, nie1=-layers.nie1)
    assert np.allclose(mediation.contrast(turned, "T2-T2b").nie, made.nie), "the sign is that of TE on discover"
    averaged = mediation.averaged_by_treatment(layers, ["T1", "T2", "T9"])  # what is missing is left out
    assert set(averaged.treatment) == {"T1", "T2"} and set(averaged.split) == {"test"}


def test_the_centroid_table_has_both_intervals_of_every_model_that_has_the_difference() -> None:
    fine = ledger_rows.table(ledger_rows.FINE)
    found = mediation.centroid_table(pd.concat([fine, fine.assign(model="n", claim="C2")]), ["m", "n"])
    assert list(found.index) == ["m"] and found.loc["m", ["difference", "low", "high"]].tolist() == [0.2, 0.1, 0.3]
    wide = corrected_rules.centroid_over_behaviours(Rows("m", fine))
    assert wide is not None and found.loc["m"].tolist()[3:] == [wide.ci_low, wide.ci_high]


def test_clean_runs_and_modules_end_with_the_difference_in_differences(study: Study) -> None:
    thin = replace(study, pairs=tuple(study.of("T2", "T2b")))
    clean = mediation.clean_runs(thin)
    by_id = clean[clean.treatment != "T2-T2b"].set_index("pair_id").te
    difference = clean[clean.treatment == "T2-T2b"].set_index("pair_id").te
    for harmful, twin in study.twins.items():
        if harmful in difference.index:
            assert difference[harmful] == by_id[harmful] - by_id[twin]
    assert len(difference) > 0
    modules = mediation.measure_modules(thin)
    assert {"attn_out.direct", "mlp_out.direct", "head"} <= set(modules.site) and "T2-T2b" in set(modules.treatment)


def test_total_effects_are_means_with_intervals_over_topics(study: Study) -> None:
    clean = mediation.clean_runs(study)
    table = statistics.total_effects(clean).set_index(["treatment", "split"])
    part = clean[(clean.treatment == "T2") & (clean.split == "test")]
    row = table.loc[("T2", "test")]
    assert row.estimate == pytest.approx(part.te.mean()) and row.low < row.estimate < row.high
    sums = clusters.cluster_sums(part, "te")
    assert len(sums.sums) == part.topic.nunique()
    graded = statistics.graded_share(clean)
    assert "T2-T2b" not in graded.index
    own = clean[clean.treatment == "T2"].assign(outcome="Y1")
    assert graded["T2"] == len(summaries.unsaturated_ids(own)) / len(own)


EFFECTS = [(0.8, 0.1, 1.4, True), (0.8, -0.1, 1.4, False), (-0.8, -1.4, -0.1, True), (0.4, 0.1, 0.6, False)]


@pytest.mark.parametrize(("estimate", "low", "high", "passes"), EFFECTS)
def test_an_effect_is_worth_mediating(estimate: float, low: float, high: float, passes: bool) -> None:
    assert statistics.is_worth_mediating(pd.Series({"estimate": estimate, "low": low, "high": high})) is passes


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
