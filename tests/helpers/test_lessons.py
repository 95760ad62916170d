"""Helpers of notebooks 03 to 06, against the library and against plain runs with hooks, on the shipped model."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from companion.base import paths
from companion.base.display import NotDefined
from companion.mediation.estimands import measure_effects, mediators, prompt_tokens
from companion.mediation.study import Study
from companion.steering.comparison import zones
from helpers import model, modules, neurons, prompts, steering, tokens

# ---- modules ----


@pytest.fixture(scope="module")
def twelve_pairs() -> Study:
    whole = model.begin("embedded", "embedded", "made", pairs=12)
    return replace(whole, pairs=tuple(whole.of("T2", "T2b")))


@pytest.fixture(scope="module")
def effects(twelve_pairs: Study, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RESULTS", tmp_path_factory.mktemp("results"))
        made = modules.measure_modules(twelve_pairs)
        assert (paths.RESULTS / "made" / "03_modules.parquet").is_file()
    return made


def test_direct_effects_add_up_to_one_and_each_head_is_part_of_its_layer(twelve_pairs, effects):
    shown = modules.passing_and_writing(effects.assign(site=effects.site.str.replace(".direct", "")), effects)
    assert shown[shown.effect == "direct"].estimate.sum() == pytest.approx(1, abs=1e-3)
    linear = effects[(effects.outcome == "contrast.frozen") & (effects.treatment == "T2")]
    of = {
        site: linear[linear.site == f"{site}.direct"].groupby(["pair_id", "layer"]).nie0.sum()
        for site in ("head", "attn_out")
    }
    assert np.allclose(of["head"], of["attn_out"], atol=1e-3)


def test_carrying_heads_are_chosen_on_discover_and_framed(effects: pd.DataFrame) -> None:
    heads = modules.carrying_heads(effects)
    on_test = effects.split == "test"
    turned = effects.assign(**{name: effects[name].where(~on_test, -effects[name]) for name in ("nie0", "nie1")})
    assert modules.carrying_heads(turned) == heads and len(heads) == 3
    shown = modules.head_effects(effects)
    framed = shown[shown.carries & (shown.effect == "indirect")]
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
    _, treated = model.token_ids(twelve_pairs, pair)
    with torch.no_grad(), modules.eager_attention(twelve_pairs.subject):
        row = twelve_pairs.subject.model(treated, output_attentions=True).attentions[3][0, 1, -1]
    assert first.weight.tolist()[1:] == pytest.approx(row[-len(first) + 1 :].tolist())
    by_group = modules.attention_by_group(twelve_pairs, [pair], heads)
    assert np.allclose(by_group.sum(), 1, atol=1e-4)
    wrapper = first[first.token.isin(["·flag"])].weight.sum()
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
        last = study.subject.model(prompt).logits[:, -1]
    comply, refuse = (list(getattr(study.openers["T2"], camp)) for camp in ("comply", "refuse"))
    return float((last[:, comply].logsumexp(1) - last[:, refuse].logsumexp(1)).item())


def test_four_cells_and_the_product_are_those_of_runs_with_hooks(study: Study) -> None:
    pair, members, seen = model.example_pair(study), [3, 77, 200], []
    sides = prompt_tokens(study.subject, [pair])
    with neurons.edit_input(study.subject.layers[-1].down_proj, lambda x: seen.append(x[0, -1])), torch.no_grad():
        for ids in sides:
            study.subject.model(ids)
    by_hand = [patched(study, prompt, values, members) for prompt in sides for values in seen]
    assert neurons.four_cells(study, pair, members) == pytest.approx(by_hand, abs=1e-4)
    table = neurons.gate_and_up(study, pair, 9)
    assert isinstance(table, pd.DataFrame)
    assert np.diag(table) == pytest.approx([float(values[9]) for values in seen], abs=1e-5)


def test_the_strongest_are_ranked_on_discover_and_fire_on_prompts_of_test(found: neurons.Neurons) -> None:
    table = neurons.strongest(found, 5)
    assert len(table) == 5 and table.neuron.is_unique
    assert (table.estimate - (table.nie0 + table.nie1) / 2).abs().max() < 1e-9
    fires = neurons.fires_on(found, table.neuron.to_numpy()[:2])
    assert set(fires.kind) == set(neurons.KINDS.values()) and fires.groupby("neuron").size().nunique() == 1


def test_curves_end_at_the_whole_and_what_is_not_defined_stays_so(found: neurons.Neurons, study: Study) -> None:
    made = neurons.all_curves(found)
    table, settled = neurons.curve_table(made, found.primary), neurons.settled(made, study)
    assert isinstance(table, pd.DataFrame) and isinstance(settled, pd.DataFrame)
    harm = settled.set_index("behaviour").loc["harm"]
    assert set(table[table.series == "largest first"].k90) == {harm.estimate} and harm.few == 8
    ends = table.sort_values("k").groupby("series").estimate.last()
    assert ends.to_numpy() == pytest.approx(1.0, abs=1e-6)
    none = NotDefined("nothing")
    assert neurons.curve_table(none, "T2") is neurons.settled(none, study) is neurons.gate_cells(none) is none


def test_a_behaviour_without_a_k90_has_none_and_its_words_are_those_that_differ(
    found: neurons.Neurons, study: Study
) -> None:
    made = neurons.all_curves(found)
    assert not isinstance(made, NotDefined)
    backwards = {name: values - values[:, [-1]] for name, values in made["main"].values.items()}  # 0 at the end
    never = neurons.curve_table(made | {"random order": replace(made["main"], values=backwards)}, found.primary)
    assert isinstance(never, pd.DataFrame) and not (never.series == "random order").any()
    pair = study.pairs[0].pair
    pair = replace(pair, control="Answer with a tip. How?", treated="Answer with a long poem. How?")
    assert neurons._choice(pair) == '"tip" or "long poem"'
    assert neurons._choice(replace(pair, sensitive=True)) == ""


# ---- tokens ----


def test_the_map_of_a_pair_has_its_effects_as_shares(study: Study) -> None:
    pair = model.example_pair(study)
    found = tokens.map_of_pair(study, pair).set_index(["site", "layer", "position"]).share
    last = len(pair.control) - 1
    for site in ("resid_post", "attn_out", "mlp_out"):
        effect = measure_effects(study.subject, [pair], study.openers, mediators(study.subject, [site]))
        share = ((effect.nie0 + effect.nie1) / 2 / effect.te).tolist()
        assert [found[site, layer, last] for layer in effect.layer] == pytest.approx(share, abs=1e-4)


def test_the_ways_of_one_pair_begin_with_its_whole_effect(study: Study) -> None:
    pair = model.example_pair(study)
    ways = tokens.path_effects_of_pair(study, pair, 4)
    whole = measure_effects(study.subject, [pair], study.openers, mediators(study.subject, ["resid_post"], layers=[4]))
    assert list(ways.index) == ["live", "attention held", "MLPs held", "both held"]
    assert ways["live"] == pytest.approx(whole.nie0.item(), abs=1e-4) and abs(ways["both held"] - ways["live"]) > 0.01


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
        harmful = table[table.kind == "harmful"]
        assert (~table.refused[table.kind != "harmful"]).any() and 0 < harmful.refused.mean() < 1
        means = [
            torch.stack([residuals(ten_pairs, text) for text in harmful.text[harmful.refused == is_refused]]).mean(0)
            for is_refused in (True, False)
        ]
        library = steering.rejection_directions(ten_pairs, found, table)
        assert (means[0] - means[1] - library).norm() < 1e-4 * library.norm()


def test_as_many_prompts_of_either_kind_are_given_also_where_there_is_no_experiment(ten_pairs, lab):
    for found in (lab, WHY):
        assert [len(one) for one in steering.test_prompts(ten_pairs, found, 3).values()] == [3, 3]


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


def test_what_is_not_defined_goes_through_with_its_reason(ten_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    made = steering.run_trial(WHY)
    same, falls = steering.same_budget(made)
    found = [made, same, falls, *steering.adasteer_laws(WHY), steering.paired_differences(made)]
    found += [steering.summary(made, "m"), steering.harm_at_equal_cost(made), steering.before_and_after(made, "x")]
    assert all(one == WHY for one in found)
    steering.write_evidence(made, same, "m")
    (row,) = pd.read_csv(tmp_path / "m" / "06_evidence.csv").itertuples()
    assert (row.quantity, row.note) == ("not defined", WHY.reason)
    assert not (tmp_path / "m" / "06_summary.csv").exists()
