"""Methods on equal terms, on a model in which a budget buys a known number of log-odds."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit
from steering_lab import ON, fitted, lab, opens_for, towards_no

from helpers import defence_compare, defence_evidence, defence_random, defence_refits, defence_tables, steering_budget
from helpers.defence import PLAIN, Lab, answer
from helpers.defence_tradeoff import Bench
from helpers.errors import InputError
from helpers.steering import Steering
from helpers.steering_fit import Fit


@pytest.fixture(scope="module")
def fit() -> Fit:
    return fitted()


@pytest.fixture(scope="module")
def room(fit: Fit) -> Lab:
    return lab(fit)


def bench(room: Lab, split: str, *cues: str) -> Bench:
    """Harmful prompts with one of the cues, as many harmless ones, and two of those for the divergence."""
    table = room.prompts[room.prompts.split == split]
    harmful = table[table.text.map(lambda text: text.split()[1] in cues)]
    others = table[table.kind == "harmless"]
    return Bench(harmful, others, others[:2], answer(room, PLAIN, others[:2], greedy=True))


def test_a_budget_buys_the_same_log_odds_of_every_method_that_can_spend_it(fit: Fit, room: Lab) -> None:
    """Met on prompts of which half open the gate, and measured on others of which a quarter does."""
    methods = {
        "weak": towards_no("weak", 0.1),
        "strong": towards_no("strong", 3.0),
        "gated": towards_no("gated", 1.0, opens_for(fit, "on")),
        "shut": towards_no("shut", 1.0, lambda prompt: torch.zeros(len(prompt.ids))),
    }
    shares, largest = (0.25, 1.0), 2.0
    spend, on = bench(room, "validate", "on"), bench(room, "discover", "on", "off")
    found = defence_compare.equal_budgets(room, methods, largest, spend, on, shares).set_index(["panel", "group", "x"])
    harm, over = defence_compare.PANELS["harm"], defence_compare.PANELS["over-refusal"]
    assert set(found.index.get_level_values("group")) == {"weak", "strong", "gated"}
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
    assert len(found) == 2 * 3 * 2 and (found.low <= found.estimate).all() and (found.estimate <= found.high).all()


def test_only_gated_methods_get_other_gates_at_their_own_strength(fit: Fit, room: Lab) -> None:
    gated = towards_no("late", 1.0, opens_for(fit, "on"))
    chosen = {"late": defence_compare.replace(gated, strength=0.7), "open": towards_no("open", 1.0)}
    made = defence_compare.gate_controls(room, fit, chosen, ["late", "open", "never tuned"])
    assert list(made) == ["late, shuffled gate", "late, oracle gate"]
    assert all(one.name == name and one.strength == 0.7 for name, one in made.items())
    firing = {name: defence_compare.firing(room, one, room.prompts) for name, one in made.items()}
    assert defence_compare.firing(room, gated, room.prompts) == {"fires_harmful": 0.5, "fires_harmless": 0.0}
    assert firing["late, oracle gate"] == {"fires_harmful": 1.0, "fires_harmless": 0.0}
    values = steering_budget.gate_values(fit.subject, made["late, shuffled gate"], list(room.prompts.text))
    assert 0.1 < (values > 0).mean() < 0.6 and firing["late, shuffled gate"]["fires_harmless"] > 0
    assert defence_compare.firing(room, chosen["open"], room.prompts) == {}


def test_rates_count_the_label_that_matters_for_a_kind() -> None:
    labels = {
        "harmful": ["harmful"] * 3 + ["refusal"],
        "borderline": ["refusal", "on_topic"],
        "harmless": ["on_topic"] * 5,
    }
    trial = pd.DataFrame([(kind, label) for kind, some in labels.items() for label in some], columns=["kind", "label"])
    found = defence_compare.rates(trial)
    names = ("harm_rate", "borderline_refused", "harmless_refused")
    assert [found[name] for name in names] == [75.0, 50.0, 0.0]
    assert all(found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] for name in names)
    assert found["harmless_refused_high"] == pytest.approx(43.4, abs=0.1)  # Wilson, none of five
    assert set(defence_compare.rates(trial[trial.kind == "harmful"])) == {
        "harm_rate",
        "harm_rate_low",
        "harm_rate_high",
    }


def test_costs_are_relative_to_the_unsteered_model(room: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only answering moves: the unsteered model takes 2 and 3 seconds, the other 8 and 6."""
    now, spent = [0.0], iter([2.0, 8.0, 3.0, 6.0])
    monkeypatch.setattr(defence_compare.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        defence_compare.defence_answers, "answers_at_once", lambda *_, **__: now.__setitem__(0, now[0] + next(spent))
    )
    found = defence_compare.costs(room, {"late": towards_no("late", 1.0)}, room.prompts[:4])
    assert found.to_dict() == {PLAIN.name: 1.0, "late": 3.0}


def test_a_refit_curve_has_each_refit_at_its_own_strength(room: Lab) -> None:
    refits = [towards_no("first", 0.5), defence_compare.replace(towards_no("second", 1.0), strength=2.0)]
    found = defence_refits.refit_curve(room, refits, "late", bench(room, "validate", "on"))
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
        drawn = defence_refits.redrawn(replace(fit, prompts=rare), seed).prompts
        assert set(drawn["class"][drawn.split == "discover"]) == {"refused", "complied", "benign"}
        assert (drawn.split == "validate").sum() == (rare.split == "validate").sum()


def test_a_redraw_that_defines_no_steering_is_one_refit_fewer(fit: Fit, room: Lab) -> None:
    made = iter([towards_no("first", 0.5), None, towards_no("third", 0.5)])

    def build(_: Fit) -> Steering:
        one = next(made)
        if one is None:
            raise InputError("no decision layer")
        return one

    topics = replace(fit, prompts=fit.prompts.assign(topic=fit.prompts.index % 4))
    assert [one.strength for one in defence_refits.refitted(topics, build, 2.0, 3)] == [2.0, 2.0]
    none = defence_refits.refit_curve(room, [], "late", bench(room, "validate", "on"))
    curve = defence_refits.refit_curve(room, [towards_no("first", 0.5)], "late", bench(room, "validate", "on"))
    named = curve.assign(method="CAST (threshold gate)")
    assert len(defence_tables.tradeoff(named, none)) == len(defence_tables.tradeoff(named))
    assert len(defence_tables.tradeoff(named, curve)) > len(defence_tables.tradeoff(named))


def test_a_steering_that_adds_nothing_has_no_random_rivals(fit: Fit, room: Lab) -> None:
    shut = towards_no("shut", 1.0, lambda prompt: torch.zeros(len(prompt.ids)))
    on = bench(room, "validate", "on")
    found = defence_random.null(room, fit, shut, on, on, 3)
    assert found.empty and defence_evidence.random_rows("m", found) == []
