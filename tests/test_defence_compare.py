"""Methods on equal terms, on a model in which a budget buys a known number of log-odds."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit
from steering_lab import ON, fitted, lab, opens_for, towards_no

from companion.base.errors import InputError
from companion.evidence import steering
from companion.generation.hooks import Steering
from companion.steering import adasteer, budget, comparison, controls, experiment, figure_tables, methods, stability
from companion.steering.budget import EvaluationPrompts
from companion.steering.experiment import PLAIN, SteeringExperiment, answer
from companion.steering.extraction import Fit


@pytest.fixture(scope="module")
def fit() -> Fit:
    return fitted()


@pytest.fixture(scope="module")
def room(fit: Fit) -> SteeringExperiment:
    return lab(fit)


def bench(room: SteeringExperiment, split: str, *cues: str) -> EvaluationPrompts:
    """Harmful prompts with one of the cues, as many harmless ones, and two of those for the divergence."""
    table = room.prompts[room.prompts.split == split]
    harmful = table[table.text.map(lambda text: text.split()[1] in cues)]
    others = table[table.kind == "harmless"]
    return EvaluationPrompts(harmful, others, others[:2], answer(room, PLAIN, others[:2], greedy=True))


def test_a_budget_buys_the_same_log_odds_of_every_method_that_can_spend_it(fit: Fit, room: SteeringExperiment) -> None:
    """Met on prompts of which half open the gate, and measured on others of which a quarter does."""
    methods = {
        "weak": towards_no("weak", 0.1),
        "strong": towards_no("strong", 3.0),
        "gated": towards_no("gated", 1.0, opens_for(fit, "on")),
        "shut": towards_no("shut", 1.0, lambda prompt: torch.zeros(len(prompt.ids))),
    }
    shares, largest = (0.25, 1.0), 2.0
    spend, on = bench(room, "validate", "on"), bench(room, "discover", "on", "off")
    table = comparison.equal_budgets(room, methods, largest, spend, on, shares, against="weak")
    found = table.set_index(["panel", "group", "x"])
    harm, over = comparison.PANELS["harm"], comparison.PANELS["over-refusal"]
    unmet = found.xs("shut", level="group")
    assert unmet.estimate.isna().all() and len(unmet) == 4 and unmet.why.str.contains("is its gate shut").all()
    found = found.drop("shut", level="group")
    assert set(found.row) == {comparison.ROWS[1]} and (found.why == "").all()
    assert found.strength[harm, "strong", 2.0] == pytest.approx(2 / 3, rel=0.01)
    for x in (0.5, 2.0):
        all_open = np.mean([expit(ON - x), expit(-x)])
        half_open = np.mean([expit(ON - np.sqrt(2) * x), 0.5])
        for name, left, refused in (
            ("weak", all_open, 100 * (expit(x) - 0.5)),
            ("strong", all_open, 100 * (expit(x) - 0.5)),
            ("gated", half_open, 0.0),
        ):
            assert found.estimate[harm, name, x] == pytest.approx(left, abs=0.01), (name, x)
            assert found.estimate[over, name, x] == pytest.approx(refused, abs=0.5), (name, x)
        more = found.more[harm, "gated", x]
        assert more == pytest.approx(100 * (half_open - all_open), abs=1), "points, against the same prompts"
        assert found.more_low[harm, "gated", x] <= more <= found.more_high[harm, "gated", x]
        # On paper every prompt of the two is pushed alike: paired, nothing is left to vary.
        assert found.loc[(harm, "strong", x), ["more", "more_low", "more_high"]].abs().max() < 1
        assert found.more[over, "gated", x] == pytest.approx(-100 * (expit(x) - 0.5), abs=1)
    assert found.xs("weak", level="group").more.isna().all()
    assert len(found) == 2 * 3 * 2 and (found.low <= found.estimate).all() and (found.estimate <= found.high).all()


def test_only_gated_methods_get_other_gates_at_their_own_strength(fit: Fit, room: SteeringExperiment) -> None:
    gated = towards_no("late", 1.0, opens_for(fit, "on"))
    chosen = {"late": comparison.replace(gated, strength=0.7), "open": towards_no("open", 1.0)}
    made = comparison.gate_controls(room, fit, chosen, ["late", "open", "never tuned"])
    assert list(made) == ["late, shuffled gate", "late, oracle gate"]
    assert all(one.name == name and one.strength == 0.7 for name, one in made.items())
    firing = {name: comparison.firing(room, one, room.prompts) for name, one in made.items()}
    rates = {"fires_harmful": 0.5, "fires_harmless": 0.0}
    limits = {"fires_harmful_low": 0.314, "fires_harmful_high": 0.686}
    limits |= {"fires_harmless_low": 0.0, "fires_harmless_high": 0.242}
    found = comparison.firing(room, gated, room.prompts)
    assert found == pytest.approx(rates | limits, abs=1e-3), "12 of 24 and none of 12, with Wilson's limits"
    oracle = firing["late, oracle gate"]
    assert (oracle["fires_harmful"], oracle["fires_harmless"]) == (1.0, 0.0)
    values = budget.gate_values(fit.subject, made["late, shuffled gate"], list(room.prompts.text))
    assert 0.1 < (values > 0).mean() < 0.6 and firing["late, shuffled gate"]["fires_harmless"] > 0
    assert comparison.firing(room, chosen["open"], room.prompts) == {}


def test_rates_count_the_label_that_matters_for_a_kind() -> None:
    labels = {
        "harmful": ["harmful"] * 3 + ["refusal"],
        "borderline": ["refusal", "on_topic"],
        "harmless": ["on_topic"] * 5,
    }
    trial = pd.DataFrame([(kind, label) for kind, some in labels.items() for label in some], columns=["kind", "label"])
    found = comparison.rates(trial)
    names = ("harm_rate", "borderline_refused", "harmless_refused")
    assert [found[name] for name in names] == [75.0, 50.0, 0.0]
    assert all(found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] for name in names)
    assert found["harmless_refused_high"] == pytest.approx(43.4, abs=0.1)  # Wilson, none of five
    assert set(comparison.rates(trial[trial.kind == "harmful"])) == {
        "harm_rate",
        "harm_rate_low",
        "harm_rate_high",
    }


def test_costs_are_relative_to_the_unsteered_model(room: SteeringExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only answering moves: the unsteered model takes 2 and 3 seconds, the other 8 and 6."""
    now, spent = [0.0], iter([2.0, 8.0, 3.0, 6.0])
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        comparison.defence_answers, "answers_at_once", lambda *_, **__: now.__setitem__(0, now[0] + next(spent))
    )
    found = comparison.costs(room, {"late": towards_no("late", 1.0)}, room.prompts[:4])
    assert found.to_dict() == {PLAIN.name: 1.0, "late": 3.0}


def test_a_refit_curve_has_each_refit_at_its_own_strength(room: SteeringExperiment) -> None:
    refits = [towards_no("first", 0.5), comparison.replace(towards_no("second", 1.0), strength=2.0)]
    found = stability.refit_curve(room, refits, "late", bench(room, "validate", "on"))
    assert set(found.method) == {"late, refits"}
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
        drawn = stability.redrawn(replace(fit, prompts=rare), seed).prompts
        assert set(drawn["class"][drawn.split == "discover"]) == {"refused", "complied", "benign"}
        assert (drawn.split == "validate").sum() == (rare.split == "validate").sum()


def test_a_redraw_that_defines_no_steering_is_one_refit_fewer(fit: Fit, room: SteeringExperiment) -> None:
    made = iter([towards_no("first", 0.5), None, towards_no("third", 0.5)])

    def build(_: Fit) -> Steering:
        one = next(made)
        if one is None:
            raise InputError("no decision layer")
        return one

    topics = replace(fit, prompts=fit.prompts.assign(topic=fit.prompts.index % 4))
    assert [one.strength for one in stability.refitted(topics, build, 2.0, 3)] == [2.0, 2.0]
    none = stability.refit_curve(room, [], "late", bench(room, "validate", "on"))
    curve = stability.refit_curve(room, [towards_no("first", 0.5)], "late", bench(room, "validate", "on"))
    named = pd.concat([curve.assign(method=name) for name in ("some", "every")])
    rows = {"some": comparison.ROWS[1], "every": comparison.ROWS[0]}
    assert len(figure_tables.tradeoff(named, rows, none)) == len(figure_tables.tradeoff(named, rows)) == 4
    once = curve.assign(method="some", strength=1.0)
    grid = pd.concat(
        [curve.assign(method="every", strength=strength, estimate=strength) for strength in (0.5, 1.0, 2.0)]
    )
    joined = figure_tables.tradeoff(pd.concat([once, grid]), rows).query("group == 'every'")
    assert [part.x.tolist() for _, part in joined.groupby("panel")] == 2 * [[0.5, 1.0, 2.0]], (
        "joined from weak to strong"
    )
    drawn = figure_tables.tradeoff(named, rows, curve)
    assert drawn.row.map(list(comparison.ROWS).index).tolist() == [0, 0, 1, 1, 1, 1]
    assert set(drawn.group[:2]) == {"every"} and set(drawn.group[2:]) == {"some", "1 refits: mean and range"}


def test_a_steering_that_adds_nothing_has_no_random_rivals(fit: Fit, room: SteeringExperiment) -> None:
    shut = towards_no("shut", 1.0, lambda prompt: torch.zeros(len(prompt.ids)))
    on = bench(room, "validate", "on")
    found = controls.random_null(room, fit, shut, on, on, 3)
    assert found.empty and steering.random_rows("m", found) == []


def test_a_family_without_which_nothing_can_be_fitted_is_no_row(
    fit: Fit, room: SteeringExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All jailbroken prompts are of one family: left out, no prompt was complied with."""
    monkeypatch.setattr(stability, "MIN_FAMILY", 1)
    wraps = room.prompts.text.str.contains(" on ")
    test = room.prompts.assign(split="test", wrapped=wraps, family=np.where(wraps, "only", ""))
    named = replace(fit, prompts=fit.prompts.assign(family=np.where(fit.prompts.text.str.contains(" on "), "only", "")))
    on = bench(room, "validate", "on")
    on = replace(on, harmful=on.harmful.assign(family="only"))
    made = {"fixed": methods.fixed}
    alone = stability.leave_families_out(replace(room, prompts=test), named, made, ["fixed"], on)
    assert alone.empty and {"family", "refused_low", "p_holm"} <= set(alone.columns)

    halves = {True: "first", False: "second"}
    is_first = test.index % 2 == 0
    test["family"] = np.where(wraps, pd.Series(is_first).map(halves), "")
    own = fit.prompts.text.map(dict(zip(test.text, test.family, strict=True)))
    on = replace(on, harmful=on.harmful.assign(family=["first", "second"] * 3))
    named = replace(fit, prompts=fit.prompts.assign(family=own))
    both = stability.leave_families_out(replace(room, prompts=test), named, made, ["fixed"], on)
    assert set(both.family) == {"first", "second"} and set(both.method) == {PLAIN.name, "fixed"}
    low, high = both.refused_low - 1e-9, both.refused_high + 1e-9
    assert both.refused.between(low, high).all() and (high - low > 0.1).all()


def test_a_draw_that_defines_no_steering_is_one_draw_fewer(fit: Fit, room: SteeringExperiment) -> None:
    numbers = iter(range(4))

    def sometimes(one: Fit) -> Steering:
        if next(numbers) % 2:
            raise InputError("no layer separates the classes")
        return towards_no("sometimes", 1.0)

    def never(one: Fit) -> Steering:
        raise InputError("no layer separates the classes")

    on = bench(room, "validate", "on")
    made = {"always": lambda one: towards_no("always", 1.0), "sometimes": sometimes, "never": never}
    found = stability.examples(room, fit, made, 2, on, draws=4, sizes=(2,)).set_index(["panel", "group"])
    assert found.n_draws["not refused", "always"] == 4 and found.n_draws["not refused", "sometimes"] == 2
    assert ("not refused", "never") not in found.index
    assert found.estimate["not refused", "always"] == pytest.approx(expit(ON - 1.0), abs=1e-3)


def test_directions_of_redraws_are_compared_with_each_other(fit: Fit) -> None:
    topics = replace(fit, prompts=fit.prompts.assign(topic=fit.prompts.index % 6))
    found = stability.stability(topics, 2, draws=5).set_index("direction")
    assert set(found.index) == {"rejection", "harmfulness"} and (found.redraws == 5).all()
    assert found["mean cosine"].between(found.smallest - 1e-9, found.largest + 1e-9).all()
    same = replace(fit, prompts=fit.prompts.assign(topic="one"))  # one topic: every redraw is the whole
    alike = stability.stability(same, 2, draws=3)
    np.testing.assert_allclose(alike[["smallest", "largest"]], 1.0)


def test_no_arm_has_no_curve(fit: Fit, room: SteeringExperiment) -> None:
    chosen, curves = comparison.tuned(room, {}, bench(room, "validate", "on"))
    assert chosen == {} and curves.empty and {"method", "strength", "measure"} <= set(curves.columns)


def test_positions_by_suite_leave_out_prompts_of_none(room: SteeringExperiment) -> None:
    suite = pd.Series(np.where(room.prompts.kind == "harmful", "a", ""))
    placed = pd.DataFrame({"pos_R": np.arange(36.0), "pos_H": np.where(suite == "a", 0.25, 9.0)})
    found = adasteer.plane(room.prompts, placed, suite).set_index(["group", "projection"])
    assert set(found.index) == {("a", "rejection"), ("a", "harmfulness")}
    assert found.estimate["a", "harmfulness"] == 0.25
    assert found.low["a", "rejection"] < found.estimate["a", "rejection"] < found.high["a", "rejection"]
    assert adasteer.plane(room.prompts, placed, room.prompts.suite).empty, "a set without suites"


def test_the_summary_has_both_limits_of_every_price(fit: Fit, room: SteeringExperiment) -> None:
    kinds = np.where(np.arange(36) % 9 == 2, "borderline", room.prompts.kind)
    room = replace(room, prompts=room.prompts.assign(kind=kinds))
    on, steered = bench(room, "discover", "on"), {"gated": towards_no("gated", 1.0, opens_for(fit, "kind"))}
    arm, free = experiment.arm_of(room.subject, steered["gated"]), room.prompts[room.prompts.kind == "harmless"]
    plain = experiment.trial(room, PLAIN, room.prompts)
    trials = {"gated": experiment.trial(room, arm, plain, greedy=False).assign(repetition=np.arange(36) / 36)}
    prices = {"gated": experiment.prices(room, arm, free, answer(room, PLAIN, free, greedy=True))}
    first, row = (
        one for _, one in figure_tables.summary(room, plain, trials, prices, plain, {}, steered, on).iterrows()
    )
    assert first.method == PLAIN.name and np.isnan(first.harm) and np.isnan(first.p_holm)
    assert first.harm_rate == pytest.approx(first.harm_rate_low) == 0 < first.harm_rate_high < 15, "24 were not harmful"
    for name in ("kl", "perplexity_ratio", "repetition", "fires_harmful", "fires_borderline"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], name
        assert row[f"{name}_low"] < row[f"{name}_high"], name


def test_a_method_that_leaves_no_layer_out_stands_in_the_other_row(room: SteeringExperiment) -> None:
    some = towards_no("some", 1.0)
    every = comparison.replace(
        some, edits=tuple(comparison.replace(some.edits[0], layer=layer) for layer in range(room.subject.n_layers))
    )
    found = [comparison.which_layers(room, one) for one in (some, every, Steering("prompting", system="w"))]
    assert found == [comparison.ROWS[1], comparison.ROWS[0], comparison.ROWS[0]]
