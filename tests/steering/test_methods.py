"""Steering methods on a model whose mediator was planted by hand, and what their parts promise on made-up activations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from handmade import OUT
from steering_lab import log_odds_of, spent_on

from companion.base.errors import InputError
from companion.generation import hooks
from companion.steering import extraction, methods
from companion.steering.experiment import PLAIN
from companion.steering.extraction import Fit
from companion.steering.methods import Scale


def test_a_planted_mediator_is_recovered(fit: Fit) -> None:
    directions = fit.direction("rejection", "mlp_out")
    sizes, v = np.linalg.norm(directions, axis=-1), directions[2]
    assert sizes[2] > 100 * sizes[[0, 1, 3]].max()
    assert v[OUT] == pytest.approx(-1.5, rel=0.02) and abs(v[OUT]) > 0.999 * np.linalg.norm(v)


def test_targeted_steering_makes_a_complied_prompt_a_refused_one_and_spares_the_rest(fit: Fit) -> None:
    plain = {name: log_odds_of(fit, PLAIN, name) for name in extraction.CLASSES}
    assert plain["complied"].mean() - plain["refused"].mean() == pytest.approx(1.5, rel=0.02)
    layer = methods.targeted_layers(fit, layers=[2], components=0)
    np.testing.assert_allclose(log_odds_of(fit, layer, "complied"), plain["refused"].mean(), atol=0.01)
    np.testing.assert_allclose(log_odds_of(fit, layer, "refused"), plain["refused"], atol=0.01)
    middle = (plain["complied"].mean() + plain["refused"].mean()) / 2
    assert log_odds_of(fit, replace(layer, strength=0.5), "complied").mean() == pytest.approx(middle, abs=0.05)


def test_the_closed_loop_is_one_sided_and_bounded(fit: Fit) -> None:
    edit, means = methods.targeted_layers(fit, layers=[2], components=0).edits[0], fit.directions("mlp_out")
    v = means.rejection[2]
    along = torch.tensor([-9.0, 0.0, 0.5, 1.0, 2.0])  # 0 at the complied mean, 1 at the refused one
    x = (torch.tensor(means.complied[2]) + along[:, None] * torch.tensor(v)).float()[:, None]
    at = hooks.Prompt(*[torch.zeros(5, 1, dtype=torch.long)] * 3)
    moved = edit.delta(x, at)[:, 0].numpy() @ v / (v @ v)
    np.testing.assert_allclose(moved[1:], [1, 0.5, 0, 0], atol=0.01)
    assert moved[0] == pytest.approx(1, abs=0.05)


def test_the_null_space_leaves_benign_activations_alone(fit: Fit) -> None:
    benign = np.random.default_rng(0).normal(size=(40, 8)) @ np.diag([5, 5, 5, 5, 0, 0, 0, 0])
    np.testing.assert_allclose(benign @ methods.low_variance(benign, 0.5), 0, atol=1e-9)
    made = methods.alphasteer(fit, layers=[2])
    assert spent_on(fit, made, "benign") < 0.05 * spent_on(fit, made, "complied")


def test_positions_are_affine_invariant() -> None:
    x, zero, one, turn = np.split(np.random.default_rng(0).normal(size=(13, 6)), [5, 6, 7])
    zero, one = zero[0], one[0]
    move = lambda y: 3.0 * y @ np.linalg.qr(turn).Q + 7.0  # noqa: E731
    line = Scale.between(zero, one)
    before = line.position(x)
    np.testing.assert_allclose(Scale.between(move(zero), move(one)).position(move(x)), before)
    np.testing.assert_allclose(Scale.between(one, zero).position(x), 1 - before)
    np.testing.assert_allclose(line.position_on_device(torch.tensor(x)), before)
    np.testing.assert_allclose(line.position(np.stack([zero, one])), [0, 1], atol=1e-12)


def test_a_direction_along_which_benign_prompts_vary_is_refused() -> None:
    benign = np.random.default_rng(0).normal(size=(50, 6)) * np.array([10, 1, 1, 1, 1, 1])
    v = np.array([1.0, 0.15, 0, 0, 0, 0])
    with pytest.raises(InputError, match=r"layer 4: .* 0\.1\d of the direction is left"):
        methods.preserving(v, benign, 1, "layer 4")
    v[1] = 0.35
    assert methods.preserving(v, benign, 1, "layer 4") @ v / np.linalg.norm(v) == pytest.approx(1)


def alike(fit: Fit) -> Fit:
    return replace(fit, last={**fit.last, "resid_post": np.ones_like(fit.last["resid_post"])})


REFUSED = [
    (lambda fit: alike(fit).direction("harmfulness"), "benign and complied harmful prompts have the same activations"),
    (lambda fit: methods.fixed(fit, layers=[9]), "expected some of 0 to 3"),
    (lambda fit: methods.cast(fit.subset(fit.prompts.kind.to_numpy() == "harmful")), "no harmless prompt"),
    (lambda fit: methods.gated(fit.subset(fit.mask("discover")), PLAIN), "in discover and in validate"),
    (lambda fit: methods.unit(np.zeros(3)), "direction has length 0"),
]


@pytest.mark.parametrize(("build", "says"), REFUSED)
def test_what_a_method_cannot_be_made_of(fit: Fit, build: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(fit)
