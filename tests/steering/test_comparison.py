"""Methods on equal terms, on a model in which a budget buys a known number of log-odds."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from steering_lab import ON, evaluated, opens_for, towards_no

from companion.steering import comparison
from companion.steering.experiment import PLAIN, SteeringExperiment
from companion.steering.extraction import Fit


@pytest.mark.parametrize("n_layers", [3, 6, 13, 32])
def test_zones_cover_every_layer_once(n_layers: int) -> None:
    zones = comparison.zones(n_layers)
    assert [layer for name in ("early", "mid", "late") for layer in zones[name]] == list(range(n_layers))
    assert all(zones.values())


def test_a_budget_buys_the_same_log_odds_of_every_method_that_can_spend_it(
    fit: Fit, experiment: SteeringExperiment
) -> None:
    """Met on prompts of which half open the gate, and measured on others of which a quarter does."""
    methods = {
        "weak": towards_no("weak", 0.1),
        "strong": towards_no("strong", 3.0),
        "gated": towards_no("gated", 1.0, opens_for(fit, "on")),
        "shut": towards_no("shut", 1.0, lambda prompt: torch.zeros(len(prompt.ids))),
    }
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


def test_costs_are_relative_to_the_unsteered_model(
    experiment: SteeringExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only answering moves: the unsteered model takes 2 and 3 seconds, the other 8 and 6."""
    now, spent = [0.0], iter([2.0, 8.0, 3.0, 6.0])
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: now[0])
    answering = lambda *_, **__: now.__setitem__(0, now[0] + next(spent))  # noqa: E731
    monkeypatch.setattr(comparison.decode, "answers_at_once", answering)
    found = comparison.costs(experiment, {"late": towards_no("late", 1.0)}, experiment.prompts[:4])
    assert found.to_dict() == {PLAIN.name: 1.0, "late": 3.0}


def test_no_method_has_no_curve(experiment: SteeringExperiment) -> None:
    chosen, curves = comparison.tuned(evaluated(experiment, "validate", "on"), {})
    assert chosen == {} and curves.empty and {"method", "strength", "measure"} <= set(curves.columns)
