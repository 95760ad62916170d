"""Steering methods on a model whose mediator was planted by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from models import OUT
from steering_lab import log_odds_of, spent_on

from companion.base.errors import InputError
from companion.generation import hooks
from companion.prompts.tokens import Openers
from companion.steering import adasteer, extraction, methods
from companion.steering.adasteer import Affine, Law
from companion.steering.experiment import PLAIN
from companion.steering.extraction import Fit
from companion.steering.methods import Scale

# ---- methods ----


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
    edit = methods.targeted_layers(fit, layers=[2], components=0).edits[0]
    v = fit.direction("rejection", "mlp_out")[2]
    along = torch.tensor([-9.0, 0.0, 0.5, 1.0, 2.0])  # 0 at the complied mean, 1 at the refused one
    x = (torch.tensor(fit.means("mlp_out")["complied"][2]) + along[:, None] * torch.tensor(v)).float()[:, None]
    at = hooks.Prompt(torch.zeros(5, 1, dtype=torch.long))
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


REFUSED = [
    (lambda fit: replace(fit, last={"resid_post": np.ones((36, 4, 16))}).direction("harmfulness"),
     "benign and complied harmful prompts have the same activations"),
    (lambda fit: methods.fixed(fit, layers=[9]), "expected some of 0 to 3"),
    (lambda fit: methods.cast(fit.subset(fit.prompts.kind.to_numpy() == "harmful")), "no harmless prompt"),
    (lambda fit: methods.gated(fit.subset(fit.mask("discover")), PLAIN), "in discover and in validate"),
    (lambda fit: methods.unit(np.zeros(3)), "direction has length 0"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "says"), REFUSED)
def test_what_a_method_cannot_be_made_of(fit: Fit, build: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(fit)


# ---- adasteer ----

N_LAYERS, WIDTH, N = 10, 8, 20
CANDIDATES = (2, 3, 4)  # relative depths 0.25, 0.35 and 0.45
ROUNDING = 1e-8  # of the norm: what is left of equal sums that were added in another order


def planted(gaps: dict[int, float], spread: dict[int, float], size: float) -> Fit:
    """Two classes whose centroids lie `gaps` (of the norm) apart at each layer, and `spread` (of the gap) within a class."""
    rng = np.random.default_rng(0)
    x = np.zeros((2 * N, N_LAYERS, WIDTH))
    x[..., 0] = 1.0
    is_one = np.repeat([False, True], N)
    for layer, gap in gaps.items():
        noise = rng.permutation(np.linspace(-1, 1, 2 * N)) * spread.get(layer, 0.0)
        x[:, layer, 1] += gap * (is_one + noise)
    table = pd.DataFrame({"split": "discover", "class": np.where(is_one, "refused", "complied")})
    return Fit(SimpleNamespace(n_layers=N_LAYERS), Openers((), ()), table, {"resid_post": size * x}, x, 0)


DECIDING = [  # gaps and spreads by layer, and the decision layer
    # At layer 3 the classes are perfectly apart, in units of a spread that is nothing; or by little, which is a difference.
    ({2: 0.2, 3: ROUNDING, 4: 0.1}, {2: 0.5, 4: 0.1}, 4), ({2: 0.2, 3: 1e-3}, {2: 0.5, 3: 0.1}, 3),
    # Where nothing has arrived yet it is the first layer at which something has.
    ({**dict.fromkeys(CANDIDATES, ROUNDING), 1: 0.5, 6: ROUNDING, 7: 0.1, 8: 0.5}, {7: 0.5, 8: 0.1}, 7),
]  # fmt: skip


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(("gaps", "spread", "wanted"), DECIDING)
def test_a_layer_that_differs_by_rounding_is_no_decision_layer(gaps, spread, wanted, size):
    made = planted(gaps, spread, size)
    layer, line = adasteer.decision_line(made, "refused")
    assert layer == wanted
    classes = (made.prompts["class"] == "refused").to_numpy()
    at = line.position(made.last["resid_post"][:, layer])
    assert [at[~classes].mean(), at[classes].mean()] == pytest.approx([0, 1], abs=1e-9)
    with pytest.raises(InputError, match="no decision layer"):
        adasteer.decision_line(planted(dict.fromkeys(range(N_LAYERS), ROUNDING), {}, size), "refused")


def test_it_steers_as_its_laws_say_and_the_released_one_in_one_direction(fit, monkeypatch):
    laws = [Law(*adasteer.decision_line(fit, one), Affine(0.0, 0.0, 0.0, 1.0)) for one in ("refused", "benign")]
    falling = replace(laws[0], rule=Affine(-1.0, 1.0, 0.0, 1.0))
    made = adasteer.adasteer(fit, laws=(falling, laws[1]), layers=[2])
    assert spent_on(fit, made, "refused") < 0.05 * spent_on(fit, made, "complied")
    assert log_odds_of(fit, made, "complied").mean() < 0.1
    plain = log_odds_of(fit, PLAIN, "complied").mean()
    assert log_odds_of(fit, adasteer.adasteer(fit, layers=[2]), "complied").mean() < plain
    monkeypatch.setitem(adasteer.RELEASED, "c", Affine(0.0, 0.2, 0.0, 1.0))
    released = adasteer.adasteer_released(fit, layers=[2])
    assert log_odds_of(fit, released, "complied").mean() < plain
    at = hooks.Prompt(torch.zeros(2, 3, dtype=torch.long))
    for name, law in (("r", laws[0]), ("c", laws[1])):
        at.read[f"position {name}"] = torch.tensor(np.stack([law.line.origin, law.line.origin + law.line.direction]))
    moved = released.edits[0].delta(torch.zeros(2, 3, fit.subject.d_model), at)[:, 0].numpy()
    v = fit.direction("rejection")[2]
    assert np.allclose(np.abs(moved @ v), np.linalg.norm(moved, axis=-1) * np.linalg.norm(v), rtol=1e-4)


def test_the_released_constants_are_those_of_the_code_in_hundredths_with_its_opposite_signs() -> None:
    hundredths = torch.tensor([-80.0, -64.5, -20.0, -8.0, 0.0, 50.0, 120.0])
    code = {"r": (0.02 * (hundredths + 60)).clamp(-0.22, -0.08), "c": (-0.05 * (hundredths + 5) - 0.5).clamp(min=-0.75)}
    for name, rule in adasteer.RELEASED.items():
        torch.testing.assert_close(rule(hundredths / 100), -code[name])


def test_where_both_laws_hold_the_fit_recovers_their_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Harm needs the more of v_R the further it lies from refused, and tolerates the less of v_H the less benign it looks."""
    rng, n = np.random.default_rng(1), 60
    wanted, at = np.repeat(["complied", "benign"], n), rng.normal(np.repeat([0, 1], n), 0.3)
    line = SimpleNamespace(position=lambda _: at, direction=None)
    monkeypatch.setattr(adasteer, "decision_line", lambda *_: (2, line))
    kind = np.where(wanted == "benign", "harmless", "harmful")
    table = pd.DataFrame({"split": "validate", "class": wanted, "kind": kind, "topic": np.arange(2 * n) // 2})
    made = replace(planted({}, {}, 1.0), prompts=table, last={"resid_post": np.zeros((2 * n, N_LAYERS, WIDTH))})
    monkeypatch.setattr(adasteer, "adasteer", lambda fit, layers, laws: laws)

    def refused(fit: Fit, places: np.ndarray, tried: list[tuple[Law, Law]]) -> np.ndarray:
        noise = rng.logistic(0, 0.03, (len(tried), len(places)))
        add_r, add_h = (np.stack([laws[i].rule(torch.tensor(at[places])).numpy() for laws in tried]) for i in (0, 1))
        if not add_h.any():
            return add_r + noise > 0.6 - 0.4 * at[places]
        # Others are answered as soon as a little is added.
        return add_h + noise < np.where(kind[places] == "harmful", 0.25 + 0.3 * at[places], 0.05)

    monkeypatch.setattr(adasteer, "_p_refuse", lambda *call: np.where(refused(*call), 0.99, 0.01))
    monkeypatch.setattr(adasteer, "REDRAWS", 40)
    need, tolerate = (law.rule for law in adasteer.laws_of(made, (2, 3))[0])
    assert -0.8 < need.slope < -0.2 and 0.5 < need.offset < 0.9
    assert 0 < tolerate.offset < 0.3 and tolerate.slope + tolerate.offset == max(adasteer.GRID) / 2
    points, slopes = adasteer.law_table(made, (2, 3))
    assert slopes.slope.tolist() == pytest.approx([2 * need.slope, 2 * tolerate.slope]), "summed over two layers"
    assert (slopes.low < slopes.slope).all() and (slopes.slope < slopes.high).all()
    assert slopes.high[0] < 0 < slopes.low[1], "both laws are sure"
    line = points[(points.panel == adasteer.PANELS[0]) & (points.group == adasteer.LINE)]
    assert line.estimate.iloc[0] > line.estimate.iloc[-1] and (line.low <= line.estimate).all()
    fifths = points[(points.panel == adasteer.PANELS[0]) & (points.group == "harmful")]
    assert len(fifths) == adasteer.BINS and fifths.estimate.is_monotonic_decreasing


def test_the_needed_coefficient_lies_between_grid_points_and_the_tolerated_is_the_last_right_one() -> None:
    grid = np.arange(0, 4.01, 0.5) / 3
    steps = np.arange(len(grid))
    odds = [1.0 - 0.4 * steps, np.ones(len(grid)), -np.ones(len(grid))]  # the first crosses 0 at 2.5 steps
    assert adasteer.needed(np.stack(odds, axis=1), grid) == pytest.approx([2.5 * grid[1], np.nan, 0], nan_ok=True)
    right = np.stack([steps <= 3, steps > 3, steps < 0], axis=1)
    np.testing.assert_array_equal(adasteer.tolerated(right, grid), [grid[3], grid[-1], np.nan])
