"""The L2 budget of a steering, so that methods are compared at the same size of intervention.

A prompt's added norm is the square root of the sum, over steered sites and prompt tokens, of the squared norm of what was
added to the residual stream. The budget is its root mean square over prompts. A gate that stays shut adds nothing, so an
adaptive method may spend the same budget on fewer prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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

    Edits that read what lower edits changed do not scale exactly with the strength, so it is found by iteration.

    Raises:
        InputError: it adds nothing to these prompts, or the strength does not settle.
    """
    if budget <= 0:
        raise InputError(f"the budget is {budget}; expected a positive norm (leave the model unsteered otherwise)")
    current = steering if steering.strength else replace(steering, strength=1.0)
    for _ in range(TRIES):
        spent = rms(added_norms(subject, current, texts))
        if not np.isfinite(spent) or spent == 0:
            raise InputError(
                f"{steering.name} adds {spent} to these {len(texts)} prompts at strength {current.strength:.3g}: no strength "
                "meets a budget; is its gate shut, or has every prompt what it steers towards?"
            )
        if abs(spent / budget - 1) <= TOLERANCE:
            return current
        current = replace(current, strength=current.strength * float(np.clip(budget / spent, 0.2, 5.0)))
    raise InputError(f"{steering.name}: the strength for a budget of {budget:.3g} did not settle; try a smaller budget")
