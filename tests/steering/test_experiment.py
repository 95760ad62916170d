"""The experiment: which prompts count as refused, how answers are labelled, and what a missing class of prompts stops."""

from dataclasses import replace
from types import SimpleNamespace

import handmade
import pandas as pd
import pytest
from steering_lab import experiment_of, fitted

from companion.base.display import NotDefined
from companion.claims.registered_rules import rule_c6
from companion.claims.verdict import Rows
from companion.evidence import steering
from companion.generation.hooks import Steering
from companion.mediation import study
from companion.stats.rates import Change
from companion.steering import comparison, extraction
from companion.steering import experiment as experiments
from companion.steering import trial as trials
from companion.steering.experiment import PLAIN, SteeringExperiment, open_experiment, select, trial
from companion.steering.extraction import Fit

PROGRAM = handmade.Program(skip=1.0)
GATE = {"claim": "gate", "quantity": "TE T2", "variant": "main", "estimate": 4.0, "ci_low": 3.0, "ci_high": 5.0,
        "n_pairs": 100, "n_topics": 30, "note": "", "model": "m"}  # fmt: skip


def test_words_of_neither_camp_are_no_refusal_and_greedy_labels_are_of_harmful_prompts_only() -> None:
    embedded = open_experiment(study.begin("embedded", "embedded", "m", pairs=10), "embedded", thin=6)
    assert isinstance(embedded, SteeringExperiment) and embedded.fit.missing == "" and embedded.exact
    benign = embedded.prompts[embedded.prompts.suite.str.fullmatch(r"B\d")]
    assert (benign.log_odds < 0).any() and not benign.refused.any()
    prompts = pd.concat([select(embedded, "test", kind, n=2) for kind in ("harmful", "harmless")], ignore_index=True)
    plain = trial(embedded, PLAIN, prompts)
    assert ((plain.greedy != "") == (plain.kind == "harmful")).all()
    assert "greedy" not in trial(embedded, PLAIN, plain, greedy=False)


def test_where_prompts_are_costly_few_are_tried() -> None:
    costly = replace(study.begin("embedded", "embedded", "m", pairs=10), is_costly=True)
    tried = open_experiment(costly, "embedded")
    assert tried.prompts.groupby(["split", "kind", "wrapped"]).size().max() == experiments.COSTLY_CAP


@pytest.mark.parametrize(("openers", "says"), [({"T2b": None}, "no harmful request"), ({"T1": None}, "wrapper")])
def test_a_set_without_jailbreaks_defines_no_experiment(openers: dict[str, object], says: str) -> None:
    found = open_experiment(SimpleNamespace(openers=openers, of=lambda _: []), "none")
    assert isinstance(found, NotDefined) and says in found.reason


def without(fit: Fit, gone: str) -> SteeringExperiment:
    """The experiment without the prompts of one class, as a model that never behaves so would have it."""
    whole = experiment_of(fit)
    table = whole.prompts[pd.Series(extraction.classes(whole.prompts)) != gone].reset_index(drop=True)
    left = extraction.fit_classes(fit.subject, fit.openers, table)
    return replace(whole, prompts=table, fit=left)


MISSING = [("refused", "refused no harmful prompt: add plainer ones", {"prompting"}),
           ("complied", "complied with no harmful prompt: add stronger", {"prompting"}),
           ("benign", "answered no harmless prompt: add harmless", {"prompting", comparison.FIXED})]  # fmt: skip


@pytest.mark.parametrize(("gone", "says", "stands"), MISSING)
def test_methods_that_need_nothing_of_a_missing_class_are_defined(fit: Fit, gone: str, says: str, stands: set) -> None:
    left = without(fit, gone)
    assert says in left.fit.missing
    defined, undefined = comparison.build_methods(left.fit, comparison.builders(4))
    assert stands <= set(defined) and comparison.DECISIVE in undefined
    assert all(len(reason) > 20 for reason in undefined.values())


def test_the_prompting_baseline_is_tried_and_c6_says_what_is_missing(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of notebook 06: begin, methods, strengths, trial, summary, evidence, verdict."""
    left = without(fit, "refused")
    both = pd.concat([left.prompts, left.prompts.assign(split="test")], ignore_index=True)
    left = replace(left, prompts=both, judge=lambda _, said: "refusal" if said.startswith("no") else "harmful", said={})
    monkeypatch.setattr(comparison, "builders", lambda n, few: {"prompting": lambda _: Steering("", system="please")})
    monkeypatch.setattr(trials, "shares_neutralised", lambda _, arms: dict.fromkeys(arms, Change(0.5, 0.4, 0.6, 9, 9)))
    made = trials.run_trial(SimpleNamespace(subject=fit.subject, is_costly=True), left, quick=True)
    assert set(made.answers) == {"prompting"} and "no adapter" in made.undefined["retrained"]
    assert made.decisive == NotDefined(left.fit.missing) == trials.harm_at_equal_cost(made)
    row = trials.method_summary(made).set_index("method").loc["prompting"]
    assert row.harm_rate_low < row.harm_rate < row.harm_rate_high and 0 < row.p_holm <= 1 and row.phi == 0.5
    rows = steering.outcome_rows(made.plain, made.answers["prompting"])
    rows = [{**one, "variant": "prompting"} for one in rows]
    rows = steering.not_defined(left.fit.missing) + rows
    verdict = rule_c6(Rows("m", pd.DataFrame([*({"model": "m", **one} for one in rows), GATE])))
    assert (verdict.verdict, verdict.reason) == ("not testable", left.fit.missing), "what was tried decides nothing"
    monkeypatch.setattr(experiments, "open_experiment", lambda *_: left)
    assert steering.steering_evidence(None, both) == steering.not_defined(left.fit.missing)


def in_template(template: str) -> Fit:
    return replace(fitted(), subject=handmade.compiled(PROGRAM, tokenizer=handmade.word_tokenizer(template)))


@pytest.mark.parametrize("template", [handmade.TEMPLATE, handmade.NO_SYSTEM, handmade.DROPS_SYSTEM])
def test_the_prompting_arm_reads_its_sentence_in_any_template(template: str) -> None:
    """The compiled model reads "off" wherever it stands, so a sentence with it takes `ON` off the log-odds of "on"."""
    left = experiment_of(in_template(template))
    on = left.prompts[left.prompts.text.str.contains(" on ")]
    (plain,), (told,) = (left.first_tokens(on, [Steering("told", system=system)]) for system in ("", "off please"))
    assert (plain.log_odds - told.log_odds > 0.3).all()


def test_a_sentence_that_no_template_shows_is_no_arm() -> None:
    left = in_template(handmade.LAST_TURN)
    defined, undefined = comparison.build_methods(left, comparison.builders(4), ["prompting"])
    assert not defined and "neither as a system turn nor at the head of the user turn" in undefined["prompting"]
