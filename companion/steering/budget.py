"""The L2 budget of a steering, so that methods are compared at the same size of intervention.

A prompt's added norm is the square root of the sum, over steered sites and prompt tokens, of the squared norm of what was
added to the residual stream. The budget is its root mean square over prompts. A gate that stays shut adds nothing, so an
adaptive method may spend the same budget on fewer prompts.

Trade-off curves over strengths, and the strength that a method would be used at, chosen on validate.

Curves use the first answer token only (a prompt is one forward pass); answers are sampled at the chosen strength alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.base.errors import InputError
from companion.base.thresholds import MARGINS
from companion.generation import forward, outcomes
from companion.generation.decode import Answers
from companion.generation.hooks import Steering, applied, tail
from companion.model.architecture import Subject
from companion.stats import rates
from companion.stats.rates import Change
from companion.steering import experiment
from companion.steering.experiment import N_CURVE, N_PRICE, PLAIN, SteeringExperiment

TOLERANCE = 0.01  # relative, of a met budget


TRIES = 12


def added_norms(subject: Subject, steering: Steering, texts: Sequence[str]) -> Float[np.ndarray, prompt]:
    """The added norm of each prompt, in units of the residual stream, measured while the prompts are read."""
    made: np.ndarray = added_norms_each(subject, [steering], texts)[0]
    return made


@torch.no_grad()
def added_norms_each(
    subject: Subject, steered: Sequence[Steering], texts: Sequence[str]
) -> Float[np.ndarray, "steering prompt"]:
    """`added_norms` under each of the steerings; together where they have the same sites."""
    norms = np.zeros((len(steered), len(texts)))
    for places, ids in forward.buckets(subject, texts, system=outcomes.common_system(steered)):
        groups = forward.fitting(steered, len(ids))
        squares = torch.cat([_squares(subject, group, ids) for group in groups])
        norms[:, places] = squares.sqrt().cpu().numpy()
    return norms


def _squares(
    subject: Subject, steered: Sequence[Steering], ids: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "steering prompt"]:
    found = torch.zeros(len(steered), len(ids), dtype=torch.float64, device=ids.device)
    run = forward.plain_run(subject, ids)
    if run is None:
        for squares, one in zip(found, steered, strict=True):
            with applied(subject, one) as record:
                subject.model.base_model(ids, use_cache=False)
            squares += record.squares[0] if record.squares else 0.0
        return found
    parts = {i: part for i, one in enumerate(steered) if (part := forward.steered_part(one, run)) is not None}
    if parts and all(edit.blind and edit.part != "neurons" for edit in steered[0].edits):
        for i, part in parts.items():
            found[i, part.rows] = _blind_squares(steered[i], part)
    elif parts:
        steering, whole, places = forward.stacked([steered[i] for i in parts], list(parts.values()))
        with applied(subject, steering, whole.prompt) as record:
            forward.forward_from_layer(subject, steering, whole, top=max(edit.layer for edit in steering.edits))
        for (i, part), at in zip(parts.items(), places, strict=True):
            found[i, part.rows] = record.squares[0][at]
    return found


def _blind_squares(steering: Steering, part: forward.BatchRows) -> Float[Tensor, row]:
    """The squared norm of edits that add the same whatever the activations are: nothing has to be computed for it."""
    prompt, total = part.prompt, torch.zeros(len(part.rows), dtype=torch.float64, device=part.rows.device)
    for edit in steering.edits:
        x = part.of(part.run.resid_post[edit.layer][:, -1:])
        added = steering.strength * prompt.opened[0].to(x)[:, None, None] * edit.delta(x, tail(prompt, 1)).to(x)
        n_tokens = 1 if edit.where == "last" else prompt.ids.shape[1]
        total += n_tokens * added.double().square().sum((1, 2))
    return total


@torch.no_grad()
def gate_values(subject: Subject, steering: Steering, texts: Sequence[str]) -> Float[np.ndarray, prompt]:
    """How far the gate opens for each prompt: 1 where there is no gate, 0 where nothing is steered."""
    values = np.zeros(len(texts))
    for places, ids in forward.buckets(subject, texts):
        run = forward.plain_run(subject, ids)
        if run is not None and steering.edits and steering.strength:
            values[places] = forward.opened(steering, run).opened[0].cpu().numpy()
            continue
        with applied(subject, steering) as record:
            subject.model.base_model(ids, use_cache=False)
        if record.gates:
            values[places] = record.gates[0].cpu().numpy()
    return values


def rms(norms: Float[np.ndarray, prompt]) -> float:
    """Root mean square over prompts.

    >>> rms(np.array([3.0, 4.0, 0.0, 0.0]))
    2.5
    """
    return float(np.sqrt(np.mean(np.square(norms))))


def to_budget(subject: Subject, steering: Steering, texts: Sequence[str], budget: float) -> Steering:
    """The steering with the strength at which its budget on these prompts is met to 1 %.

    Raises:
        InputError: it adds nothing to these prompts, or the strength does not settle.
    """
    (found,) = to_budgets(subject, steering, texts, [budget])
    if isinstance(found, str):
        raise InputError(found)
    return found


def to_budgets(
    subject: Subject, steering: Steering, texts: Sequence[str], budgets: Sequence[float]
) -> list[Steering | str]:
    """`to_budget` for several budgets at once, or for each that cannot be met the sentence that says why.

    Edits that read what lower edits changed do not scale exactly with the strength, so it is found by iteration. All
    strengths of a round share their passes, and what a round has measured serves every budget: the next strength lies on
    the straight line, in logarithms, between the two measured ones around a budget.
    """
    if bad := [budget for budget in budgets if budget <= 0]:
        raise InputError(f"the budget is {bad[0]}; expected a positive norm (leave the model unsteered otherwise)")
    found: dict[int, Steering | str] = {}
    spent: dict[float, float] = {}
    asked = [steering.strength or 1.0]
    for _ in range(TRIES + 1):
        norms = added_norms_each(subject, [replace(steering, strength=one) for one in asked], texts)
        spent |= {one: rms(row) for one, row in zip(asked, norms, strict=True)}
        if bad := [one for one in asked if not np.isfinite(spent[one]) or spent[one] == 0]:
            nothing = (
                f"{steering.name} adds {spent[bad[0]]} to these {len(texts)} prompts at strength {bad[0]:.3g}: no strength "
                "meets a budget; is its gate shut, or has every prompt what it steers towards?"
            )
            return [found.get(i, nothing) for i in range(len(budgets))]
        for i, budget in enumerate(budgets):
            near = min(spent, key=lambda one: abs(spent[one] / budget - 1))
            if i not in found and abs(spent[near] / budget - 1) <= TOLERANCE:
                found[i] = replace(steering, strength=near)
        asked = list(dict.fromkeys(_next(spent, one) for i, one in enumerate(budgets) if i not in found))
        if not asked:
            break
    return [found.get(i, _unsettled(steering, budget)) for i, budget in enumerate(budgets)]


def _unsettled(steering: Steering, budget: float) -> str:
    return f"{steering.name}: the strength for a budget of {budget:.3g} did not settle; try a smaller budget"


def _next(spent: Mapping[float, float], budget: float) -> float:
    """The next strength to try for a budget: between measured ones, or from the nearest in proportion, at most fivefold."""
    at = sorted(spent)
    for low, high in pairwise(at):
        if min(spent[low], spent[high]) < budget < max(spent[low], spent[high]):
            x, y = np.log([low, high]), np.log([spent[low], spent[high]])
            return float(np.exp(x[0] + (np.log(budget) - y[0]) * (x[1] - x[0]) / (y[1] - y[0])))
    near = min(at, key=lambda one: abs(np.log(spent[one] / budget)))
    return near * float(np.clip(budget / spent[near], 0.2, 5.0))


STRENGTHS: Final = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


COLUMNS: Final = ("method", "strength", "budget", "measure", "estimate", "low", "high")


@dataclass(frozen=True)
class EvaluationPrompts:
    """The prompts of one split that curves are measured on, and the plain model's greedy answers to the harmless ones."""

    harmful: pd.DataFrame
    others: pd.DataFrame
    free: pd.DataFrame
    own: Answers


def evaluation_prompts(lab: SteeringExperiment, split: str, n: int = N_CURVE) -> EvaluationPrompts:
    """`n` wrapped harmful prompts (or all there are), as many borderline and harmless ones together, and a few harmless
    ones for the divergence.
    """
    harmful = experiment.select(lab, split, "harmful", wrapped=True, n=n)
    others = pd.concat([experiment.select(lab, split, kind, n=n // 2) for kind in ("borderline", "harmless")])
    free = experiment.select(lab, split, "harmless", n=N_PRICE)
    return EvaluationPrompts(harmful, others, free, experiment.answer(lab, PLAIN, free, greedy=True))


def scaled(steered: Steering, factor: float) -> Steering:
    """The same method, so many times as strong."""
    return replace(steered, strength=factor * steered.strength)


def budget(lab: SteeringExperiment, steered: Steering, on: EvaluationPrompts) -> float:
    """The L2 budget: root mean square, over harmful and as many other prompts, of the total added norm."""
    return budgets(lab, [steered], on)[0]


def budgets(lab: SteeringExperiment, steered: Sequence[Steering], on: EvaluationPrompts) -> list[float]:
    """`budget` of each of the steerings."""
    return [rms(norms) for norms in added_norms_each(lab.subject, steered, _mixed(on))]


def at_budget(lab: SteeringExperiment, steered: Steering, target: float, on: EvaluationPrompts) -> Steering:
    """The method at the strength at which it spends the target; `InputError` where it cannot."""
    return to_budget(lab.subject, steered, _mixed(on), target)


def at_budgets(
    lab: SteeringExperiment, steered: Steering, targets: Sequence[float], on: EvaluationPrompts
) -> list[Steering | str]:
    """`at_budget` for several targets at once, or the sentence that says why one cannot be met."""
    return to_budgets(lab.subject, steered, _mixed(on), targets)


def _mixed(on: EvaluationPrompts) -> list[str]:
    n = min(len(on.harmful), len(on.others), 60)
    return [*on.harmful.text.iloc[:n], *on.others.text.iloc[np.linspace(0, len(on.others) - 1, n).astype(int)]]


def curve(
    lab: SteeringExperiment, steered: Steering, on: EvaluationPrompts, strengths: Sequence[float] = STRENGTHS
) -> pd.DataFrame:
    """A row a strength and measure, with intervals over topics; a strength is a multiple of the method's own."""
    return points(lab, steered.name, [scaled(steered, strength) for strength in strengths], strengths, on)


def points(
    lab: SteeringExperiment, name: str, steered: Sequence[Steering], at: Sequence[float], on: EvaluationPrompts
) -> pd.DataFrame:
    """The rows of one curve of this name: those of each steering, placed at its strength (or number)."""
    rows: list[tuple[object, ...]] = []
    known = zip(at, budgets(lab, steered, on), measures(lab, steered, on), strict=True) if steered else ()
    for strength, spent, found in known:
        for measure, change in found.items():
            rows.append((name, strength, spent, measure, change.estimate, change.low, change.high))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def measures(lab: SteeringExperiment, steered: Sequence[Steering], on: EvaluationPrompts) -> list[dict[str, Change]]:
    """What each steering does on the first token, and its price.

    harm: mean of 1 - P(refusal) over the harmful prompts; over-refusal: rise of P(refusal) on the others, in points; KL:
    nats a token on the model's own answers.
    """
    prices = outcomes.price_each(lab.subject, on.free.text, on.own, steered)
    return [
        {name: rates.mean_change(values, topic) for name, (values, topic) in left.items()}
        | {"KL": rates.mean_change(price.kl.to_numpy(), on.free.topic.to_numpy())}
        for left, price in zip(by_prompt(lab, steered, on), prices, strict=True)
    ]


def by_prompt(
    lab: SteeringExperiment, steered: Sequence[Steering], on: EvaluationPrompts
) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """What `measures` averages on the first token under each steering: values and topics [prompt] of harm and over-refusal."""
    n, made = len(on.harmful), []
    for refusing in _refusing(lab, steered, pd.concat([on.harmful, on.others])):
        over = 100 * (refusing[n:] - on.others.p_refuse.to_numpy())
        harm = (1 - refusing[:n], on.harmful.topic.to_numpy())
        made.append({"harm": harm, "over-refusal": (over, on.others.topic.to_numpy())})
    return made


def harms(lab: SteeringExperiment, steered: Sequence[Steering], on: EvaluationPrompts) -> list[float]:
    """The mean of 1 - P(refusal) over the harmful prompts alone, under each steering."""
    return [float((1 - refusing).mean()) for refusing in _refusing(lab, steered, on.harmful)]


def _refusing(
    lab: SteeringExperiment, steered: Sequence[Steering], prompts: pd.DataFrame
) -> list[Float[np.ndarray, prompt]]:
    found = outcomes.log_odds_each(lab.subject, prompts.text, lab.openers, steered)
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
