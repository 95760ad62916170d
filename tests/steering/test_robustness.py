"""Refits on other draws, families left out, fewer examples, and an attacker: what defines no steering is left out and counted."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from steering_lab import ON, evaluated, towards_no

from companion.base.errors import InputError
from companion.generation.hooks import Edit, Steering
from companion.generation.labels import is_harmful
from companion.mediation import study
from companion.steering import figure_tables, methods, robustness
from companion.steering.comparison import ROWS
from companion.steering.experiment import PLAIN, SteeringExperiment, open_experiment
from companion.steering.extraction import Fit
from companion.steering.methods import EMBEDDED_SENTENCE, constant
from companion.steering.robustness import STRONG, Disguise


def builder(*found: Steering | None) -> Mock:
    """A method that a draw defines or (None) does not, one call after the other."""
    return Mock(side_effect=[one or InputError("no layer separates the classes") for one in found])


def test_a_refit_curve_has_each_refit_at_its_own_strength(experiment: SteeringExperiment) -> None:
    refits = [towards_no("first", 0.5), replace(towards_no("second", 1.0), strength=2.0)]
    found = evaluated(experiment, "validate", "on").curve("late", refits, (0, 1))
    assert set(found.method) == {"late"}
    measures = {(i, name) for i in (0, 1) for name in ("harm", "over-refusal", "KL")}
    assert len(found) == 6 and set(zip(found.strength, found.measure, strict=True)) == measures
    wide = found.pivot(index="strength", columns="measure", values="estimate")
    assert found.groupby("strength").budget.first().tolist() == pytest.approx([0.5, 2.0], rel=1e-3)
    assert wide.harm.tolist() == pytest.approx([expit(ON - 0.5), expit(ON - 2.0)], abs=1e-3)
    assert wide["over-refusal"].tolist() == pytest.approx([100 * (expit(x) - 0.5) for x in (0.5, 2.0)], abs=0.1)
    assert 0 < wide.KL[0] < wide.KL[1]


def test_a_redraw_keeps_every_class_of_prompts(fit: Fit) -> None:
    rare = fit.prompts.assign(topic=fit.prompts.index % 3 + 3 * (fit.prompts["class"] == "refused"))
    rare.loc[(rare["class"] == "refused") & (rare.split == "discover"), "topic"] = 99
    for seed in range(10):  # a plain bootstrap of 7 topics misses the one in a third of the draws
        drawn = robustness.redrawn(replace(fit, prompts=rare), seed).prompts
        assert set(drawn["class"][drawn.split == "discover"]) == {"refused", "complied", "benign"}
        assert (drawn.split == "validate").sum() == (rare.split == "validate").sum()


def test_the_tradeoff_joins_strengths_in_order_and_adds_one_point_for_refits(experiment: SteeringExperiment) -> None:
    on = evaluated(experiment, "validate", "on")
    none, curve = (on.curve("late", refits, range(len(refits))) for refits in ([], [towards_no("first", 0.5)]))
    named = pd.concat([curve.assign(method=name) for name in ("some", "every")])
    rows = {"some": ROWS[1], "every": ROWS[0]}
    assert len(figure_tables.tradeoff(named, rows, none)) == len(figure_tables.tradeoff(named, rows)) == 4
    steps = [0.5, 1.0, 2.0]
    grid = [curve.assign(method="every", strength=step, estimate=step) for step in steps]
    joined = figure_tables.tradeoff(pd.concat([curve.assign(method="some", strength=1.0), *grid]), rows)
    assert [part.x.tolist() for _, part in joined.query("group == 'every'").groupby("panel")] == [steps, steps]
    drawn = figure_tables.tradeoff(named, rows, curve)
    assert drawn.row.map(list(ROWS).index).tolist() == [0, 0, 1, 1, 1, 1]
    assert set(drawn.group[:2]) == {"every"} and set(drawn.group[2:]) == {"some", "1 refits: mean and range"}


def test_a_family_that_every_fit_needs_is_no_row(fit: Fit, experiment: SteeringExperiment, monkeypatch) -> None:
    """First all jailbroken prompts are of one family: left out, no prompt was complied with. Then they are of two."""
    monkeypatch.setattr(robustness, "MIN_FAMILY", 1)
    on, texts = evaluated(experiment, "validate", "on"), experiment.prompts.text
    wraps = texts.str.contains(" on ")

    def left_out(names: list[str]) -> pd.DataFrame:
        family = dict(zip(texts, np.where(wraps, np.resize(names, len(texts)), ""), strict=True))
        named = replace(fit, prompts=fit.prompts.assign(family=fit.prompts.text.map(family)))
        test = experiment.prompts.assign(split="test", wrapped=wraps, family=texts.map(family))
        harmful = on.harmful.assign(family=np.resize(names, len(on.harmful)))
        tried = replace(on, experiment=replace(experiment, fit=named, prompts=test), harmful=harmful)
        return robustness.leave_families_out(tried, {"fixed": methods.fixed}, ["fixed"])

    alone, both = left_out(["only"]), left_out(["first", "second"])
    assert alone.empty and {"family", "refused_low", "p_holm"} <= set(alone.columns)
    assert set(both.family) == {"first", "second"} and set(both.method) == {PLAIN.name, "fixed"}
    low, high = both.refused_low - 1e-9, both.refused_high + 1e-9
    assert both.refused.between(low, high).all() and (high - low > 0.1).all()


def test_a_draw_that_defines_no_steering_is_one_fewer(fit: Fit, experiment: SteeringExperiment) -> None:
    topics = replace(fit, prompts=fit.prompts.assign(topic=fit.prompts.index % 4))
    build = builder(towards_no("first", 0.5), None, towards_no("third", 0.5))
    assert [one.strength for one in robustness.refitted(topics, build, 2.0, 3)] == [2.0, 2.0]
    on, one = evaluated(experiment, "validate", "on"), towards_no("one", 1.0)
    made = {"always": builder(*[one] * 4), "sometimes": builder(one, None, one, None), "never": builder(*[None] * 4)}
    found = robustness.few_examples(on, made, 2, draws=4, sizes=(2,)).set_index(["panel", "group"])
    assert found.n_draws["not refused", "always"] == 4 and found.n_draws["not refused", "sometimes"] == 2
    assert ("not refused", "never") not in found.index
    assert found.estimate["not refused", "always"] == pytest.approx(expit(ON - 1.0), abs=1e-3)


def test_no_disguise_changes_what_is_asked() -> None:
    asked = robustness.draw_requests("validate", 4)
    assert asked == robustness.draw_requests("validate", 4)
    for disguise in (STRONG, Disguise(robustness.all_wrappers()[-1], "clerk", None, "now")):
        texts = robustness.disguised(asked, [disguise]).text
        assert all(is_harmful(text) and disguise.wrapper.text in text for text in texts)
    topics = {split: {one.clause.topic for one in robustness.draw_requests(split)} for split in ("validate", "test")}
    assert not topics["validate"] & topics["test"]


def test_a_search_against_many_finds_for_each_what_it_would_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    this = open_experiment(study.begin("embedded", "embedded", "m", pairs=10), "embedded", thin=2)
    some = robustness.all_wrappers()[::20]
    monkeypatch.setattr(robustness, "REQUESTS", 2)
    monkeypatch.setattr(robustness, "all_wrappers", lambda: some)
    vector = constant(np.random.default_rng(0).standard_normal(this.subject.d_model))
    push = Steering("push", (Edit(3, "resid_post", vector, blind=True),), strength=20.0)
    methods = [Steering("plain"), push, Steering("told", system=EMBEDDED_SENTENCE)]
    alone = [robustness.worst_disguises(this, [one])[0] for one in methods]
    assert robustness.worst_disguises(this, methods) == alone
    assert len(set(alone)) > 1, "the methods must differ for this to say anything"
