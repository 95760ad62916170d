"""Methods side by side on equal terms: at equal budgets, with their gates exchanged, and what they cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import pandas as pd

from helpers import (
    defence,
    defence_answers,
    defence_stats,
    defence_tradeoff,
    stats,
    steering_budget,
    steering_controls,
)
from helpers.defence import PLAIN, Lab
from helpers.defence_outcomes import uniforms
from helpers.defence_tradeoff import Bench
from helpers.steering import Steering, applied
from helpers.steering_fit import Fit

SHARES: Final = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the decisive arm's budget
PANELS: Final = {
    "harm": "1 - P(refusal), jailbroken requests",
    "over-refusal": "rise of P(refusal) on the others, points",
}
ROWS: Final = ("at all layers, or in the prompt", "at some layers only")
EQUAL: Final = [
    "row",
    "panel",
    "group",
    "x",
    "estimate",
    "low",
    "high",
    "strength",
    "why",
    "more",
    "more_low",
    "more_high",
]
N_TIMED: Final = 32


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
    lab: Lab, methods: Mapping[str, Steering], largest: float, spend: Bench, on: Bench, shares: Sequence[float] = SHARES,
    *, against: str,
) -> pd.DataFrame:  # fmt: skip
    """What methods do with the same L2 budget (met on `spend`), first token, on `on`: row, panel, group, x, estimate, low,
    high, strength, why, more, more_low, more_high.

    `x` is the budget; the largest is named by the caller. `row` says which layers a method steers, all or some. `more`:
    by how many points a method lies above the one named `against` at the same budget, on the same prompts. A budget
    that a method cannot spend has a row without numbers, whose `why` says so.
    """
    budgets = [share * largest for share in shares]
    met = {name: defence_tradeoff.at_budgets(lab, one, budgets, spend) for name, one in methods.items()}
    found = {}
    for name, made in met.items():
        steered = [one for one in made if not isinstance(one, str)]
        measured = iter(defence_tradeoff.by_prompt(lab, steered, on) if steered else [])
        found[name] = [None if isinstance(one, str) else next(measured) for one in made]
    rows: list[dict[str, object]] = []
    for name, place, (key, panel) in itertools.product(methods, range(len(budgets)), PANELS.items()):
        one, values, other = met[name][place], found[name][place], found[against][place]
        row = {"row": which_layers(lab, methods[name]), "panel": panel, "group": name, "x": budgets[place]}
        if isinstance(one, str) or values is None:
            rows.append(row | {"why": one})
            continue
        row |= {"strength": one.strength, "why": ""} | _limits("", *values[key])
        if other is not None and name != against:
            points = (100 if key == "harm" else 1) * (values[key][0] - other[key][0])
            row |= _limits("more_", points, values[key][1])
        rows.append(row)
    table = pd.DataFrame(rows, columns=EQUAL)
    return table.sort_values(["row", "panel"], kind="stable", ignore_index=True)


def _limits(prefix: str, values: np.ndarray, topic: np.ndarray) -> dict[str, object]:
    """Mean and interval over topics, as columns whose names begin with the prefix."""
    made = defence_stats.mean_change(values, topic)
    return {prefix.rstrip("_") or "estimate": made.estimate, f"{prefix}low": made.low, f"{prefix}high": made.high}


def which_layers(lab: Lab, steered: Steering) -> str:
    """Whether a method steers every layer of the model, for the two rows of figures in which all would not fit."""
    every = {edit.layer for edit in steered.edits} >= set(range(lab.subject.n_layers))
    return ROWS[0] if every or not steered.edits else ROWS[1]


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
