"""The L2 budget of a steering, so that methods are compared at the same size of intervention.

A prompt's added norm is the square root of the sum, over steered sites and prompt tokens, of the squared norm of what was
added to the residual stream. The budget is its root mean square over prompts. A gate that stays shut adds nothing, so an
adaptive method may spend the same budget on fewer prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers import defence_outcomes, steering_stack
from helpers import steering_resume as resume
from helpers.errors import InputError
from helpers.steering import Steering, applied
from helpers.steering_prompt import tail
from helpers.subject import Subject

TOLERANCE = 0.01  # relative, of a met budget
TRIES = 12


def added_norms(subject: Subject, steering: Steering, texts: Sequence[str]) -> Float[np.ndarray, "prompt"]:
    """The added norm of each prompt, in units of the residual stream, measured while the prompts are read."""
    made: np.ndarray = added_norms_each(subject, [steering], texts)[0]
    return made


@torch.no_grad()
def added_norms_each(
    subject: Subject, steered: Sequence[Steering], texts: Sequence[str]
) -> Float[np.ndarray, "steering prompt"]:
    """`added_norms` under each of the steerings; together where they have the same sites."""
    norms = np.zeros((len(steered), len(texts)))
    for places, ids in defence_outcomes.buckets(subject, texts, system=defence_outcomes.common_system(steered)):
        groups = steering_stack.fitting(steered, len(ids))
        squares = torch.cat([_squares(subject, group, ids) for group in groups])
        norms[:, places] = squares.sqrt().cpu().numpy()
    return norms


def _squares(
    subject: Subject, steered: Sequence[Steering], ids: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "steering prompt"]:
    found = torch.zeros(len(steered), len(ids), dtype=torch.float64, device=ids.device)
    run = resume.plain_run(subject, ids)
    if run is None:
        for squares, one in zip(found, steered, strict=True):
            with applied(subject, one) as record:
                subject.model.base_model(ids, use_cache=False)
            squares += record.squares[0] if record.squares else 0.0
        return found
    parts = {i: part for i, one in enumerate(steered) if (part := resume.steered_part(one, run)) is not None}
    if parts and all(edit.blind and edit.part != "neurons" for edit in steered[0].edits):
        for i, part in parts.items():
            found[i, part.rows] = _blind_squares(steered[i], part)
    elif parts:
        steering, whole, places = steering_stack.stacked([steered[i] for i in parts], list(parts.values()))
        with applied(subject, steering, whole.prompt) as record:
            resume.climb(subject, steering, whole, top=max(edit.layer for edit in steering.edits))
        for (i, part), at in zip(parts.items(), places, strict=True):
            found[i, part.rows] = record.squares[0][at]
    return found


def _blind_squares(steering: Steering, part: resume.Part) -> Float[Tensor, "row"]:
    """The squared norm of edits that add the same whatever the activations are: nothing has to be computed for it."""
    prompt, total = part.prompt, torch.zeros(len(part.rows), dtype=torch.float64, device=part.rows.device)
    for edit in steering.edits:
        x = part.of(part.run.resid_post[edit.layer][:, -1:])
        added = steering.strength * prompt.opened[0].to(x)[:, None, None] * edit.delta(x, tail(prompt, 1)).to(x)
        n_tokens = 1 if edit.where == "last" else prompt.ids.shape[1]
        total += n_tokens * added.double().square().sum((1, 2))
    return total


@torch.no_grad()
def gate_values(subject: Subject, steering: Steering, texts: Sequence[str]) -> Float[np.ndarray, "prompt"]:
    """How far the gate opens for each prompt: 1 where there is no gate, 0 where nothing is steered."""
    values = np.zeros(len(texts))
    for places, ids in defence_outcomes.buckets(subject, texts):
        run = resume.plain_run(subject, ids)
        if run is not None and steering.edits and steering.strength:
            values[places] = resume.opened(steering, run).opened[0].cpu().numpy()
            continue
        with applied(subject, steering) as record:
            subject.model.base_model(ids, use_cache=False)
        if record.gates:
            values[places] = record.gates[0].cpu().numpy()
    return values


def rms(norms: Float[np.ndarray, "prompt"]) -> float:
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
