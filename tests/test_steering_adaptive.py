"""The decision layer of AdaSteer: it must hold a difference between the classes, and not rounding noise."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from companion.base.errors import InputError
from companion.prompts.tokens import Openers
from companion.steering import adasteer, methods
from companion.steering.extraction import Fit

N_LAYERS, WIDTH, N = 10, 8, 20
CANDIDATES = (2, 3, 4)  # relative depths 0.25, 0.35 and 0.45
ROUNDING = 1e-8  # of the norm: what is left of equal sums that were added in another order


def fit(gaps: dict[int, float], spread: dict[int, float], size: float = 100.0) -> Fit:
    """Two classes whose centroids lie `gaps` (of the norm) apart at each layer, and `spread` (of the gap) within a class."""
    rng = np.random.default_rng(0)
    direction = np.eye(WIDTH)[1]
    x = np.zeros((2 * N, N_LAYERS, WIDTH))
    x[..., 0] = 1.0
    is_one = np.repeat([False, True], N)
    for layer, gap in gaps.items():
        noise = rng.permutation(np.linspace(-1, 1, 2 * N)) * spread.get(layer, 0.0)
        x[:, layer] += gap * (is_one + noise)[:, None] * direction
    table = pd.DataFrame({"split": "discover", "class": np.where(is_one, "refused", "complied")})
    return Fit(SimpleNamespace(n_layers=N_LAYERS), Openers((), ()), table, {"resid_post": size * x}, x, 0, ())


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_a_layer_that_differs_by_rounding_is_no_decision_layer(size: float) -> None:
    """At layer 3 the classes are perfectly apart, in units of a spread that is nothing."""
    made = fit({2: 0.2, 3: ROUNDING, 4: 0.1}, {2: 0.5, 4: 0.1}, size)
    layer, line = adasteer.decision_line(made, "refused")
    assert layer == 4
    classes = (made.prompts["class"] == "refused").to_numpy()
    at = methods.position(line, made.last["resid_post"][:, layer])
    assert [at[~classes].mean(), at[classes].mean()] == pytest.approx([0, 1], abs=1e-9)


def test_a_small_difference_is_one() -> None:
    assert adasteer.decision_line(fit({2: 0.2, 3: 1e-3}, {2: 0.5, 3: 0.1}), "refused")[0] == 3


def test_where_nothing_has_arrived_yet_it_is_the_first_layer_at_which_something_has() -> None:
    gaps = {**dict.fromkeys(CANDIDATES, ROUNDING), 1: 0.5, 6: ROUNDING, 7: 0.1, 8: 0.5}
    assert adasteer.decision_line(fit(gaps, {7: 0.5, 8: 0.1}), "refused")[0] == 7


def test_rounding_everywhere_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no decision layer"):
        adasteer.decision_line(fit(dict.fromkeys(range(N_LAYERS), ROUNDING), {}), "refused")
