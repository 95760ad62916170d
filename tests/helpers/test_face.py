"""The face: each helper gives what the library calls behind it give, on the shipped model."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from companion.base import paths
from companion.base.display import NotDefined
from companion.base.files import read_json
from companion.calibration import rates
from companion.claims.corrected_rules import STATEMENTS
from companion.mediation.study import Study
from companion.plots import figures
from companion.stats import clusters
from helpers import calibration, claims, layers, model, plots, prompts

# ---- face ----


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


def test_tokens_are_aligned_and_differ_where_the_ids_do(study: Study) -> None:
    pair = model.example_pair(study)
    table = prompts.align_tokens(study, pair)
    assert list(table.columns) == ["position", "group", "control", "treated", "differ"]
    assert table.differ.tolist() == (pair.control != pair.treated).tolist() == (table.control != table.treated).tolist()


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
    assert list(dict.fromkeys(curves.line)) == ["T2", "T2-T2b", "untrained twin"]
    assert curves[curves.layer == 5].estimate.round(4).tolist() == [1, 1, 1]
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


# ---- prompts ----


def test_the_pair_that_flips_is_refused_in_one_wrapper_and_answered_in_the_other(study: Study) -> None:
    pair = prompts.clearest_flip(study)
    clean = prompts.clean_outcomes(replace(study, pairs=(pair,)))
    assert clean.y00[0] < 0 < clean.y11[0]
    assert prompts.shown_answer(study, pair, "control").startswith("refused: sorry")
    said = prompts.shown_answer(study, pair, "treated")
    assert said.startswith("answered, first word: ") and len(said.split()) == 4, "no more of a harmful answer is shown"
    twin = next(one for one in study.of("T2b") if one.pair.id == pair.pair.twin)
    assert len(prompts.shown_answer(study, twin, "control").split()) > 4
    hidden = replace(twin, pair=replace(twin.pair, sensitive=True))
    assert prompts.shown_answer(study, hidden, "control") == "answered"


def test_a_pair_of_a_set_without_wrappers_flips_towards_refusal(study: Study) -> None:
    pair = prompts.clearest_flip(replace(study, pairs=tuple(study.of("T1"))))
    clean = prompts.clean_outcomes(replace(study, pairs=(pair,)))
    assert clean.y11[0] < 0 < clean.y00[0]


def test_the_map_of_a_pair_holds_the_mean_of_both_directions(study: Study) -> None:
    pair = model.example_pair(study)
    table = model.component_map(study, pair)
    effects = model.effects_of_pair(study, pair, ["attn_out", "mlp_out"])
    assert isinstance(table, pd.DataFrame) and len(table) == 2 * study.subject.n_layers
    np.testing.assert_allclose(table.share, (effects.nie0 + effects.nie1) / 2 / effects.te)
    assert model.component_map(study, NotDefined("too long")) == NotDefined("too long")


def test_a_refusal_rate_is_a_mean_of_probabilities() -> None:
    y = np.log([1.0, 3.0, 1 / 3, 9.0])
    clean = pd.DataFrame({"treatment": "T2", "topic": list("abcd"), "y00": y, "y11": 5.0})
    table = prompts.refusal_rates(clean)
    assert table[["prompt", "request"]].to_numpy().tolist() == [
        ["neutral wrapper", "harmful"],
        ["jailbreak wrapper", "harmful"],
    ]
    assert table.estimate[0] == pytest.approx((0.5 + 0.25 + 0.75 + 0.1) / 4) and table.greedy[0] == 0.25


def test_the_facts_of_the_model_are_a_file(study: Study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    model.write_facts(replace(study, slug="mine"))
    assert read_json(tmp_path / "mine" / "model_facts.json")["layers"] == study.subject.n_layers


# ---- claims ----


@pytest.fixture(scope="module")
def judged() -> claims.Judged:
    return claims.judge_run("embedded")


def test_each_claim_has_one_answer_with_its_rows_and_its_counts(judged: claims.Judged) -> None:
    assert [one.verdict.claim for one in judged.own] == list(STATEMENTS)
    rows = judged.evidence_of("C2").set_index(["quantity", "variant"])
    answer = next(one for one in judged.own if one.verdict.claim == "C2").verdict
    assert rows.loc[(answer.quantity, "main"), "estimate"] == answer.estimate
    counts = judged.error_counts("C2")
    assert set(counts) >= {"false_supported", "power_to_support"} and all(" of " in text for text in counts.values())
    assert judged.error_counts("C99") == {}


def test_a_control_is_blank_where_it_does_not_belong_to_the_claim(judged: claims.Judged) -> None:
    table = judged.controls()
    assert set(table.to_numpy().ravel()) <= {"", "passed", "failed", "not run"}
    assert table.loc["joint probability", "C2"] == "passed" and table.loc["per parameter", "C1"] == ""


def test_files_hold_every_verdict_and_the_page(judged, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    shown = claims.write_claims(judged)
    kept = pd.read_csv(tmp_path / "embedded" / "claims.csv")
    assert len(shown) == (kept.model == "embedded").sum() and set(kept.rule) == {"registered", "corrected"}
    assert len(json.loads((tmp_path / "embedded" / "claims.json").read_text())) == len(kept)
    text = judged.page(invented=True).data
    assert (tmp_path / "embedded" / "claims.md").read_text() == text and "Model and language are invented" in text


# ---- calibration ----


def test_each_claim_is_judged_by_one_rule_and_counts_are_those_of_the_page() -> None:
    table = calibration.draws()
    assert set(table.claim) == set(STATEMENTS) and (table.groupby("claim").rule.nunique() == 1).all()
    page = rates.claim_rates(rates.main_draws())
    for row in calibration.error_rates(table).itertuples():
        claim = row.claim.split()[0]
        own = page.get(f"{claim}*", page.get(claim, {}))[row.error.replace(" ", "_")]
        assert (own["hits"], own["n"]) == (row.hits, row.n) and row.low < row.estimate + 1e-9 < row.high + 2e-9
    assert set(calibration.draws("registered").rule) == {"registered"}


def test_grades_are_those_of_hand_made_rates() -> None:
    rows = [("true", "supported", 57), ("true", "inconclusive", 3), ("false", "contradicted", 60)]
    table = pd.DataFrame([(t, v) for t, v, n in rows for _ in range(n)], columns=["truth", "verdict"])
    table = table.assign(claim="C2", gate="passed")
    assert calibration.grades(table).loc["C2"].tolist() == ["strong", "strong"]
    silent = table.assign(verdict=table.verdict.where(table.truth == "false", "inconclusive"))
    assert calibration.grades(silent).loc["C2"].tolist() == ["cannot tell", "cannot tell"]


def test_the_drawing_has_a_role_and_a_share_for_each_component() -> None:
    one = calibration.built_model("late", 11)
    table = one.measured("A", pd.Series(np.arange(len(one.parts)) / 100))
    assert table.share.tolist() == pytest.approx([k / 100 for k in range(12)]) and "decides" in table.role.tolist()


def test_along_a_row_of_power_the_number_of_models_stays() -> None:
    for by in ("topics", "effect"):
        table = calibration.power(by)
        counts = table.map(lambda text: int(text.split(" of ")[1]))
        assert len(table.columns) > 2 and (counts.nunique(axis=1) == 1).all()
        assert not {"C2", "C5c"} & set(table.index.get_level_values("claim")), "the corrected rule answers"


def test_held_out_kinds_fool_the_rules_that_the_lesson_names_and_no_other() -> None:
    table = calibration.held_out().reset_index()
    wrong = table[(table.truth == "false") & (table.supported > 0) | (table.truth == "true") & (table.contradicted > 0)]
    assert wrong[["kind", "claim", "supported"]].to_numpy().tolist() == [
        ["recovers", "C5c", 4],
        ["understudy", "C4", 8],
    ]
    draws = rates.held_out_draws()
    own = rates.with_held_out({name: {} for name in ("C1*", "C4*", "C5c*")}, draws)
    assert own["C1*"] == {} and own["C4*"]["held_out_supported"] == {"hits": 8, "n": 24}
    assert calibration.grades(calibration.draws()).loc[["C2", "C4", "C5c"], "supported"].tolist() == [
        "strong", "weak", "weak",
    ]  # fmt: skip
