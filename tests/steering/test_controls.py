"""Controls keep all of a steering but one thing: its direction, its layers, or its gate."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from steering_lab import evaluated, opens_for, towards_no

from companion.evidence import steering
from companion.generation import hooks
from companion.steering import adasteer, budget, controls, methods
from companion.steering.experiment import SteeringExperiment
from companion.steering.extraction import Fit
from companion.steering.figure_tables import gate_firing


def test_the_gate_opens_for_harm_and_the_shuffled_one_as_often_for_anything(fit: Fit) -> None:
    gated = methods.gated(fit, methods.targeted_layers(fit, layers=[2], components=0), token="last", layer=1)
    texts, harmful = fit.prompts.text.tolist(), fit.harmful
    # "off" and "well" leave nothing at the last token to tell them apart in this model, "on" does.
    values = budget.gate_values(fit.subject, gated, texts)
    assert (values[~harmful] == 0).all() and (values[(fit.prompts["class"] == "complied").to_numpy()] > 0).all()
    oracle = controls.oracle_gate(fit, gated, [t for t, h in zip(texts, harmful, strict=True) if h])
    np.testing.assert_array_equal(budget.gate_values(fit.subject, oracle, texts), harmful)
    shuffled = controls.shuffled_gate(fit, gated)
    drawn = budget.gate_values(fit.subject, shuffled, texts)
    np.testing.assert_array_equal(drawn[:5], budget.gate_values(fit.subject, shuffled, texts[:5]))
    assert 0 < (drawn > 0).mean() < 1 and ((drawn > 0) != (values > 0)).any()


def test_only_gated_methods_get_other_gates_at_their_own_strength(fit: Fit, experiment: SteeringExperiment) -> None:
    gated, table = towards_no("late", 1.0, opens_for(fit, "on")), experiment.prompts
    chosen, on = (
        {"late": replace(gated, strength=0.7), "open": towards_no("open", 1.0)},
        evaluated(experiment, "validate", "on"),
    )
    made = controls.gate_controls(experiment, chosen, ["late", "open", "never tuned"])
    assert list(made) == ["late, shuffled gate", "late, oracle gate"]
    assert all(one.name == name and one.strength == 0.7 for name, one in made.items())
    limits = {
        "fires_harmful_low": 0.314,
        "fires_harmful_high": 0.686,
        "fires_harmless_low": 0.0,
        "fires_harmless_high": 0.242,
    }
    found = gate_firing(on, gated, table)
    assert found == pytest.approx({"fires_harmful": 0.5, "fires_harmless": 0.0} | limits, abs=1e-3), "12 of 24, 0 of 12"
    oracle = gate_firing(on, made["late, oracle gate"], table)
    assert (oracle["fires_harmful"], oracle["fires_harmless"]) == (1.0, 0.0)
    shuffled = gate_firing(on, made["late, shuffled gate"], table)
    assert 0 < shuffled["fires_harmful"] < 0.9 and shuffled["fires_harmless"] > 0
    assert gate_firing(on, chosen["open"], table) == {}


def test_the_same_vectors_can_be_added_elsewhere(fit: Fit) -> None:
    texts = fit.prompts.text.tolist()
    late = replace(adasteer.adasteer_released(fit, layers=[3]), strength=0.5)
    moved = controls.elsewhere(late, [1])
    assert [edit.layer for edit in moved.edits] == [1] and moved.strength == 0.5
    norms = budget.added_norms(fit.subject, [late], texts)
    np.testing.assert_allclose(budget.added_norms(fit.subject, [moved], texts), norms, rtol=1e-6)
    assert norms.max() > 0
    assert "steers 1 layers; expected as many" in str(controls.elsewhere(late, [0, 1]))


def test_random_directions_follow_their_family(fit: Fit) -> None:
    noise = np.random.default_rng(0).normal(size=fit.last["resid_post"].shape) * (np.arange(fit.subject.d_model) < 4)
    fit = replace(fit, last={**fit.last, "resid_post": fit.last["resid_post"] + noise})
    like = methods.fixed(fit, layers=[2])
    x, at = torch.zeros(1, 1, fit.subject.d_model), hooks.Prompt(*[torch.ones(1, 1, dtype=torch.long)] * 3)
    for seed in (0, 1):
        made = [controls.random_direction(fit, family, like=like, seed=seed) for family in controls.FAMILIES]
        drawn = [one.edits[0].delta(x, at)[0, 0].numpy() for one in made]
        for vector in drawn:
            assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(fit.rejection()[2]), rel=1e-5)
        assert np.abs(drawn[1][4:]).max() < 0.05 < np.abs(drawn[0][4:]).max()


def test_random_directions_spend_the_budget_of_the_tested_one(fit: Fit, experiment: SteeringExperiment) -> None:
    on, noise = evaluated(experiment, "validate", "on"), np.random.default_rng(0).normal(size=fit.last["mlp_out"].shape)
    fit = replace(fit, last={**fit.last, "mlp_out": fit.last["mlp_out"] + noise})
    found = controls.random_null(fit, towards_no("late", 1.0), on, on, 4)
    assert found.groupby(["family", "role"], sort=False).size().tolist() == [1, 4, 1, 4]
    assert found.value[found.role == "late"].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    assert (found.value[found.role == "random"].abs() < 1.01).all(), "none has more than its length along the mediator"
    shut = controls.random_null(fit, towards_no("shut", 1.0, lambda prompt: torch.zeros(len(prompt.ids))), on, on, 3)
    assert shut.empty and steering.random_rows(shut) == [], "what adds nothing has no random rivals"
