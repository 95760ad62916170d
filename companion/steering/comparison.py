"""The arms of the comparison: published methods, the late-layer variants, and the controls, all from one fit.

Which arm carries the verdict on C6 was fixed before any result: `DECISIVE`, an adaptive method in the style of AdaSteer
whose vectors are added at late layers only. AdaSteer as published adds them at every layer, so this is a method of its own.

Methods side by side on equal terms: at equal budgets, with their gates exchanged, and what they cost.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import pandas as pd

from companion.base.errors import InputError
from companion.base.thresholds import EARLY, LATE, depth
from companion.generation import decode
from companion.generation.decode import uniforms
from companion.generation.hooks import Edit, Steering, applied
from companion.mediation.study import Study
from companion.neurons import single
from companion.stats import clusters
from companion.stats.rates import mean_change
from companion.steering import adasteer, budget, controls, experiment, extraction, methods
from companion.steering.budget import EvaluationPrompts
from companion.steering.experiment import PLAIN, SteeringExperiment
from companion.steering.extraction import Fit

DECISIVE: Final = "AdaSteer-style, late layers"


N_NEURONS: Final = 32


ZONES: Final = ("early", "mid", "late")


def zones(n_layers: int) -> dict[str, list[int]]:
    """Layers by relative depth: early < 1/3, late > 2/3, the others mid.

    >>> zones(6)
    {'early': [0, 1], 'mid': [2, 3], 'late': [4, 5]}
    """
    at = depth(np.arange(n_layers), n_layers)
    masks = {"early": at < EARLY, "mid": (at >= EARLY) & (at <= LATE), "late": at > LATE}
    return {name: [int(layer) for layer in np.flatnonzero(mask)] for name, mask in masks.items()}


def top_neurons(study: Study, k: int = N_NEURONS) -> dict[int, list[int]]:
    """The last-layer neurons with the largest mean indirect effect in the direction of TE, on the discover pairs of T2."""
    last = study.subject.n_layers - 1
    discover = tuple(p for p in study.of("T2") if p.pair.split == "discover")
    columns = single.all_neurons(study.subject, [last])
    effects, _ = single.measure_chosen(replace(study, pairs=discover), "T2", columns)
    toward = effects.nie.mean(0) * np.sign(effects.pairs.te.mean())
    return {last: sorted(int(i) for i in np.argsort(-toward, kind="stable")[:k])}


def builders(n_layers: int, neurons: Mapping[int, Sequence[int]] | None) -> dict[str, Callable[[Fit], Steering]]:
    """Every arm by its name, as a function of a fit."""
    late = zones(n_layers)["late"]
    made: dict[str, Callable[[Fit], Steering]] = {
        "prompting": methods.prompting,
        "fixed rejection, all layers": methods.fixed,
        "fixed rejection, late layers": partial(methods.fixed, layers=late),
        "ablation of harmfulness": methods.ablation,
        "CAST (threshold gate)": methods.cast,
        "AlphaSteer (null space)": methods.alphasteer,
        "AdaSteer, as published": adasteer.adasteer,
        "AdaSteer, as released": adasteer.adasteer_released,
        DECISIVE: partial(adasteer.adasteer, layers=late),
        "targeted, late MLPs": partial(methods.layer_form, layers=late),
    }
    if neurons:
        made["targeted, last-layer neurons"] = partial(methods.neuron_form, neurons=neurons)
    return made


def arms(
    fit: Fit, made: Mapping[str, Callable[[Fit], Steering]], only: Sequence[str] = ()
) -> tuple[dict[str, Steering], dict[str, str]]:
    """The arms that this fit defines, and for each of the others the sentence that says why not."""
    defined: dict[str, Steering] = {}
    refused: dict[str, str] = {}
    for name in only or made:
        try:
            defined[name] = replace(made[name](fit), name=name)
        except InputError as error:
            refused[name] = str(error)
    return defined, refused


def tuned(
    lab: SteeringExperiment,
    steered: Mapping[str, Steering],
    on: EvaluationPrompts,
    strengths: Sequence[float] = budget.STRENGTHS,
) -> tuple[dict[str, Steering], pd.DataFrame]:
    """Every arm at the strength chosen on the validate bench, and the curves that it was chosen from."""
    made = [budget.curve(lab, one, on, _steps(one, strengths)) for one in steered.values()]
    empty = pd.DataFrame(columns=list(budget.COLUMNS))
    curves = pd.concat(made, ignore_index=True) if made else empty
    chosen = {name: budget.scaled(one, budget.choose(curves[curves.method == name])) for name, one in steered.items()}
    return chosen, curves


def _steps(steered: Steering, strengths: Sequence[float]) -> Sequence[float]:
    """A sentence in the system turn is there or not: it has one strength."""
    return strengths if steered.edits else (1.0,)


def transplanted(fit: Fit, strength: float = 1.0, *, layers: Sequence[int]) -> Steering:
    """The last layer's rejection vector added to the residual stream at other layers, at all prompt tokens."""
    vector = extraction.rejection(fit)[-1]
    edits = tuple(Edit(layer, "resid_post", methods.constant(vector), "prompt", blind=True) for layer in layers)
    return Steering("transplanted", edits, strength)


def rivals(lab: SteeringExperiment, fit: Fit, target: float, on: EvaluationPrompts) -> dict[str, Steering]:
    """The best early and the best middle steering with the same budget, chosen on the validate bench.

    Candidates are the decisive method fitted at those layers, a fixed rejection vector there, and the late layers' vector
    injected there: a rival must not lose because it was handed a poor direction.
    """
    found = {}
    groups = zones(lab.subject.n_layers)
    for zone in ("early", "mid"):
        made = {
            f"AdaSteer-style, {zone} layers": partial(adasteer.adasteer, layers=groups[zone]),
            f"fixed rejection, {zone} layers": partial(methods.fixed, layers=groups[zone]),
            f"late vector at {zone} layers": partial(transplanted, layers=groups[zone]),
        }
        candidates = []
        for one in arms(fit, made)[0].values():
            with suppress(InputError):  # it adds nothing at any strength: no rival
                candidates.append(budget.at_budget(lab, one, target, on))
        if candidates:
            left = [budget.harms(lab, [one], on)[0] for one in candidates]
            found[zone] = min(zip(left, candidates, strict=True), key=lambda item: (item[0], item[1].name))[1]
    return found


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


def gate_controls(
    lab: SteeringExperiment, fit: Fit, chosen: Mapping[str, Steering], names: Sequence[str]
) -> dict[str, Steering]:
    """Gated methods with two other gates, at the strength chosen for their own: one that opens as often but for any
    prompt, and one that knows what is harmful (an upper bound, not a defence).
    """
    harmful = lab.prompts.text[lab.prompts.kind == "harmful"].tolist()
    made: dict[str, Steering] = {}
    for name in names:
        one = chosen.get(name)
        if one is not None and one.gate is not None:
            shuffled = controls.shuffled_gate(fit, one.strength, steering=one)
            oracle = controls.oracle_gate(fit, one.strength, steering=one, harmful=harmful)
            made |= {f"{name}, {which} gate": two for which, two in (("shuffled", shuffled), ("oracle", oracle))}
    return {name: replace(one, name=name) for name, one in made.items()}


def equal_budgets(
    lab: SteeringExperiment, methods: Mapping[str, Steering], largest: float, spend: EvaluationPrompts, on: EvaluationPrompts, shares: Sequence[float] = SHARES,
    *, against: str,
) -> pd.DataFrame:  # fmt: skip
    """What methods do with the same L2 budget (met on `spend`), first token, on `on`: row, panel, group, x, estimate, low,
    high, strength, why, more, more_low, more_high.

    `x` is the budget; the largest is named by the caller. `row` says which layers a method steers, all or some. `more`:
    by how many points a method lies above the one named `against` at the same budget, on the same prompts. A budget
    that a method cannot spend has a row without numbers, whose `why` says so.
    """
    budgets = [share * largest for share in shares]
    met = {name: budget.at_budgets(lab, one, budgets, spend) for name, one in methods.items()}
    found = {}
    for name, made in met.items():
        steered = [one for one in made if not isinstance(one, str)]
        measured = iter(budget.by_prompt(lab, steered, on) if steered else [])
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
    made = mean_change(values, topic)
    return {prefix.rstrip("_") or "estimate": made.estimate, f"{prefix}low": made.low, f"{prefix}high": made.high}


def which_layers(lab: SteeringExperiment, steered: Steering) -> str:
    """Whether a method steers every layer of the model, for the two rows of figures in which all would not fit."""
    every = {edit.layer for edit in steered.edits} >= set(range(lab.subject.n_layers))
    return ROWS[0] if every or not steered.edits else ROWS[1]


def firing(lab: SteeringExperiment, steered: Steering, prompts: pd.DataFrame) -> dict[str, float]:
    """Share of the prompts of each kind for which a method's gate opens, with Wilson limits; empty without a gate."""
    if steered.gate is None:
        return {}
    is_open = budget.gate_values(lab.subject, steered, list(prompts.text)) > 0
    row: dict[str, float] = {}
    for kind in prompts.kind.unique():
        mine = is_open[(prompts.kind == kind).to_numpy()]
        low, high = clusters.wilson(int(mine.sum()), len(mine))
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
            low, high = clusters.wilson(hits, len(labels))
            row |= {name: 100 * hits / len(labels), f"{name}_low": 100 * low, f"{name}_high": 100 * high}
    return row


def costs(
    lab: SteeringExperiment, chosen: Mapping[str, Steering], prompts: pd.DataFrame, repeats: int = 2
) -> pd.Series:
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
            steps = experiment.STEPS[lab.exact]
            draws = uniforms(len(some), steps, lab.seed)
            on = partial(applied, lab.subject, one)
            decode.answers_at_once(lab.subject, list(some.text), steps, on, draws, system=one.system)
            best[name] = min(best[name], time.perf_counter() - start)
    return pd.Series(
        {name: value / best[PLAIN.name] for name, value in best.items()}, name="seconds, steered / unsteered"
    )
