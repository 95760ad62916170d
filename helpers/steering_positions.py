"""Where a prompt lies between two classes, on a scale that no model's units enter.

A position is the projection of an activation on a direction, scaled so that the centroid of harmful prompts that were
complied with is 0 and the other centroid is 1 (the released code of AdaSteer multiplies by 100). Affine maps of a layer's
activations that keep angles (shift, rotation, scale) leave positions unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from helpers.errors import InputError


@dataclass(frozen=True)
class Scale:
    """The line of positions: `origin` lies at 0, `origin + direction` at 1."""

    origin: Float[np.ndarray, "width"]
    direction: Float[np.ndarray, "width"]


@dataclass(frozen=True)
class Affine:
    """A coefficient that is affine in the position and clipped: clip(slope * position + offset, low, high)."""

    slope: float
    offset: float
    low: float
    high: float


def scale(zero: Float[np.ndarray, "width"], one: Float[np.ndarray, "width"]) -> Scale:
    """The line from the centroid at position 0 to the one at position 1."""
    if not np.square(one - zero).sum() > 0:
        raise InputError("two classes have the same mean, so there is no direction between them: are the labels right?")
    return Scale(zero, one - zero)


def position(line: Scale, x: Float[np.ndarray, "*prompt width"]) -> Float[np.ndarray, "*prompt"]:
    """Positions of activations.

    >>> position(scale(np.zeros(2), np.array([2.0, 0.0])), np.array([[0.0, 5.0], [2.0, 0.0], [3.0, 1.0]]))
    array([0. , 1. , 1.5])
    """
    made: np.ndarray = (x - line.origin) @ line.direction / np.square(line.direction).sum()
    return made


def position_of(line: Scale, x: Float[Tensor, "prompt width"]) -> Float[Tensor, "prompt"]:
    """`position` on the model's device, in float64."""
    origin, direction = (
        torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in (line.origin, line.direction)
    )
    return (x.double() - origin) @ direction / direction.square().sum()


def coefficient(rule: Affine, at: Float[Tensor, "prompt"]) -> Float[Tensor, "prompt"]:
    """The clipped coefficient at these positions."""
    return (rule.slope * at + rule.offset).clamp(rule.low, rule.high)


def logistic(
    features: Float[np.ndarray, "prompt feature"], outcome: Bool[np.ndarray, "prompt"]
) -> tuple[Float[np.ndarray, "feature"], float] | None:
    """Weights and intercept of a logistic regression (ridge of strength 1 on standardised features).

    The ridge keeps the weights finite where the classes separate. None where only one outcome occurs.
    """
    if outcome.all() or not outcome.any():
        return None
    mean, spread = features.mean(0), features.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    model = LogisticRegression(C=1.0, max_iter=1000).fit((features - mean) / spread, outcome)
    weights = model.coef_[0] / spread
    return weights, float(model.intercept_[0] - mean @ weights)
