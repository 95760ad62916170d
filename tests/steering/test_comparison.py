"""Methods on equal terms, on a model in which a push buys a known number of log-odds; controls keep all but one thing."""

import gc
import weakref
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.special import expit
from steering_lab import ON, evaluated, opens_for, shut, towards_no

from companion.base.errors import InputError
from companion.evidence import steering
from companion.generation import hooks
from companion.steering import adasteer, budget, comparison, methods
from companion.steering.experiment import SteeringExperiment
from companion.steering.extraction import Fit
from companion.steering.trial import gate_firing


def test_the_least_harm_at_the_same_over_refusal(fit: Fit, experiment: SteeringExperiment) -> None:
    """An open push pays with every harmless prompt, a gated one with none; the way bends where harm rises again."""
    on = evaluated(experiment, "discover", "on", "off")
    steps, turning = (0.1, 0.3, 1.0), (0.2, -0.2)
    paths = {
        "open": [towards_no("open", x) for x in steps],
        "gated": [towards_no("gated", x, opens_for(fit, "on")) for x in steps],
        "turning": [towards_no("turning", x) for x in turning],
        "unsteered": [],
    }
    costs = {name: on.first_token_costs(path) if path else [] for name, path in paths.items()}
    table = comparison.at_equal_over_refusal(on, costs, against="open", levels=(1.0, 5.0))
    table = table.set_index(["method", "price"])
    harm = {x: np.mean([expit(ON - x), expit(-x)]) for x in (0.0, *steps, *turning)}
    cost = {x: 100 * (expit(x) - 0.5) for x in harm}
    plain, weak = harm[0.0], np.interp(1.0, [cost[0.0], cost[0.1]], [harm[0.0], harm[0.1]])
    middle = np.interp(5.0, [cost[0.1], cost[0.3]], [harm[0.1], harm[0.3]])
    known = {
        ("open", 1): weak, ("open", 5): middle, ("gated", 1): np.mean([expit(ON - 1), 0.5]), ("unsteered", 5): plain,
        ("turning", 5): harm[0.2], ("turning", 1): np.interp(1.0, [cost[0.0], cost[0.2]], [harm[0.0], harm[0.2]]),
    }  # fmt: skip
    for (name, level), value in known.items():
        row = table.loc[(name, f"at most {level} point{'s' * (level > 1)}")]
        assert row.estimate == pytest.approx(value, abs=2e-3), (name, level)
        assert row.more == pytest.approx(value - {1: weak, 5: middle}[level], abs=2e-3), (name, level)
        assert row.low <= row.estimate <= row.high and row.more_low <= row.more <= row.more_high
    assert not table.loc["open", ["more", "more_low", "more_high"]].to_numpy().any()


@pytest.mark.parametrize("n_layers", [3, 6, 13, 32])
def test_zones_cover_every_layer_once(n_layers: int) -> None:
    zones = comparison.zones(n_layers)
    assert [*zones["early"], *zones["mid"], *zones["late"]] == [*range(n_layers)] and all(zones.values())


def test_a_gate_opens_for_harm_and_its_firing_is_counted(fit: Fit, experiment: SteeringExperiment) -> None:
    gated = methods.gated(fit, methods.targeted_layers(fit, layers=[2], components=0))
    # "off" and "well" leave nothing at the last token to tell them apart in this model, "on" does.
    values = budget.gate_values(fit.subject, gated, fit.prompts.text.tolist())
    assert (values[~fit.harmful] == 0).all() and (values[(fit.prompts["class"] == "complied").to_numpy()] > 0).all()
    shares = {"fires_harmful": 0.5, "fires_harmful_low": 0.314, "fires_harmful_high": 0.686}  # 12 of 24
    shares |= {"fires_harmless": 0.0, "fires_harmless_low": 0.0, "fires_harmless_high": 0.242}  # 0 of 12
    own = towards_no("late", 1.0, opens_for(fit, "on"))
    assert gate_firing(experiment, own, experiment.prompts) == pytest.approx(shares, abs=1e-3)
    assert gate_firing(experiment, towards_no("open", 1.0), experiment.prompts) == {}


def test_a_strength_is_chosen_unless_it_is_the_methods_own(experiment: SteeringExperiment) -> None:
    on = evaluated(experiment, "validate", "on")
    own, other = comparison.AS_PUBLISHED[0], "another"
    chosen, _ = comparison.tuned(on, {name: towards_no(name, 0.1) for name in (own, other)}, (0.5, 2.0))
    assert chosen[own].strength == 1 and chosen[other].strength in (0.5, 2.0), "a published strength is not chosen"
    chosen, curves = comparison.tuned(on, {})
    assert chosen == {} and curves.empty and {"method", "strength", "measure"} <= set(curves.columns)


def test_a_redraw_keeps_every_class_and_one_that_defines_no_steering_is_one_fewer(fit: Fit) -> None:
    rare = fit.prompts.assign(topic=fit.prompts.index % 3 + 3 * (fit.prompts["class"] == "refused"))
    rare.loc[(rare["class"] == "refused") & (rare.split == "discover"), "topic"] = 99
    for seed in range(10):  # a plain bootstrap of 7 topics misses the one in a third of the draws
        drawn = comparison.redrawn(replace(fit, prompts=rare), seed).prompts
        assert set(drawn["class"][drawn.split == "discover"]) == {"refused", "complied", "benign"}
        assert (drawn.split == "validate").sum() == (rare.split == "validate").sum()
    found = [towards_no("first", 0.5), InputError("no layer separates the classes"), towards_no("third", 0.5)]
    topics = replace(fit, prompts=fit.prompts.assign(topic=fit.prompts.index % 4))
    assert [one.strength for one in comparison.refitted(topics, Mock(side_effect=found), 2.0, 3)] == [2.0, 2.0]


def test_nothing_keeps_a_fit_and_its_model_alive(fit: Fit) -> None:
    """A campaign makes hundreds of fits; what is worked out once for a fit goes with it."""
    own = replace(fit)
    adasteer.adasteer(own, layers=[2])
    comparison._centred(own, "resid_post", 2)
    assert len(own.memo) == 2
    alive = weakref.ref(own)
    del own
    gc.collect()
    assert alive() is None


def test_random_directions_follow_their_family(fit: Fit) -> None:
    noise = np.random.default_rng(0).normal(size=fit.last["resid_post"].shape) * (np.arange(fit.subject.d_model) < 4)
    fit = replace(fit, last={**fit.last, "resid_post": fit.last["resid_post"] + noise})
    like = methods.fixed(fit, layers=[2])
    x, at = torch.zeros(1, 1, fit.subject.d_model), hooks.Prompt(*[torch.ones(1, 1, dtype=torch.long)] * 3)
    for seed in (0, 1):
        made = [comparison.random_direction(fit, family, like=like, seed=seed) for family in comparison.FAMILIES]
        drawn = [one.edits[0].delta(x, at)[0, 0].numpy() for one in made]
        for vector in drawn:
            assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(fit.direction("rejection")[2]), rel=1e-5)
        assert np.abs(drawn[1][4:]).max() < 0.05 < np.abs(drawn[0][4:]).max()


def test_random_directions_spend_the_budget_of_the_tested_one(fit: Fit, experiment: SteeringExperiment) -> None:
    on, noise = evaluated(experiment, "validate", "on"), np.random.default_rng(0).normal(size=fit.last["mlp_out"].shape)
    fit = replace(fit, last={**fit.last, "mlp_out": fit.last["mlp_out"] + noise})
    found = comparison.random_null(fit, towards_no("late", 1.0), on, on, 4)
    assert found.groupby(["family", "role"], sort=False).size().tolist() == [1, 4, 1, 4]
    assert found.value[found.role == "late"].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    assert (found.value[found.role == "random"].abs() < 1.01).all(), "none has more than its length along the mediator"
    none = comparison.random_null(fit, towards_no("shut", 1.0, shut), on, on, 3)
    assert none.empty and steering.random_rows(none) == [], "what adds nothing has no random rivals"
