"""Several steerings of the same sites at once: every prompt once a steering, one below the other in the batch.

Strengths of a method, random directions and refits differ in what they add and in nothing else. Batches of a few prompts
cost mostly what a call costs, so they share the calls. What each steering does to a prompt stays what it does alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.steering import Delta, Edit, Steering
from helpers.steering_prompt import Prompt, joined, some
from helpers.steering_resume import Part

ROWS = 384  # of a batch, up to which steerings are put together


def fitting(steerings: Sequence[Steering], n_prompts: int, rows: int = ROWS) -> list[list[Steering]]:
    """The steerings in their order, in groups that may share a batch of this many prompts."""
    size = max(1, rows // max(1, n_prompts))
    groups: list[list[Steering]] = []
    for one in steerings:
        if groups and len(groups[-1]) < size and _sites(groups[-1][0]) == _sites(one):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _sites(steering: Steering) -> tuple[object, ...]:
    edits = tuple((edit.layer, edit.part, edit.where) for edit in steering.edits)
    return edits, tuple(sorted(read.name for read in steering.reads))


def stacked(steerings: Sequence[Steering], parts: Sequence[Part]) -> tuple[Steering, Part, list[slice]]:
    """One steering that does to each part what its own does, on all parts together; and where each of them lies."""
    ends = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
    places = [slice(*ends) for ends in pairwise(ends)]
    if len(parts) == 1:
        return steerings[0], parts[0], places
    prompts = [_scaled(part.prompt, one.strength) for one, part in zip(steerings, parts, strict=True)]
    whole = Part(torch.cat([part.rows for part in parts]), parts[0].run, joined(prompts))
    edits = tuple(
        Edit(sites[0].layer, sites[0].part, partial(_each, [edit.delta for edit in sites], places), sites[0].where)
        for sites in zip(*(one.edits for one in steerings), strict=True)
    )
    return Steering(" | ".join(one.name for one in steerings), edits), whole, places


def _scaled(prompt: Prompt, strength: float) -> Prompt:
    """The prompt with its gate times the strength, which differs between steerings."""
    return Prompt(prompt.ids, prompt.real, prompt.last, prompt.read, [strength * prompt.opened[0]])


def _each(
    deltas: Sequence[Delta], places: Sequence[slice], x: Float[Tensor, "row pos width"], prompt: Prompt
) -> Float[Tensor, "row #pos width"]:
    made = [delta(x[at], some(prompt, at)).to(x) for delta, at in zip(deltas, places, strict=True)]
    width = max(one.shape[1] for one in made)
    return torch.cat([one.expand(at.stop - at.start, width, -1) for one, at in zip(made, places, strict=True)])
