"""A model that refused, or complied with, nothing: what needs the missing class says so, and the rest is tried."""

from dataclasses import replace

import pandas as pd
import pytest
from steering_lab import fitted, lab

from companion.claims.registered_rules import rule_c6
from companion.claims.verdict import Rows
from companion.evidence import steering
from companion.generation.hooks import Steering
from companion.mediation.study import Study
from companion.steering import budget, comparison, experiment, extraction, figure_tables
from companion.steering.experiment import PLAIN, SteeringExperiment
from companion.steering.extraction import Fit


@pytest.fixture(scope="module")
def fit() -> Fit:
    return fitted()


def without(fit: Fit, gone: str) -> tuple[SteeringExperiment, Fit]:
    """The lab without the prompts of one class, as a model that never behaves so would have it."""
    room = lab(fit)
    kept = (pd.Series(extraction.classes(room.prompts)) != gone).to_numpy()
    table = room.prompts[kept].reset_index(drop=True)
    return replace(room, prompts=table), extraction.fit_classes(fit.subject, fit.openers, table, neuron_layers=range(4))


@pytest.mark.parametrize(
    ("gone", "says", "stands"),
    [
        ("refused", "refused no harmful prompt: add plainer ones", {"prompting"}),
        ("complied", "complied with no harmful prompt: add stronger", {"prompting"}),
        ("benign", "answered no harmless prompt: add harmless ones", {"prompting", "fixed rejection, all layers"}),
    ],
)
def test_arms_that_need_nothing_of_the_missing_class_are_defined(
    fit: Fit, gone: str, says: str, stands: set[str]
) -> None:
    room, left = without(fit, gone)
    assert says in experiment.missing(room)
    defined, undefined = comparison.arms(left, comparison.builders(4, {3: [0, 1]}))
    assert stands <= set(defined) and comparison.DECISIVE in undefined
    assert all(len(reason) > 20 for reason in undefined.values())


def test_the_prompting_baseline_is_tried_and_c6_says_what_is_missing(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of notebook 06: begin, arms, strengths, trial, summary, evidence, verdict."""
    room, _ = without(fit, "refused")
    both = pd.concat([room.prompts, room.prompts.assign(split="test")], ignore_index=True)
    room = replace(
        room, prompts=both, judge=lambda _, answer: "refusal" if answer.startswith("no") else "harmful", said={}
    )
    monkeypatch.setattr(experiment, "open_experiment", lambda *_, **__: room)
    monkeypatch.setattr(Study, "of", lambda *_: ["a pair"])
    study = Study.__new__(Study)
    object.__setattr__(study, "subject", fit.subject)
    begun = steering.begin(study, room.prompts)
    assert not isinstance(begun, str) and "refused no harmful prompt" in begun[2]
    _, _, why = begun
    defined = {"prompting": Steering("prompting", system="please")}
    on = budget.evaluation_prompts(room, "validate")
    chosen, curves = comparison.tuned(room, defined, on)
    assert set(curves.method) == {"prompting"} and chosen["prompting"].system == "please"
    plain = experiment.trial(room, PLAIN, experiment.test_prompts(room))
    trials = {
        "prompting": experiment.trial(room, experiment.arm_of(room.subject, chosen["prompting"]), plain, greedy=False)
    }
    price = experiment.prices(room, experiment.arm_of(room.subject, chosen["prompting"]), on.free, on.own)
    table = figure_tables.summary(room, plain, trials, {"prompting": price}, plain, {}, chosen, on)
    row = table.set_index("method").loc["prompting"]
    assert row.harm_rate_low < row.harm_rate < row.harm_rate_high and 0 < row.p_holm <= 1
    rows = steering.not_defined("m", why)
    rows += steering.outcome_rows("m", plain, trials["prompting"], [], "method prompting")
    gate = {"claim": "gate", "quantity": "TE T2", "variant": "main", "estimate": 4.0, "ci_low": 3.0, "ci_high": 5.0}
    gate |= {"n_pairs": 100, "n_topics": 30, "note": "", "model": "m"}
    verdict = rule_c6(Rows("m", pd.DataFrame([*rows, gate])))
    assert (verdict.verdict, verdict.reason) == ("not testable", why), "what was tried decides nothing"
    assert steering.steering_evidence(study, room.prompts, "m") == steering.not_defined("m", why)
