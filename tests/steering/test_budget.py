"""Budgets that are met from shared measurements, and the strength that is chosen from hand-made curves."""

import numpy as np
import pandas as pd
import pytest
from steering_lab import texts_of

from companion.base.display import NotDefined
from companion.generation.hooks import Steering
from companion.steering import budget
from companion.steering.extraction import Fit


def test_several_budgets_are_met_from_one_set_of_measurements(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose spending rises with the square of its strength: proportional steps alone would swing around it."""
    texts, rounds = texts_of(fit, "complied"), []

    def squared(_: object, steered: list[Steering], texts: list[str]) -> np.ndarray:
        rounds.append(len(steered))
        return np.array([[one.strength**2] * len(texts) for one in steered])

    monkeypatch.setattr(budget, "added_norms", squared)
    wanted = [0.01, 0.3, 1.0, 90.0]
    found = budget.to_budgets(fit.subject, Steering("square"), texts, wanted)
    assert [one.strength**2 for one in found if isinstance(one, Steering)] == pytest.approx(wanted, rel=0.01)
    assert len(rounds) <= 6 and rounds[0] == 1 and rounds[1] == 3, "one passes at once, the others share their rounds"

    def bounded(_: object, steered: list[Steering], texts: list[str]) -> np.ndarray:
        return np.array([[min(one.strength, 2.0)] * len(texts) for one in steered])

    monkeypatch.setattr(budget, "added_norms", bounded)
    near, far = budget.to_budgets(fit.subject, Steering("bounded"), texts, [0.5, 3.0])
    assert isinstance(near, Steering) and near.strength == pytest.approx(0.5, rel=0.01)
    assert isinstance(far, NotDefined) and "did not settle" in far.reason
    assert "expected a positive norm" in str(budget.to_budgets(fit.subject, Steering("none"), texts, [0.0])[0])


@pytest.mark.parametrize(
    ("curves", "strength"),
    [
        ([(0.5, 0.6, 0.5, 0.001), (1.0, 0.3, 1.9, 0.019), (1.5, 0.1, 2.1, 0.01), (2.0, 0.2, 1.0, 0.021)], 1.0),
        ([(0.5, 0.6, 4.0, 0.001), (1.0, 0.3, 3.0, 0.05), (1.5, 0.1, 9.0, 0.3)], 0.5),
        ([(1.0, 0.3, 0, 0), (0.5, 0.3, 0, 0)], 0.5),
    ],
    ids=["least harm within both margins", "none keeps them: the least excess", "a tie goes to the weaker"],
)
def test_the_chosen_strength(curves: list[tuple[float, ...]], strength: float) -> None:
    """Curves are rows of strength, harm, over-refusal and KL."""
    names = ("harm", "over-refusal", "KL")
    long = [(row[0], name, value) for row in curves for name, value in zip(names, row[1:], strict=True)]
    assert budget.choose_strength(pd.DataFrame(long, columns=["strength", "measure", "estimate"])) == strength
