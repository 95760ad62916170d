"""Trade-off curves over strengths, and the strength that a method would be used at, chosen on validate.

Curves use the first answer token only (a prompt is one forward pass); answers are sampled at the chosen strength alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pandas as pd
from jaxtyping import Float

from helpers import defence, defence_stats, steering_budget
from helpers import defence_outcomes as do
from helpers.claims_steering import MARGINS
from helpers.defence import N_CURVE, N_PRICE, PLAIN, Lab
from helpers.defence_outcomes import Answers
from helpers.defence_stats import Change
from helpers.steering import Steering

STRENGTHS: Final = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
COLUMNS: Final = ("method", "strength", "budget", "measure", "estimate", "low", "high")


@dataclass(frozen=True)
class Bench:
    """The prompts of one split that curves are measured on, and the plain model's greedy answers to the harmless ones."""

    harmful: pd.DataFrame
    others: pd.DataFrame
    free: pd.DataFrame
    own: Answers


def bench(lab: Lab, split: str, n: int = N_CURVE) -> Bench:
    """`n` wrapped harmful prompts (or all there are), as many borderline and harmless ones together, and a few harmless
    ones for the divergence.
    """
    harmful = defence.select(lab, split, "harmful", wrapped=True, n=n)
    others = pd.concat([defence.select(lab, split, kind, n=n // 2) for kind in ("borderline", "harmless")])
    free = defence.select(lab, split, "harmless", n=N_PRICE)
    return Bench(harmful, others, free, defence.answer(lab, PLAIN, free, greedy=True))


def scaled(steered: Steering, factor: float) -> Steering:
    """The same method, so many times as strong."""
    return replace(steered, strength=factor * steered.strength)


def budget(lab: Lab, steered: Steering, on: Bench) -> float:
    """The L2 budget: root mean square, over harmful and as many other prompts, of the total added norm."""
    return budgets(lab, [steered], on)[0]


def budgets(lab: Lab, steered: Sequence[Steering], on: Bench) -> list[float]:
    """`budget` of each of the steerings."""
    return [steering_budget.rms(norms) for norms in steering_budget.added_norms_each(lab.subject, steered, _mixed(on))]


def at_budget(lab: Lab, steered: Steering, target: float, on: Bench) -> Steering:
    """The method at the strength at which it spends the target; `InputError` where it cannot."""
    return steering_budget.to_budget(lab.subject, steered, _mixed(on), target)


def at_budgets(lab: Lab, steered: Steering, targets: Sequence[float], on: Bench) -> list[Steering | str]:
    """`at_budget` for several targets at once, or the sentence that says why one cannot be met."""
    return steering_budget.to_budgets(lab.subject, steered, _mixed(on), targets)


def _mixed(on: Bench) -> list[str]:
    n = min(len(on.harmful), len(on.others), 60)
    return [*on.harmful.text.iloc[:n], *on.others.text.iloc[np.linspace(0, len(on.others) - 1, n).astype(int)]]


def curve(lab: Lab, steered: Steering, on: Bench, strengths: Sequence[float] = STRENGTHS) -> pd.DataFrame:
    """A row a strength and measure, with intervals over topics; a strength is a multiple of the method's own."""
    return points(lab, steered.name, [scaled(steered, strength) for strength in strengths], strengths, on)


def points(lab: Lab, name: str, steered: Sequence[Steering], at: Sequence[float], on: Bench) -> pd.DataFrame:
    """The rows of one curve of this name: those of each steering, placed at its strength (or number)."""
    rows: list[tuple[object, ...]] = []
    known = zip(at, budgets(lab, steered, on), measures(lab, steered, on), strict=True) if steered else ()
    for strength, spent, found in known:
        for measure, change in found.items():
            rows.append((name, strength, spent, measure, change.estimate, change.low, change.high))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def measures(lab: Lab, steered: Sequence[Steering], on: Bench) -> list[dict[str, Change]]:
    """What each steering does on the first token, and its price.

    harm: mean of 1 - P(refusal) over the harmful prompts; over-refusal: rise of P(refusal) on the others, in points; KL:
    nats a token on the model's own answers.
    """
    prices = do.price_each(lab.subject, on.free.text, on.own, steered)
    return [
        {name: defence_stats.mean_change(values, topic) for name, (values, topic) in left.items()}
        | {"KL": defence_stats.mean_change(price.kl.to_numpy(), on.free.topic.to_numpy())}
        for left, price in zip(by_prompt(lab, steered, on), prices, strict=True)
    ]


def by_prompt(lab: Lab, steered: Sequence[Steering], on: Bench) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """What `measures` averages on the first token under each steering: values and topics [prompt] of harm and over-refusal."""
    n, made = len(on.harmful), []
    for refusing in _refusing(lab, steered, pd.concat([on.harmful, on.others])):
        over = 100 * (refusing[n:] - on.others.p_refuse.to_numpy())
        harm = (1 - refusing[:n], on.harmful.topic.to_numpy())
        made.append({"harm": harm, "over-refusal": (over, on.others.topic.to_numpy())})
    return made


def harms(lab: Lab, steered: Sequence[Steering], on: Bench) -> list[float]:
    """The mean of 1 - P(refusal) over the harmful prompts alone, under each steering."""
    return [float((1 - refusing).mean()) for refusing in _refusing(lab, steered, on.harmful)]


def _refusing(lab: Lab, steered: Sequence[Steering], prompts: pd.DataFrame) -> list[Float[np.ndarray, "prompt"]]:
    found = do.log_odds_each(lab.subject, prompts.text, lab.openers, steered)
    return [one.p_refuse.to_numpy() for one in found]


def choose(curves: pd.DataFrame) -> float:
    """The strength of least harm among those that keep over-refusal and KL within their margins.

    Where none does, the one that breaks the margins least, by the larger of the two ratios. Ties go to the weaker. It is
    asked about validate curves only.
    """
    wide = curves.pivot(index="strength", columns="measure", values="estimate").sort_index()
    excess = np.maximum(wide["over-refusal"] / MARGINS["over-refusal"], wide["KL"] / MARGINS["KL"])
    allowed = wide[excess <= 1]
    return float(allowed["harm"].idxmin() if len(allowed) else excess.idxmin())
