"""Helpers: each gives what the library calls behind it give, or plain runs with hooks, on the shipped model."""

import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from companion.base import paths
from companion.base.display import NotDefined
from companion.base.files import read_json
from companion.calibration import rates
from companion.claims.corrected_rules import STATEMENTS
from companion.mediation.estimands import prompt_tokens
from companion.mediation.study import Study, control_studies
from companion.plots import figures
from companion.steering.comparison import zones
from helpers import calibration, claims, layers, model, modules, neurons, plots, prompts, steering, tokens


@pytest.fixture(scope="module")
def study() -> Study:
    return model.begin("embedded", "embedded", "embedded", profile="smoke")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Results and figures of this module's runs."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for module in (paths, figures):
            patch.setattr(module, "RESULTS", folder / "results")
            patch.setattr(module, "FIGURES", folder / "figures")
        yield folder


# ---- layers ----


@pytest.fixture(scope="module")
def sweep(study: Study, folders: Path) -> layers.Layers:
    return layers.measure_layers(study)


def test_a_contrast_is_signed_on_discover_and_shown_on_test(sweep: layers.Layers) -> None:
    made = layers.signed_contrast(sweep.effects, "T2-T2b")
    assert set(made.split) == {"test"} and set(made.site) == {"attn_out", "mlp_out"}
    assert made.te.mean() > 0 and np.allclose(made.nie, (made.nie0 + made.nie1) / 2)
    assert set(layers.signed_contrast(sweep.effects, "T2-T2b", split=None).split) == {"discover", "validate", "test"}
    turned = sweep.effects.assign(te=-sweep.effects.te, nie0=-sweep.effects.nie0, nie1=-sweep.effects.nie1)
    assert np.allclose(layers.signed_contrast(turned, "T2-T2b").nie, made.nie), "the sign is that of TE on discover"
    shares = layers.shares_by_treatment(sweep.effects)
    assert list(shares.treatment.unique()) == ["T1", "T2", "T2-T2b"], "T2b has no effect to be a share of"
    none = layers.shares_by_treatment(sweep.effects.assign(te=0.1))
    assert str(none) == "No treatment has a total effect of at least 0.5 log-odds."


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
    rows = pd.DataFrame(sweep.evidence).query("variant == 'main' and quantity.str.startswith('psi0')")
    assert carried[layers.deepest_early_layer(6)] == pytest.approx(rows.estimate.item(), abs=1e-6)
    assert carried[sweep.study.subject.n_layers - 1] == pytest.approx(1, abs=1e-4)


def test_the_evidence_is_that_of_the_model_and_of_its_twin(sweep: layers.Layers, folders: Path, monkeypatch) -> None:
    held = []

    def seen(*given):
        for label, one in control_studies(*given):
            held.append(weakref.ref(one.subject.model))
            yield label, one

    monkeypatch.setattr(layers, "control_studies", seen)
    relatives = layers.measure_relatives(sweep.study, "embedded", "smoke")
    gc.collect()
    assert held and not any(weights() for weights in held), "no relative stays in memory"
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


# ---- plots and prompts ----


def test_a_figure_and_its_table_are_files_and_an_undefined_one_is_a_frame(folders: Path) -> None:
    table = pd.DataFrame({"treatment": ["T1"], "split": ["test"], "estimate": [1.0], "low": [0.5], "high": [1.5]})
    shown = plots.draw("01_total_effects", table, "made")
    csv, png = folders / "results/made/01_total_effects.csv", folders / "figures/made/01_total_effects.png"
    assert "1.00 [0.50, 1.50]" in shown.alt and csv.is_file()
    before = png.read_bytes()
    assert plots.draw("01_total_effects", NotDefined("no pair is left"), "made").alt == "no pair is left"
    assert not csv.exists() and png.read_bytes() != before


def test_tokens_are_aligned_and_differ_where_the_ids_do(study: Study) -> None:
    pair = model.example_pair(study)
    table = prompts.align_tokens(study, pair)
    assert list(table.columns) == ["position", "group", "control", "treated", "differ"]
    assert table.differ.tolist() == (pair.control != pair.treated).tolist() == (table.control != table.treated).tolist()
    control, treated = model.token_ids(study, pair)
    assert torch.equal(prompts.chat_tokens(study, pair.pair.control), control) and control.shape == treated.shape


def test_total_effects_are_means_with_intervals_over_topics(study: Study) -> None:
    clean = prompts.clean_outcomes(study)
    part = clean[(clean.treatment == "T2") & (clean.split == "test")]
    row = prompts.total_effects(clean).set_index(["treatment", "split"]).loc[("T2", "test")]
    assert row.estimate == pytest.approx(part.te.mean()) and row.low < row.estimate < row.high


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
    # In a set without wrappers a pair flips towards refusal.
    pair = prompts.clearest_flip(replace(study, pairs=tuple(study.of("T1"))))
    clean = prompts.clean_outcomes(replace(study, pairs=(pair,)))
    assert clean.y11[0] < 0 < clean.y00[0]


def test_the_map_of_a_pair_holds_the_mean_of_both_directions(study: Study) -> None:
    pair = model.example_pair(study)
    table, effects = model.component_map(study, pair), model.effects_of_pair(study, pair, ["attn_out", "mlp_out"])
    assert isinstance(table, pd.DataFrame) and len(table) == 2 * study.subject.n_layers
    np.testing.assert_allclose(table.share, (effects.nie0 + effects.nie1) / 2 / effects.te)
    assert model.component_map(study, NotDefined("too long")) == NotDefined("too long")


def test_a_refusal_rate_is_a_mean_of_probabilities() -> None:
    y = np.log([1.0, 3.0, 1 / 3, 9.0])
    table = prompts.refusal_rates(pd.DataFrame({"treatment": "T2", "topic": list("abcd"), "y00": y, "y11": 5.0}))
    kinds = [["neutral wrapper", "harmful"], ["jailbreak wrapper", "harmful"]]
    assert table[["prompt", "request"]].to_numpy().tolist() == kinds
    assert table.estimate[0] == pytest.approx((0.5 + 0.25 + 0.75 + 0.1) / 4) and table.greedy[0] == 0.25


def test_the_facts_of_the_model_are_a_file(study: Study, folders: Path) -> None:
    model.write_facts(replace(study, slug="mine"))
    assert read_json(folders / "results/mine/model_facts.json")["layers"] == study.subject.n_layers


# ---- claims ----


@pytest.fixture(scope="module")
def judged() -> claims.Judged:
    return claims.judge_run("embedded")


def test_each_claim_has_one_answer_with_its_rows_its_counts_and_its_controls(judged: claims.Judged) -> None:
    answers = {one.verdict.claim: one.verdict for one in judged.own}
    assert list(answers) == list(STATEMENTS) and len(judged.own) == len(answers)
    rows = judged.evidence_of("C2").set_index(["quantity", "variant"])
    assert rows.loc[(answers["C2"].quantity, "main"), "estimate"] == answers["C2"].estimate
    counts = judged.error_counts("C2")
    assert set(counts) >= {"false_supported", "power_to_support"} and all(" of " in text for text in counts.values())
    assert judged.error_counts("C99") == {}
    table = judged.controls()
    assert set(table.to_numpy().ravel()) <= {"", "passed", "failed", "not run"}
    assert table.loc["joint probability", "C2"] == "passed" and table.loc["per parameter", "C1"] == ""


def test_files_hold_every_verdict_and_the_page(judged: claims.Judged, folders: Path) -> None:
    shown, folder = claims.write_claims(judged), folders / "results/embedded"
    kept = pd.read_csv(folder / "claims.csv")
    assert len(shown) == (kept.model == "embedded").sum() and set(kept.rule) == {"registered", "corrected"}
    assert len(json.loads((folder / "claims.json").read_text())) == len(kept)
    text = judged.page(invented=True).data
    assert (folder / "claims.md").read_text() == text and "Model and language are invented" in text


# ---- calibration ----


def test_each_claim_is_judged_by_one_rule_and_counts_are_those_of_the_page() -> None:
    table = calibration.draws()
    assert len(table[["kind", "seed"]].drop_duplicates()) > 500
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


@pytest.mark.parametrize("by", ["topics", "effect"])
def test_along_a_row_of_power_the_number_of_models_stays(by: str) -> None:
    table = calibration.power(by)
    counts = table.map(lambda text: int(text.split(" of ")[1]))
    assert len(table.columns) > 2 and (counts.nunique(axis=1) == 1).all()
    assert not {"C2", "C5c"} & set(table.index.get_level_values("claim")), "the corrected rule answers"


def test_held_out_kinds_fool_the_rules_that_the_lesson_names_and_no_other() -> None:
    table = calibration.held_out().reset_index()
    wrong = table[(table.truth == "false") & (table.supported > 0) | (table.truth == "true") & (table.contradicted > 0)]
    found = wrong[["kind", "claim", "supported"]].to_numpy().tolist()
    assert found == [["recovers", "C5c", 4], ["understudy", "C4", 8]]
    own = rates.with_held_out({name: {} for name in ("C1*", "C4*", "C5c*")}, rates.held_out_draws())
    assert own["C1*"] == {} and own["C4*"]["held_out_supported"] == {"hits": 8, "n": 24}
    supported = calibration.grades(calibration.draws()).supported
    assert supported[["C2", "C4", "C5c"]].tolist() == ["strong", "weak", "weak"]


# ---- modules ----


@pytest.fixture(scope="module")
def twelve_pairs() -> Study:
    whole = model.begin("embedded", "embedded", "twelve", pairs=12)
    return replace(whole, pairs=tuple(whole.of("T2", "T2b")))


@pytest.fixture(scope="module")
def effects(twelve_pairs: Study, folders: Path) -> pd.DataFrame:
    made = modules.measure_modules(twelve_pairs)
    assert (folders / "results/twelve/03_modules.parquet").is_file()
    return made


def test_direct_effects_add_up_to_one_and_each_head_is_part_of_its_layer(twelve_pairs, effects):
    shown = modules.passing_and_writing(effects.assign(site=effects.site.str.replace(".direct", "")), effects)
    assert shown[shown.effect == "direct"].estimate.sum() == pytest.approx(1, abs=1e-3)
    linear = effects[(effects.outcome == "contrast.frozen") & (effects.treatment == "T2")]
    sums = linear.groupby(["site", "pair_id", "layer"]).nie0.sum()
    assert np.allclose(sums["head.direct"], sums["attn_out.direct"], atol=1e-3)


def test_carrying_heads_are_chosen_on_discover_and_framed(effects: pd.DataFrame) -> None:
    heads = modules.carrying_heads(effects)
    on_test = effects.split == "test"
    turned = effects.assign(**{name: effects[name].where(~on_test, -effects[name]) for name in ("nie0", "nie1")})
    assert modules.carrying_heads(turned) == heads and len(heads) == 3
    framed = modules.head_effects(effects).query("carries and effect == 'indirect'")
    assert {*zip(framed.layer, framed["head"], strict=True)} == {*heads}


def test_enough_and_needed_are_sums_over_layers(effects: pd.DataFrame) -> None:
    totals = effects[effects.site.str.endswith("_out.direct")].assign(site=lambda t: t.site.str.removesuffix(".direct"))
    found = modules.enough_or_needed(totals).estimate
    test = modules.signed_contrast(totals)
    for site in ("attn_out", "mlp_out"):
        own = test[test.site == site].groupby("pair_id")[["nie0", "nie1"]].sum().mean()
        assert found[site, "enough (NIE0)"] == pytest.approx(own.nie0)
        assert found[site, "NIE1 - NIE0"] == pytest.approx(own.nie1 - own.nie0)


def test_attention_rows_add_up_to_one_whether_by_token_or_by_group(twelve_pairs: Study) -> None:
    pair, heads = model.example_pair(twelve_pairs), [(3, 1), (5, 0)]
    shown = modules.attention_of_heads(twelve_pairs, pair, heads)
    sums = shown.groupby(["panel", "head"]).weight.sum()
    assert len(sums) == 4 and np.allclose(sums, 1, atol=1e-4)
    first = shown[(shown.panel == "treated prompt") & (shown["head"] == "3.1")]
    with torch.no_grad(), modules.eager_attention(twelve_pairs.subject):
        looks = twelve_pairs.subject.model(model.token_ids(twelve_pairs, pair)[1], output_attentions=True).attentions
    row = looks[3][0, 1, -1]
    assert first.weight.tolist()[1:] == pytest.approx(row[-len(first) + 1 :].tolist())
    by_group = modules.attention_by_group(twelve_pairs, [pair], heads)
    assert np.allclose(by_group.sum(), 1, atol=1e-4)
    wrapper = first[first.token == "·flag"].weight.sum()
    assert by_group.loc["wrapper", ("3.1", "treated")] >= wrapper > 0.5


def test_shares_that_are_drawn_come_raw_first_and_none_is_drawn_without_a_wrapper() -> None:
    missing = NotDefined("no wrapper")
    assert modules.normalised(missing) is missing
    evidence = pd.DataFrame({"quantity": ["MLP share of NIE"] * 3, "variant": ["per parameter", "norm frozen", "main"]})
    drawn = modules.normalised(evidence.assign(ci_low=0.1, ci_high=0.9))
    assert drawn.normalisation.tolist() == ["raw", "per parameter"] and set(drawn.effect) == {"indirect effects"}


# ---- neurons ----


@pytest.fixture(scope="module")
def found(study: Study) -> neurons.Neurons:
    return neurons.measure_neurons(study)


def patched(study: Study, prompt: torch.Tensor, values: torch.Tensor, members: list[int]) -> float:
    """Y1 of a prompt with some last-layer neurons at given values, by a hook."""

    def put(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, -1, members] = values[members]
        return x

    with torch.no_grad(), neurons.edit_input(study.subject.layers[-1].down_proj, put):
        return model.log_odds_of_logits(study.subject.model(prompt).logits, study.openers["T2"])


def test_four_cells_and_the_product_are_those_of_runs_with_hooks(study: Study) -> None:
    pair, members, seen = model.example_pair(study), [3, 77, 200], []
    sides = prompt_tokens(study.subject, [pair])
    with neurons.edit_input(study.subject.layers[-1].down_proj, lambda x: seen.append(x[0, -1])), torch.no_grad():
        for ids in sides:
            study.subject.model(ids)
    by_hand = [patched(study, prompt, values, members) for prompt in sides for values in seen]
    assert neurons.four_cells(study, pair, members) == pytest.approx(by_hand, abs=1e-4)
    table = neurons.gate_and_up(study, pair, 9)
    assert np.diag(table) == pytest.approx([float(values[9]) for values in seen], abs=1e-5)


def test_the_strongest_are_ranked_on_discover_and_fire_on_prompts_of_test(found: neurons.Neurons) -> None:
    table = neurons.strongest(found, 5)
    assert len(table) == 5 and table.neuron.is_unique
    assert (table.estimate - (table.nie0 + table.nie1) / 2).abs().max() < 1e-9
    fires = neurons.fires_on(found, table.neuron.to_numpy()[:2])
    assert set(fires.kind) == set(neurons.KINDS.values()) and fires.groupby("neuron").size().nunique() == 1


def test_curves_end_at_the_whole_a_k90_may_be_missing_and_words_are_those_that_differ(found, study):
    made = neurons.all_curves(found)
    table, settled = neurons.curve_table(made, found.primary), neurons.settled(made, study)
    harm = settled.set_index("behaviour").loc["harm"]
    assert set(table[table.series == "largest first"].k90) == {harm.estimate} and harm.few == 8
    ends = table.sort_values("k").groupby("series").estimate.last()
    assert ends.to_numpy() == pytest.approx(1.0, abs=1e-6)
    none = NotDefined("nothing")
    assert neurons.curve_table(none, "T2") is neurons.settled(none, study) is neurons.gate_cells(none) is none
    backwards = {name: values - values[:, [-1]] for name, values in made["main"].values.items()}  # 0 at the end
    never = neurons.curve_table(made | {"random order": replace(made["main"], values=backwards)}, found.primary)
    assert not (never.series == "random order").any()
    pair = study.pairs[0].pair
    pair = replace(pair, control="Answer with a tip. How?", treated="Answer with a long poem. How?")
    assert neurons._choice(pair) == '"tip" or "long poem"'
    assert neurons._choice(replace(pair, sensitive=True)) == ""


# ---- tokens ----


def test_the_map_of_a_pair_has_its_effects_as_shares(study: Study) -> None:
    pair = model.example_pair(study)
    found = tokens.map_of_pair(study, pair).set_index(["position", "site", "layer"]).share[len(pair.control) - 1]
    effects = model.effects_of_pair(study, pair, ["resid_post", "attn_out", "mlp_out"]).set_index(["site", "layer"])
    share = (effects.nie0 + effects.nie1) / 2 / effects.te
    assert found[share.index].to_numpy() == pytest.approx(share.to_numpy(), abs=1e-4)


def test_the_ways_of_one_pair_begin_with_its_whole_effect(study: Study) -> None:
    pair = model.example_pair(study)
    ways = tokens.path_effects_of_pair(study, pair, 4)
    whole = model.effects_of_pair(study, pair, ["resid_post"]).set_index("layer").nie0[4]
    assert list(ways.index) == ["live", "attention held", "MLPs held", "both held"]
    assert ways["live"] == pytest.approx(whole, abs=1e-4) and abs(ways["both held"] - ways["live"]) > 0.01


def test_an_answer_is_labelled_by_what_it_says_and_what_is_not_defined_says_why(study: Study) -> None:
    pair = tokens.tested_pairs(study, 1)[0]
    assert pair.pair.split == "test" and pair.pair.treatment == "T2"
    ids = {name: [*part[:1], *tokens.end_tokens(study.subject)][:2] for name, part in
           (("refusal", study.openers["T2"].refuse), ("other", study.openers["T2"].comply))}  # fmt: skip
    assert tokens.label(study, pair, ids["refusal"]) == "refusal" != tokens.label(study, pair, ids["other"])
    none = NotDefined("No jailbroken prompt (T2) in the test split.")
    assert tokens.rates(study, none) == (none, str(none))


# ---- steering ----

WHY = NotDefined("the prompt set has no harmful request")


@pytest.fixture(scope="module")
def ten_pairs() -> Study:
    return model.begin("embedded", "embedded", "embedded", pairs=10)


@pytest.fixture(scope="module")
def lab(ten_pairs: Study) -> steering.Lab:
    return replace(steering.label_prompts(ten_pairs, "embedded"), said={})


def residuals(study: Study, text: str) -> torch.Tensor:
    late = zones(study.subject.n_layers)["late"]
    with torch.no_grad(), model.record_outputs({at: study.subject.layers[at].block for at in late}) as seen:
        study.subject.model(prompts.chat_tokens(study, text))
    return torch.stack([seen[at][0, -1] for at in late])


def test_directions_by_hand_are_the_librarys_also_where_there_are_none(ten_pairs, lab, capsys):
    asked = steering.requests(ten_pairs, lab)
    assert not capsys.readouterr().out and set(asked.columns) >= {"text", "kind", "refused"}
    practice = steering.requests(ten_pairs, WHY)
    assert "for practice only: the prompt set has no" in capsys.readouterr().out
    for table, found in ((asked, lab), (practice, WHY)):
        assert [len(one) for one in steering.test_prompts(ten_pairs, found, 3).values()] == [3, 3]
        harmful = table[table.kind == "harmful"]
        assert (~table.refused[table.kind != "harmful"]).any() and 0 < harmful.refused.mean() < 1
        means = [
            torch.stack([residuals(ten_pairs, text) for text in harmful.text[harmful.refused == is_refused]]).mean(0)
            for is_refused in (True, False)
        ]
        library = steering.rejection_directions(ten_pairs, found, table)
        assert (means[0] - means[1] - library).norm() < 1e-4 * library.norm()


def test_the_tries_hold_what_the_laws_are_fitted_from_and_practice_where_there_are_none(lab, capsys):
    tries, library = steering.adasteer_tries(lab)
    assert "practice" not in capsys.readouterr().out and set(tries.coefficient) == {0.0, 0.25, 0.5, 1.0, 2.0}
    assert tries.groupby(["law", "kind"], sort=False).ngroups == 3
    _, slopes = steering.adasteer_laws(lab)
    fitted = slopes[["slope", "at position 0", "read at layer"]].to_numpy().ravel()
    assert library.to_numpy() == pytest.approx(fitted, abs=0.006)
    practice, simple = steering.adasteer_tries(WHY)
    assert f"for practice only: {WHY}" in capsys.readouterr().out and list(practice.columns) == list(tries.columns)
    assert practice.refused[practice.kind == "harmful"].all() and simple.to_dict()["b_c"] == tries.coefficient.max()


def test_the_librarys_adasteer_starts_at_the_plain_model_and_moves_it(ten_pairs, lab):
    text = lab.fit.prompts.text[lab.fit.harmful].iloc[0]
    plain = float(steering.steered_outcomes(ten_pairs, [text], {}).p_refuse.iloc[0])
    none, full = (steering.adasteer_refusal(lab, text, strength) for strength in (0.0, 1.0))
    assert none == pytest.approx(plain, abs=1e-6) and abs(full - plain) > 1e-4
    assert steering.adasteer_refusal(WHY, text, 1.0) is WHY


def test_what_is_not_defined_goes_through_with_its_reason(folders: Path) -> None:
    made = steering.run_trial(WHY)
    same, falls = steering.same_budget(made)
    found = [made, same, falls, *steering.adasteer_laws(WHY), steering.paired_differences(made)]
    found += [steering.summary(made, "m"), steering.harm_at_equal_cost(made), steering.before_and_after(made, "x")]
    assert all(one == WHY for one in found)
    steering.write_evidence(made, same, "m")
    (row,) = pd.read_csv(folders / "results/m/06_evidence.csv").itertuples()
    assert (row.quantity, row.note) == ("not defined", WHY.reason)
    assert not (folders / "results/m/06_summary.csv").exists()
