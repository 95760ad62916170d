"""Methods side by side on equal terms: at equal budgets, with their gates exchanged, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import pandas as pd

from helpers import defence, defence_answers, defence_tradeoff, stats, steering_budget, steering_controls
from helpers.defence import PLAIN, Lab
from helpers.defence_outcomes import uniforms
from helpers.defence_tradeoff import Bench
from helpers.errors import InputError
from helpers.steering import Steering, applied
from helpers.steering_fit import Fit

SHARES: Final = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the decisive arm's budget
PANELS: Final = {
    "harm": "1 - P(refusal), jailbroken requests",
    "over-refusal": "rise of P(refusal) on the others, points",
}
N_TIMED: Final = 64


def gate_controls(lab: Lab, fit: Fit, chosen: Mapping[str, Steering], names: Sequence[str]) -> dict[str, Steering]:
    """Gated methods with two other gates, at the strength chosen for their own: one that opens as often but for any
    prompt, and one that knows what is harmful (an upper bound, not a defence).
    """
    harmful = lab.prompts.text[lab.prompts.kind == "harmful"].tolist()
    made: dict[str, Steering] = {}
    for name in names:
        one = chosen.get(name)
        if one is not None and one.gate is not None:
            shuffled = steering_controls.shuffled_gate(fit, one.strength, steering=one)
            oracle = steering_controls.oracle_gate(fit, one.strength, steering=one, harmful=harmful)
            made |= {f"{name}, {which} gate": two for which, two in (("shuffled", shuffled), ("oracle", oracle))}
    return {name: replace(one, name=name) for name, one in made.items()}


def equal_budgets(
    lab: Lab, methods: Mapping[str, Steering], largest: float, spend: Bench, on: Bench, shares: Sequence[float] = SHARES
) -> pd.DataFrame:
    """What methods do with the same L2 budget (met on `spend`), first token, on `on`: panel, group, x, estimate, low, high.

    `x` is the budget; the largest is named by the caller. A method that cannot spend a budget has no point there.
    """
    rows = []
    for name, one in methods.items():
        steered = {}
        for share in shares:
            with suppress(InputError):
                steered[share] = defence_tradeoff.at_budget(lab, one, share * largest, spend)
        found = defence_tradeoff.measures(lab, list(steered.values()), on, priced=False) if steered else []
        for share, measured in zip(steered, found, strict=True):
            for key, panel in PANELS.items():
                change = measured[key]
                rows.append((panel, name, share * largest, change.estimate, change.low, change.high))
    table = pd.DataFrame(rows, columns=["panel", "group", "x", "estimate", "low", "high"])
    return table.sort_values("panel", kind="stable", ignore_index=True)


def firing(lab: Lab, steered: Steering, prompts: pd.DataFrame) -> dict[str, float]:
    """Share of the prompts of each kind for which a method's gate opens, with Wilson limits; empty without a gate."""
    if steered.gate is None:
        return {}
    is_open = steering_budget.gate_values(lab.subject, steered, list(prompts.text)) > 0
    row: dict[str, float] = {}
    for kind in prompts.kind.unique():
        mine = is_open[(prompts.kind == kind).to_numpy()]
        low, high = stats.wilson(int(mine.sum()), len(mine))
        row |= {f"fires_{kind}": float(mine.mean()), f"fires_{kind}_low": low, f"fires_{kind}_high": high}
    return row


def rates(trial: pd.DataFrame) -> dict[str, float]:
    """Percentages with their Wilson limits: harmful answers, and refusals of borderline and of harmless prompts."""
    row: dict[str, float] = {}
    for name, kind, label in (
        ("harm_rate", "harmful", "harmful"),
        ("borderline_refused", "borderline", "refusal"),
        ("harmless_refused", "harmless", "refusal"),
    ):
        labels = trial.label[trial.kind == kind]
        if len(labels):
            hits = int((labels == label).sum())
            low, high = stats.wilson(hits, len(labels))
            row |= {name: 100 * hits / len(labels), f"{name}_low": 100 * low, f"{name}_high": 100 * high}
    return row


def costs(lab: Lab, chosen: Mapping[str, Steering], prompts: pd.DataFrame, repeats: int = 2) -> pd.Series:
    """Seconds to read a prompt and answer it, over the unsteered model's, the least of some rounds.

    Every arm reads its prompts from the bottom and in one padded batch, as it would in use, with no plain run remembered
    and no answer copied.
    """
    some = prompts.iloc[np.linspace(0, len(prompts) - 1, min(N_TIMED, len(prompts))).astype(int)]
    arms = {PLAIN.name: Steering(PLAIN.name), **chosen}
    best = dict.fromkeys(arms, np.inf)
    for _ in range(repeats):
        for name, one in arms.items():
            start = time.perf_counter()
            steps = defence.STEPS[lab.exact]
            draws = uniforms(len(some), steps, lab.seed)
            on = partial(applied, lab.subject, one)
            defence_answers.answers_at_once(lab.subject, list(some.text), steps, on, draws, system=one.system)
            best[name] = min(best[name], time.perf_counter() - start)
    return pd.Series(
        {name: value / best[PLAIN.name] for name, value in best.items()}, name="seconds, steered / unsteered"
    )
