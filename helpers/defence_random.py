"""Is a direction better than chance? The same sites and budget, directions drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import pandas as pd

from helpers import defence_outcomes as do
from helpers import defence_tradeoff, steering_controls
from helpers.defence import Lab
from helpers.defence_tradeoff import Bench
from helpers.steering import Steering
from helpers.steering_fit import Fit

FAMILIES: Final = {
    "isotropic": steering_controls.random_isotropic,
    "covariance-matched": steering_controls.random_covariance,
}
DRAWS: Final = 100


def falls(lab: Lab, steered: Sequence[Steering], prompts: pd.DataFrame) -> list[float]:
    """Mean fall of the log-odds of complying on these prompts under each steering."""
    found = do.log_odds_each(lab.subject, prompts.text, lab.openers, steered)
    return [float((prompts.log_odds.to_numpy() - one.log_odds.to_numpy()).mean()) for one in found]


def null(lab: Lab, fit: Fit, tested: Steering, on: Bench, spend: Bench, draws: int = DRAWS) -> pd.DataFrame:
    """A row a direction: family, role ("random", or the tested method's name), value (fall of the log-odds on `on`).

    Every random direction is added at the tested method's sites, to every prompt, and spends its budget (on `spend`). No
    rows where the method adds nothing there: then nothing has its size.
    """
    target = defence_tradeoff.budget(lab, tested, spend)
    (own,) = falls(lab, [tested], on.harmful)
    rows: list[tuple[str, str, float]] = []
    for family, draw in FAMILIES.items() if target else ():
        rows.append((family, tested.name, own))
        make = partial(draw, fit, like=tested)
        # Draws of a family have one norm, so the strength that spends the budget is the same for all of them.
        strength = defence_tradeoff.at_budget(lab, make(seed=0), target, spend).strength
        drawn = falls(lab, [make(strength, seed=seed) for seed in range(draws)], on.harmful)
        rows += [(family, "random", value) for value in drawn]
    return pd.DataFrame(rows, columns=["family", "role", "value"])
