"""Moran's I on known patterns, and adjacency.windows against random groups."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from neuron_tools import additive, made_effects

from companion.base.errors import InputError
from companion.neurons import adjacency


def dense(values: np.ndarray, layer: np.ndarray, half_width: int) -> float:
    """Moran's I from the matrix of weights, as the textbook writes it."""
    place = np.concatenate([np.arange((layer == one).sum()) for one in np.unique(layer)])
    apart = abs(place[:, None] - place)
    weight = (layer[:, None] == layer) & (apart > 0) & (apart <= half_width)
    z = values - np.array([values[layer == one].mean() for one in layer])
    return len(z) / weight.sum() * (z @ weight @ z) / (z @ z)


@pytest.mark.parametrize("half_width", [1, 3, 8, 500])
def test_morans_i_is_the_textbooks(half_width: int) -> None:
    rng = np.random.default_rng(half_width)
    layer = np.repeat([2, 5, 9], [30, 80, 12])
    values = rng.exponential(size=(4, 122)) + layer
    made = adjacency.morans_i(values, layer, half_width)
    np.testing.assert_allclose(made, [dense(row, layer, half_width) for row in values], rtol=1e-9)
    assert np.isnan(adjacency.morans_i(np.ones(122), layer, half_width))


def test_layers_do_not_make_neighbours() -> None:
    """Two layers of different size of effect, no pattern within: pooling must not see one."""
    rng, layer = np.random.default_rng(0), np.repeat([0, 1], 300)
    values = rng.normal(size=600) ** 2 * np.where(layer == 0, 1.0, 100.0)
    assert abs(adjacency.morans_i(adjacency.ranks_in_layer(values, layer), layer)) < 0.05
    ranks = adjacency.ranks_in_layer(np.array([[-3.0, 1.0, 2.0, 2.0]]), np.zeros(4, int))
    assert ranks.tolist() == [[4.0, 1.0, 2.5, 2.5]]


def test_the_interval_covers_exchangeable_indices() -> None:
    rng, hit, small = np.random.default_rng(0), 0, 0
    for seed in range(100):
        effects = made_effects(rng.standard_t(3, size=150) + 0.5 * rng.standard_normal((24, 150)))
        found = adjacency.moran_test(effects, n_permutations=199, seed=seed)
        hit += found.low <= 0 <= found.high
        small += found.p <= 0.05
    assert hit >= 88 and small <= 11


def test_neighbours_that_are_alike_are_found() -> None:
    rng = np.random.default_rng(0)
    smooth = np.convolve(rng.normal(size=420), np.ones(21), "valid")
    means = np.concatenate([np.zeros(50), smooth, rng.permutation(smooth)])
    layer = np.repeat([0, 1, 2], [50, 400, 400])
    effects = made_effects(means + 0.1 * rng.standard_normal((24, 850)) * (layer > 0), layer)
    found = adjacency.moran_test(effects, n_permutations=999)
    assert found.layers == (1, 2)  # a layer of zeros is left out
    assert found.low > 0.05 and found.p == 0.001


def test_what_has_no_neighbours_is_refused() -> None:
    with pytest.raises(InputError, match="a window of half-width 8 needs 17"):
        adjacency.windows(np.arange(16))
    with pytest.raises(InputError, match="no neuron has any effect: there is nothing whose place could matter"):
        adjacency.moran_test(made_effects(np.zeros((12, 40))))


def test_a_window_wins_where_neighbours_belong_together_and_not_elsewhere() -> None:
    writes = np.zeros(120)
    writes[40:45] = 1.0
    for place, wins in ((np.arange(120), True), (np.random.default_rng(3).permutation(120), False)):
        _, measured = additive(writes[place])
        ranked = np.argsort(-writes[place], kind="stable")
        made = adjacency.window_contest(measured, "T2", ranked, half_width=2)
        shares = dict(zip(adjacency.CONTEST, made.shares.estimate, strict=True))
        assert (made.p == 0.05) == wins and (shares["best window"] > 0.99) == wins
        assert shares["top ranked"] == pytest.approx(1, abs=1e-3)
        # Chosen by sums of single effects, which here are the joint ones.
        quick = replace(measured, study=replace(measured.study, is_costly=True))
        again = adjacency.window_contest(quick, "T2", ranked, half_width=2)
        np.testing.assert_allclose(again.shares.estimate, made.shares.estimate, atol=1e-6)


def test_groups_are_chosen_on_discover_alone() -> None:
    """On discover one block of neurons changes, on the other splits another: the window must be that of discover."""
    writes = np.zeros(60)
    writes[[*range(10, 15), *range(40, 45)]] = 1.0
    _, measured = additive(writes)
    states = measured.states["T2"]
    is_discover = torch.tensor((states.pairs.split == "discover").to_numpy())
    states.neurons[1, is_discover, 40:45] = 0.0
    states.neurons[1, ~is_discover, 10:15] = 0.0
    made = adjacency.window_contest(measured, "T2", np.arange(60), half_width=2)
    assert made.shares.estimate[0] == pytest.approx(0, abs=1e-9)  # measured where those neurons do nothing
