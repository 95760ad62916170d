"""What curves of growing sets say, and how concentrated single effects are."""

import numpy as np
import pytest
from neuron_tools import additive, made_effects

from companion.neurons import sparsity
from companion.neurons.sets import cumulative, on_contrast, sizes
from companion.neurons.sparsity import areas, concentration, curve_summary, gini, participation, settles


def test_k90_must_stay_in_the_band() -> None:
    ks = np.arange(1, 7)
    cases = {
        (0.2, 0.5, 0.9, 0.95, 1.0, 1.0): (2, 3),
        (0.2, 0.95, 0.8, 0.95, 1.0, 1.0): (2, 4),  # leaves the band below
        (0.6, 1.0, 1.2, 1.15, 1.05, 1.0): (1, 4),  # overshoots: at 4 it is above, but stays from there on
        (2.0, 2.0, 2.0, 2.0, 2.0, 1.0): (5, 5),
        (0.0, 0.0, 0.0, 0.0, 0.0, 1.0): (6, 6),
    }
    for share, (k50, k90) in cases.items():
        assert (settles(np.array(share), ks, 0.5), settles(np.array(share), ks, 0.9)) == (k50, k90), share
    assert np.isnan(settles(np.array([0.95, 0.95, 0.2]), ks[:3], 0.9))
    assert np.isnan(settles(np.full(3, np.nan), ks[:3], 0.9))
    assert settles(np.array([0.5, 1.0]), np.array([10, 200]), 0.9) == 200  # sizes, not places


def test_a_layer_of_known_neurons() -> None:
    """Four neurons of effect 2, one of -1 and the rest nothing: the whole is 7."""
    writes = np.zeros(40)
    writes[[3, 17, 22, 39]], writes[8] = 2.0, -1.0
    subject, measured = additive(writes)
    order = np.argsort(-abs(writes), kind="stable")
    curve = on_contrast(measured, "T2", "test", lambda states: cumulative(subject, states, order, sizes(40)))
    np.testing.assert_allclose(curve.nie[0, [0, 3, 4, 39]], [2, 8, 7, 7], rtol=1e-4)
    made = dict(zip(sparsity.SUMMARY, curve_summary(curve).estimate, strict=True))
    assert (made["k50"], made["k90"]) == (2, 4)  # 8 / 7 is beyond 1.1, but what follows stays within
    assert made["psi"] == pytest.approx(1, rel=1e-4)
    by_sign = np.argsort(-writes, kind="stable")
    late = on_contrast(measured, "T2", "test", lambda states: cumulative(subject, states, by_sign, sizes(40)))
    assert curve_summary(late).estimate[2] == 39  # the last one takes the overshoot back


def test_nothing_settles_where_the_layer_works_against_the_treatment() -> None:
    subject, measured = additive(np.array([1.0, -3.0]))
    measured.effects["T2"].pairs["te"] = 5.0  # the rest of the network turns it round
    curve = on_contrast(measured, "T2", "test", lambda states: cumulative(subject, states, np.array([0, 1]), sizes(2)))
    made = dict(zip(sparsity.SUMMARY, curve_summary(curve).estimate, strict=True))
    assert (made["k50"], made["k90"]) == (3, 3)  # one more than there are
    assert made["psi"] == pytest.approx(-0.4, rel=1e-4)
    assert sparsity.curve_shares(curve, "nie", np.array([1, 2])).empty


def test_areas() -> None:
    ks = np.arange(1, 101)
    np.testing.assert_allclose(areas(ks / 100, ks), [0.5, 0.5])
    np.testing.assert_allclose(areas(np.ones(100), ks), [0.995, 0.005])
    over = np.where(ks < 100, 1.5, 1.0)
    assert areas(over, ks)[0] > 1.4
    assert areas(over, ks)[1] == pytest.approx(0.5, abs=0.01)


def test_concentration() -> None:
    rng = np.random.default_rng(0)
    size = rng.exponential(size=50)
    dense = abs(size[:, None] - size).sum() / (2 * 50**2 * size.mean())
    assert gini(size) == pytest.approx(dense)
    assert participation(np.array([3.0, 3.0, 0.0, 0.0])) == 2
    made = concentration(made_effects(np.tile([4.0, -4.0, 0.0, 0.0], (12, 1))))
    assert made.estimate.tolist() == [0.5, 2.0]
