"""Methods on equal terms, on a model in which a budget buys a known number of log-odds; controls keep all but one thing."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit
from steering_lab import ON, evaluated, opens_for, shut, towards_no

from companion.evidence import steering
from companion.generation import hooks
from companion.steering import adasteer, budget, comparison, methods
from companion.steering.experiment import SteeringExperiment
from companion.steering.extraction import Fit
from companion.steering.figure_tables import gate_firing


def test_a_budget_buys_the_same_log_odds_of_every_method(fit: Fit, experiment: SteeringExperiment) -> None:
    """Met on prompts of which half open the gate, and measured on others of which a quarter does."""
    sizes = {"weak": (0.1,), "strong": (3.0,), "gated": (1.0, opens_for(fit, "on")), "shut": (1.0, shut)}
    methods = {name: towards_no(name, *size) for name, size in sizes.items()}
    spend, on = evaluated(experiment, "validate", "on"), evaluated(experiment, "discover", "on", "off")
    table = comparison.equal_budgets(methods, 2.0, spend, on, (0.25, 1.0), against="weak")
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
        more_refused = 100 * (expit(x) - 0.5)
        known = {"weak": (all_open, more_refused), "strong": (all_open, more_refused), "gated": (half_open, 0.0)}
        for name, (left, refused) in known.items():
            assert found.estimate[harm, name, x] == pytest.approx(left, abs=0.01), (name, x)
            assert found.estimate[over, name, x] == pytest.approx(refused, abs=0.5), (name, x)
        more = found.more[harm, "gated", x]
        assert more == pytest.approx(100 * (half_open - all_open), abs=1), "points, against the same prompts"
        assert found.more_low[harm, "gated", x] <= more <= found.more_high[harm, "gated", x]
        # On paper every prompt of the two is pushed alike: paired, nothing is left to vary.
        assert found.loc[(harm, "strong", x), ["more", "more_low", "more_high"]].abs().max() < 1
        assert found.more[over, "gated", x] == pytest.approx(-more_refused, abs=1)
    assert found.xs("weak", level="group").more.isna().all()
    assert len(found) == 2 * 3 * 2 and (found.low <= found.estimate).all() and (found.estimate <= found.high).all()


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
    table = comparison.at_equal_over_refusal(on, paths, against="open", levels=(1.0, 5.0)).set_index(
        ["method", "price"]
    )
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


def test_the_gate_opens_for_harm_and_the_shuffled_one_as_often_for_anything(fit: Fit) -> None:
    gated = methods.gated(fit, methods.targeted_layers(fit, layers=[2], components=0))
    texts, harmful = fit.prompts.text.tolist(), fit.harmful
    # "off" and "well" leave nothing at the last token to tell them apart in this model, "on" does.
    values = budget.gate_values(fit.subject, gated, texts)
    assert (values[~harmful] == 0).all() and (values[(fit.prompts["class"] == "complied").to_numpy()] > 0).all()
    oracle = comparison.oracle_gate(fit, gated, [t for t, h in zip(texts, harmful, strict=True) if h])
    np.testing.assert_array_equal(budget.gate_values(fit.subject, oracle, texts), harmful)
    shuffled = comparison.shuffled_gate(fit, gated)
    drawn = budget.gate_values(fit.subject, shuffled, texts)
    np.testing.assert_array_equal(drawn[:5], budget.gate_values(fit.subject, shuffled, texts[:5]))
    assert 0 < (drawn > 0).mean() < 1 and ((drawn > 0) != (values > 0)).any()


def test_only_gated_methods_get_other_gates_at_their_own_strength(fit: Fit, experiment: SteeringExperiment) -> None:
    gated, table = towards_no("late", 1.0, opens_for(fit, "on")), experiment.prompts
    chosen = {"late": replace(gated, strength=0.7), "open": towards_no("open", 1.0)}
    on = evaluated(experiment, "validate", "on")
    made = comparison.gate_controls(experiment, chosen, ["late", "open", "never tuned"])
    assert list(made) == ["late, shuffled gate", "late, oracle gate"]
    assert all(one.name == name and one.strength == 0.7 for name, one in made.items())
    shares = {"fires_harmful": 0.5, "fires_harmful_low": 0.314, "fires_harmful_high": 0.686}  # 12 of 24
    shares |= {"fires_harmless": 0.0, "fires_harmless_low": 0.0, "fires_harmless_high": 0.242}  # 0 of 12
    assert gate_firing(on, gated, table) == pytest.approx(shares, abs=1e-3)
    oracle, shuffled = (gate_firing(on, made[f"late, {kind} gate"], table) for kind in ("oracle", "shuffled"))
    assert (oracle["fires_harmful"], oracle["fires_harmless"]) == (1.0, 0.0)
    assert 0 < shuffled["fires_harmful"] < 0.9 and shuffled["fires_harmless"] > 0
    assert gate_firing(on, chosen["open"], table) == {}
    own, other = comparison.AS_PUBLISHED[0], "another"
    chosen, _ = comparison.tuned(on, {name: towards_no(name, 0.1) for name in (own, other)}, (0.5, 2.0))
    assert chosen[own].strength == 1 and chosen[other].strength in (0.5, 2.0), "a published strength is not chosen"
    chosen, curves = comparison.tuned(on, {})
    assert chosen == {} and curves.empty and {"method", "strength", "measure"} <= set(curves.columns)


def test_the_same_vectors_can_be_added_elsewhere(fit: Fit) -> None:
    texts = fit.prompts.text.tolist()
    late = replace(adasteer.adasteer_released(fit, layers=[2]), strength=0.5)
    moved = comparison.elsewhere(late, [1])
    assert [edit.layer for edit in moved.edits] == [1] and moved.strength == 0.5
    norms = budget.added_norms(fit.subject, [late], texts)
    np.testing.assert_allclose(budget.added_norms(fit.subject, [moved], texts), norms, rtol=1e-6)
    assert norms.max() > 0 and "steers 1 layers; expected as many" in str(comparison.elsewhere(late, [0, 1]))


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
