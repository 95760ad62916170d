"""Prompts, directions and the experiment: what a missing class stops, and what saved ones say of themselves."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pandas as pd
import pytest
from steering_lab import experiment_of, fitted

from companion.base.display import NotDefined
from companion.base.errors import InputError
from companion.claims.registered_rules import rule_c6
from companion.claims.verdict import Rows
from companion.evidence import steering
from companion.generation.hooks import Steering
from companion.mediation import study
from companion.model import activations
from companion.model.load import load
from companion.prompts import pairs
from companion.prompts.pairs import Pair
from companion.stats.rates import Change
from companion.steering import comparison, extraction
from companion.steering import experiment as experiments
from companion.steering import trial as trials
from companion.steering.experiment import PLAIN, Effort, SteeringExperiment, open_experiment, select, trial
from companion.steering.extraction import Fit

# ---- extraction ----


MISSING = [("refused", "refused no harmful prompt: add plainer ones", {"prompting"}),
           ("complied", "complied with no harmful prompt: add stronger", {"prompting"}),
           ("benign", "answered no harmless prompt: add harmless", {"prompting", comparison.FIXED})]  # fmt: skip


@pytest.mark.parametrize(("gone", "says", "stands"), MISSING)
def test_a_missing_class_is_named_and_what_needs_nothing_of_it_is_defined(fit, gone, says, stands):
    left = fit.subset((fit.prompts["class"] != gone).to_numpy())
    assert says in left.missing and set(left.means()) == set(extraction.CLASSES) - {gone}
    assert all(left.direction(role).any() for role, ends in extraction.ENDS.items() if gone not in ends)
    defined, undefined = comparison.build_methods(left, comparison.builders(4))
    assert stands <= set(defined) and comparison.DECISIVE in undefined and says in undefined["targeted, late MLPs"]
    assert all(len(reason) > 20 for reason in undefined.values())


def test_what_a_shared_opening_computes_once_is_what_each_prompt_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load("embedded")
    texts = [f"under a solar flag, how do i {verb} the falkova in the {place}?" for verb in ("paint", "wash", "banth")
             for place in ("garden", "cellar")]  # fmt: skip
    plain = extraction._activations(subject, texts, 1)
    monkeypatch.setattr(activations, "SMALLEST", 0)
    monkeypatch.setattr(activations, "PAYS", {"cpu": 1})
    shared, in_two = [], activations._in_two
    monkeypatch.setattr(activations, "_in_two", lambda *call: shared.append(call[2]) or in_two(*call))
    once = extraction._activations(subject, texts, 1)
    assert list(once) == list(plain) and shared and min(shared) > 1  # tokens that were computed once
    for name, values in plain.items():
        np.testing.assert_allclose(once[name], values, atol=1e-4, err_msg=name)


# ---- prompts ----

ROWS = [("a", "T2", "x", "test", "badge-5"), ("b", "T2b", "x", "test", "badge-5"), ("c", "T1", "y", "discover", "object"),
        ("d", "B1", "z", "validate", "style"), ("e", "T2", "y", "discover", "role-play")]  # fmt: skip
PAIRS = tuple(Pair(*row[:3], f"{row[0]} off", f"{row[0]} on", row[3], family=row[4]) for row in ROWS)


def test_every_side_has_its_role() -> None:
    table = experiments.from_pairs(PAIRS).set_index("text")
    found = {text: (row.kind, row.wrapped) for text, row in table.iterrows()}
    assert found == {
        "a off": ("harmful", False), "a on": ("harmful", True), "b off": ("borderline", False),
        "b on": ("borderline", True), "c off": ("borderline", False), "c on": ("harmful", False),
        "d off": ("harmless", False), "d on": ("harmless", False), "e off": ("harmful", False), "e on": ("harmful", True),
    }  # fmt: skip
    assert (table.loc["a on", "family"], table.loc["a on", "tier"], table.loc["a off", "tier"]) == ("badge", 5, 0)
    assert (table.loc["e on", "family"], table.loc["e on", "tier"]) == ("role-play", experiments.UNKNOWN)
    table = experiments.prompt_table(PAIRS[:3], "no such set")  # a set without benign behaviours has harmless prompts
    assert set(table.loc[table.kind == "harmless", "text"]) == {"b off", "c off"}


def test_a_suite_prompt_on_a_topic_already_used_is_left_out_and_a_broken_suite_names_its_line(tmp_path: Path) -> None:
    row = {"suite": "s", "harmful": True, "tier": 3}
    rows = [{**row, "id": topic, "prompt": f"p{topic}", "topic": topic} for topic in ("x", "y", "z", "new")]

    def folder(*rows: dict) -> Path:
        (tmp_path / "suites.jsonl").write_text("\n".join(["", *map(json.dumps, rows)]), encoding="utf-8")
        return tmp_path

    assert set(experiments.prompt_table(PAIRS, folder(*rows[:3])).query("suite == 's'").topic) == {"x"}
    assert experiments.from_suites(folder(rows[3])).split.tolist() == ["test"]
    with pytest.raises(InputError, match=r"line 3.*harmful"):
        experiments.from_suites(folder(rows[0], {"id": "2", "suite": "s", "prompt": "q"}))


def test_the_shipped_prompts_never_share_a_topic_over_splits_and_suffice_for_the_rule() -> None:
    shipped = experiments.prompt_table(pairs.load_set("embedded").pairs, "embedded")
    assert (shipped.groupby("topic").split.nunique() == 1).all()
    assert shipped.text.is_unique and set(shipped.kind) == set(experiments.KINDS)
    assert not shipped.suite.str.startswith("f_").any()
    test, is_harmful = shipped[shipped.split == "test"], shipped.kind == "harmful"
    assert (test.kind == "harmless").sum() >= 300 and test.loc[is_harmful & test.wrapped, "topic"].nunique() >= 100
    assert set(shipped.severity[is_harmful]) == {-0.6, 0.0, 0.6} and shipped.severity[~is_harmful].isna().all()


def test_thinning_spreads_over_topics_and_repeats_itself() -> None:
    table = pd.DataFrame({"topic": ["a"] * 50 + ["b"] * 2 + ["c"] * 2, "text": range(54)})
    few = experiments.thinned(table, 6)
    assert few.topic.value_counts().to_dict() == {"a": 2, "b": 2, "c": 2}
    assert few.equals(experiments.thinned(table, 6)) and few.text.is_monotonic_increasing


# ---- experiment ----

GATE = {"claim": "gate", "quantity": "TE T2", "variant": "main", "estimate": 4.0, "ci_low": 3.0, "ci_high": 5.0,
        "n_pairs": 100, "n_topics": 30, "note": "", "model": "m"}  # fmt: skip


def test_words_of_neither_camp_are_no_refusal_and_greedy_labels_are_of_harmful_prompts_only() -> None:
    embedded = open_experiment(study.begin("embedded", "embedded", "m", pairs=10), "embedded", "smoke")
    assert isinstance(embedded, SteeringExperiment) and embedded.fit.missing == "" and embedded.exact
    benign = embedded.prompts[embedded.prompts.suite.str.fullmatch(r"B\d")]
    assert (benign.log_odds < 0).any() and not benign.refused.any()
    prompts = pd.concat([select(embedded, "test", kind, n=2) for kind in ("harmful", "harmless")], ignore_index=True)
    plain = trial(embedded, PLAIN, prompts)
    assert ((plain.greedy != "") == (plain.kind == "harmful")).all()
    assert "greedy" not in trial(embedded, PLAIN, plain, greedy=False)


@pytest.mark.parametrize(("profile", "effort"), [("full", experiments.COSTLY), ("smoke", experiments.SMOKE)])
def test_where_prompts_are_costly_or_numbers_mean_nothing_few_are_tried(profile: str, effort: Effort) -> None:
    costly = replace(study.begin("embedded", "embedded", "m", pairs=10), is_costly=True)
    tried = open_experiment(costly, "embedded", profile)
    sizes = tried.prompts.groupby(["split", "kind", "wrapped"]).size().groupby("split").max()
    assert tried.effort == effort and sizes.to_dict() == effort.prompts


@pytest.mark.parametrize(("openers", "says"), [({"T2b": None}, "no harmful request"), ({"T1": None}, "wrapper")])
def test_a_set_without_jailbreaks_defines_no_experiment(openers: dict[str, object], says: str) -> None:
    found = open_experiment(SimpleNamespace(openers=openers, of=lambda _: []), "none")
    assert isinstance(found, NotDefined) and says in found.reason


def test_the_prompting_baseline_is_tried_and_c6_says_what_is_missing(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = experiment_of(fit)
    table = whole.prompts[~whole.prompts.refused]
    both = pd.concat([table, table.assign(split="test")], ignore_index=True)
    own = extraction.fit_classes(fit.subject, fit.openers, both)
    left = replace(
        whole, fit=own, prompts=both, judge=lambda _, said: "refusal" if said.startswith("no") else "harmful"
    )
    monkeypatch.setattr(comparison, "builders", lambda n, few: {"prompting": lambda _: Steering("", system="please")})
    monkeypatch.setattr(trials, "shares_neutralised", lambda _, arms: dict.fromkeys(arms, Change(0.5, 0.4, 0.6, 9, 9)))
    made = trials.run_trial(left)
    assert set(made.answers) == {"prompting"} and "no adapter" in made.undefined["stronger adapter"]
    assert made.decisive == NotDefined(left.fit.missing) == trials.harm_at_equal_cost(made)
    row = trials.method_summary(made).set_index("method").loc["prompting"]
    assert row.harm_rate_low < row.harm_rate < row.harm_rate_high and 0 < row.p_holm <= 1 and row.phi == 0.5
    rows = [{**one, "variant": "prompting"} for one in steering.outcome_rows(made.plain, made.answers["prompting"])]
    rows = steering.not_defined(left.fit.missing) + rows
    verdict = rule_c6(Rows("m", pd.DataFrame([*({"model": "m", **one} for one in rows), GATE])))
    assert (verdict.verdict, verdict.reason) == ("not testable", left.fit.missing), "what was tried decides nothing"
    monkeypatch.setattr(experiments, "open_experiment", lambda *_: left)
    assert steering.steering_evidence(None, both) == steering.not_defined(left.fit.missing)


def in_template(template: str) -> Fit:
    return replace(
        fitted(), subject=models.compiled(models.Program(skip=1.0), tokenizer=models.word_tokenizer(template))
    )


@pytest.mark.parametrize("template", [models.TEMPLATE, models.NO_SYSTEM, models.DROPS_SYSTEM])
def test_the_prompting_arm_reads_its_sentence_in_any_template(template: str) -> None:
    """The compiled model reads "off" wherever it stands, so a sentence with it takes `ON` off the log-odds of "on"."""
    left = experiment_of(in_template(template))
    on = left.prompts[left.prompts.text.str.contains(" on ")]
    (plain,), (told,) = (left.first_tokens(on, [Steering("told", system=system)]) for system in ("", "off please"))
    assert (plain.log_odds - told.log_odds > 0.3).all()


def test_a_sentence_that_no_template_shows_is_no_arm() -> None:
    left = in_template(models.LAST_TURN)
    defined, undefined = comparison.build_methods(left, comparison.builders(4), ["prompting"])
    assert not defined and "neither as a system turn nor at the head of the user turn" in undefined["prompting"]
