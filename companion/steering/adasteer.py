"""AdaSteer (Zhao et al., arXiv 2504.09466): its coefficients, the two laws that they follow, and how sure these laws are.

Positions are shares: 0 at the mean of the harmful prompts that the model complied with, 1 at the mean of those it refused
(`pos_R`) or of the benign ones it answered (`pos_H`), read at the last token of an early-middle layer, in an unsteered pass.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from typing import Final, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.special import logit
from torch import Tensor

from companion.base.device import to_host
from companion.base.errors import InputError
from companion.base.thresholds import LINE, depth
from companion.generation import outcomes
from companion.generation.hooks import Delta, Edit, Prompt, Read, Steering
from companion.stats.rates import mean_change
from companion.steering import methods
from companion.steering.extraction import Fit
from companion.steering.methods import Scale

# Coefficients tried on validate, summed over the steered layers, since each adds its own; the largest is the clip.
GRID: Final = (0.0, 0.25, 0.5, 1.0, 2.0)
SURE: Final = 0.95  # wanted probability of refusing a harmful prompt, and of answering another
N_FIT: Final = 60  # prompts of a kind on which coefficients are tried
DECISION: Final = (0.2, 0.5)  # relative depth of decision layers
ROUNDING: Final = 1e-4  # of the activations' norm: centroids that differ by less differ by rounding
BINS: Final = 5  # of the positions in the figure of the laws
REDRAWS: Final = 200  # of topics, for the intervals of the laws
PANELS: Final = ("needed along v_R", "tolerated along v_H")
Rows: TypeAlias = np.ndarray | slice  # some prompts
At: TypeAlias = Float[np.ndarray, "prompt"]  # positions
Outcomes: TypeAlias = Bool[np.ndarray, "tried prompt"]
Steps: TypeAlias = Float[np.ndarray, "tried"]  # coefficients


@dataclass(frozen=True)
class Affine:
    """A coefficient that is affine in the position and clipped."""

    slope: float
    offset: float
    low: float
    high: float

    def __call__(self, at: Float[Tensor, "prompt"]) -> Float[Tensor, "prompt"]:
        """clip(slope * position + offset, low, high)."""
        return (self.slope * at + self.offset).clamp(self.low, self.high)


@dataclass(frozen=True)
class Law:
    """A fitted coefficient: where its position is read, on which line, and the affine rule.

    The paper predicts its slope's sign, negative for rejection and positive for harmfulness; it is reported, not imposed.
    """

    layer: int
    line: Scale
    rule: Affine


# The constants in the authors' code for Llama-3.1, with positions as shares instead of hundredths and in the paper's signs: the
# code's vectors and coefficients both have the opposite ones.
RELEASED: Final = {"r": Affine(-2.0, -1.2, 0.08, 0.22), "c": Affine(5.0, 0.75, -math.inf, 0.75)}
RELEASED_LAYERS: Final = 32  # of Llama-3.1


@dataclass(frozen=True)
class Tried:
    """P(refusal) of validate prompts under each coefficient that was tried, from which both laws are fitted.

    `needs` is that of harmful prompts along v_R; `harmful` and `other` are those along v_H, with v_R's law in place. `steps` are
    the coefficients of a layer, `places` rows of the fit.
    """

    steps: Steps
    places: tuple[np.ndarray, np.ndarray]
    pos_r: Float[np.ndarray, "harmful"]
    pos_h: tuple[Float[np.ndarray, "harmful"], Float[np.ndarray, "other"]]
    needs: Float[np.ndarray, "tried harmful"]
    harmful: Float[np.ndarray, "tried harmful"]
    other: Float[np.ndarray, "tried other"]


def adasteer(fit: Fit, *, layers: Collection[int] | None = None, laws: tuple[Law, Law] | None = None) -> Steering:
    """h <- h + lambda_r(pos_R) v_R + lambda_c(pos_H) v_H as published, with coefficients from `fit_laws` or given `laws`.

    Vectors are added at these layers (default: all) to all tokens of the prompt and to none of the answer.
    """
    chosen = methods.checked_layers(fit, layers)
    rejection, harmfulness = laws or laws_of(fit, tuple(chosen))[0]
    vectors = {"r": fit.direction("rejection"), "c": fit.direction("harmfulness")}
    return _adaptive("adasteer", chosen, {"r": rejection, "c": harmfulness}, vectors)


def adasteer_released(fit: Fit, *, layers: Collection[int] | None = None) -> Steering:
    """As the authors' code does it: h <- h + lambda_r v_R + lambda_c (projection of v_H on v_R), with typed coefficients.

    The second vector is a projection on the first, so one direction is left. The constants (`RELEASED`) are for 32 layers, each
    of which adds its share, so they are multiplied by 32 / (number of layers).
    """
    chosen = methods.checked_layers(fit, layers)
    v, h = fit.direction("rejection"), fit.direction("harmfulness")
    length = (v * v).sum(-1)
    share = (h * v).sum(-1) / np.where(length > 0, length, 1.0)  # a layer without v_R has no projection on it
    size = RELEASED_LAYERS / fit.subject.n_layers
    vectors = {"r": size * v, "c": size * share[:, None] * v}
    laws = {key: Law(*decision_line(fit, name), RELEASED[key]) for key, name in (("r", "refused"), ("c", "benign"))}
    return _adaptive("adasteer_released", chosen, laws, vectors)


def decision_line(fit: Fit, one: str) -> tuple[int, Scale]:
    """The decision layer and its line from the complied centroid (0) to that of class `one` (1).

    It is the layer between relative depths 0.2 and 0.5 at which the two classes' centroids lie furthest apart on discover, in
    units of the spread along the line between them. A layer whose centroids differ by rounding alone is no candidate; if none
    is left there, it is the earliest one above.
    """
    fit.need("complied", one)
    masks = [fit.mask("discover", name) for name in ("complied", one)]
    n = fit.subject.n_layers
    found = {}
    for layer in range(n):
        zero, unit = (fit.last["resid_post"][mask, layer].astype(float) for mask in masks)
        gap, size = np.linalg.norm(unit.mean(0) - zero.mean(0)), np.linalg.norm(zero, axis=-1).mean()
        if gap > ROUNDING * size:
            line = Scale.between(zero.mean(0), unit.mean(0))
            spread = np.sqrt(np.mean([line.position(x).var() for x in (zero, unit)]))
            found[layer] = (1 / max(spread, 1e-12), line)
    wanted = [at for at in found if DECISION[0] <= depth(at, n) <= DECISION[1]]
    wanted = wanted or [at for at in found if depth(at, n) > DECISION[1]][:1]
    if not wanted:
        why = "harmful prompts that were complied with look like the others at every layer: no decision layer"
        raise InputError(why)
    best = max(wanted, key=lambda layer: found[layer][0])
    return best, found[best][1]


def laws_of(fit: Fit, layers: tuple[int, ...]) -> tuple[tuple[Law, Law], Tried]:
    """Slopes and offsets of both coefficients, by logistic regression of "refused after steering" on validate, and the tries.

    lambda_r is the coefficient that a harmful prompt *needs*: at which the regression on position and coefficient gives it
    0.95 of being refused. With that in place, lambda_c is the largest coefficient that a prompt *tolerates*, being still treated
    right with 0.95: a harmful one at position 0 refused, a benign one at position 1 answered. Both are clipped to [0, largest
    coefficient tried]. They are fitted once for a fit, which remembers them.

    Raises:
        InputError: a class or split is missing, or adding v_R makes refusals no likelier on this model.
    """
    if ("laws", layers) not in fit.memo:
        fit.memo["laws", layers] = _fit_laws(fit, layers)
    return fit.memo["laws", layers]


def _fit_laws(fit: Fit, layers: tuple[int, ...]) -> tuple[tuple[Law, Law], Tried]:
    validate = fit.mask("validate")
    kinds = [np.flatnonzero(validate & (fit.harmful == wanted)) for wanted in (True, False)]
    if not all(map(len, kinds)):
        raise InputError("AdaSteer's coefficients need harmful and other prompts in the split validate: supply both")
    # Prompts of one kind stand together in a prompt set, so those that are tried are evenly spaced.
    spaced = [np.linspace(0, len(places) - 1, min(N_FIT, len(places))) for places in kinds]
    harm, other = (places[np.unique(at.round().astype(int))] for places, at in zip(kinds, spaced, strict=True))
    (at_r, line_r), (at_h, line_h) = decision_line(fit, "refused"), decision_line(fit, "benign")
    pos_r = line_r.position(fit.last["resid_post"][:, at_r].astype(float))
    pos_h = line_h.position(fit.last["resid_post"][:, at_h].astype(float))
    steps = np.array(GRID) / len(layers)  # a coefficient for each layer

    def steered(law_r: Law | None) -> list[Steering]:
        """Both vectors with one coefficient constant at each step: v_R's, or v_H's once that one is fitted."""
        flat = [Affine(0.0, c, 0.0, c) for c in steps]
        zero = Law(at_h, line_h, flat[0])
        laws = [(law_r, Law(at_h, line_h, c)) if law_r else (Law(at_r, line_r, c), zero) for c in flat]
        return [adasteer(fit, layers=layers, laws=one) for one in laws]

    needs = _p_refuse(fit, harm, steered(None))
    law_r = Law(at_r, line_r, _rejection_rule(pos_r[harm], needs > 0.5, steps))
    both = steered(law_r)
    kept = [_p_refuse(fit, places, both) for places in (harm, other)]
    tried = Tried(steps, (harm, other), pos_r[harm], (pos_h[harm], pos_h[other]), needs, *kept)
    return (law_r, Law(at_h, line_h, _harmfulness_rule(tried))), tried


def _p_refuse(fit: Fit, places: np.ndarray, steered: Sequence[Steering]) -> Float[np.ndarray, "tried prompt"]:
    texts = fit.prompts.text.to_numpy()[places].tolist()
    # Not the log-odds: a benign behaviour opens its answer with words that are in neither camp.
    found = outcomes.log_odds_each(fit.subject, texts, fit.openers, steered)
    return np.stack([np.asarray(one.p_refuse) for one in found])


def _response(at: At, outcome: Outcomes, steps: Steps) -> tuple[float, float, float]:
    """Logistic weights of the position and of the coefficient, and the intercept; zeros where only one outcome occurs."""
    table = np.column_stack([np.tile(at, len(steps)), np.repeat(steps, len(at))])
    weights, intercept = methods.logistic(table, outcome.ravel())
    return float(weights[0]), float(weights[1]), intercept


def _rejection_rule(at: At, refused: Outcomes, steps: Steps) -> Affine:
    if refused.all():
        return Affine(0.0, 0.0, 0.0, steps[-1])
    of_position, of_coefficient, intercept = _response(at, refused, steps)
    if of_coefficient <= 0:
        raise InputError(
            f"adding the rejection vector with up to {steps[-1]:.2g} of its length at each steered layer makes refusals no "
            "likelier on validate: its role is not rejection in this model; try other layers or check the class labels"
        )
    slope, offset = -of_position / of_coefficient, (float(logit(SURE)) - intercept) / of_coefficient
    return Affine(slope, offset, 0.0, steps[-1])


def _harmfulness_rule(tried: Tried, some: tuple[Rows, Rows] = (slice(None), slice(None))) -> Affine:
    """lambda_c between what harmful prompts tolerate at position 0 and the others at 1, of some of each kind."""
    (harm, other), (of_harm, of_other), steps = some, tried.pos_h, tried.steps
    at_harmful = _tolerated_at(0.0, of_harm[harm], tried.harmful[:, harm] > 0.5, steps)
    at_benign = _tolerated_at(1.0, of_other[other], tried.other[:, other] <= 0.5, steps)
    return Affine(at_benign - at_harmful, at_harmful, 0.0, steps[-1])


def _tolerated_at(where: float, at: At, right: Outcomes, steps: Steps) -> float:
    """The largest coefficient with which prompts at position `where` are treated right with 0.95; 0 where none keeps that."""
    if not right.any():
        return 0.0
    of_position, of_coefficient, intercept = _response(at, right, steps)
    if of_coefficient >= 0:  # it makes that no less likely
        return float(steps[-1])
    return float(np.clip((logit(SURE) - intercept - of_position * where) / of_coefficient, 0.0, steps[-1]))


def _adaptive(name: str, layers: Sequence[int], laws: dict[str, Law], vectors: dict[str, np.ndarray]) -> Steering:
    def total(added: dict[str, Delta], x: Float[Tensor, "prompt pos d"], prompt: Prompt) -> Float[Tensor, "prompt 1 d"]:
        made = x.new_zeros(len(x), 1, x.shape[-1])
        for key, law in laws.items():
            at = law.line.position_on_device(prompt.read[f"position {key}"])
            made = made + law.rule(at).to(x)[:, None, None] * added[key](x, prompt)
        return made

    edits = []
    for layer in layers:
        added = {key: methods.constant(vectors[key][layer]) for key in laws}
        edits.append(Edit(layer, "resid_post", partial(total, added), blind=True))
    return Steering(name, tuple(edits), reads=tuple(Read(f"position {key}", law.layer) for key, law in laws.items()))


def law_table(fit: Fit, layers: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both laws over the validate prompts that they were fitted on, for the figure; and their slopes with 95 % intervals.

    Coefficients are summed over the steered layers, in lengths of the direction. Points are fifths of the positions, with
    intervals over topics; the line's band and the slopes' intervals are from topics drawn with replacement.
    """
    laws, tried = laws_of(fit, tuple(layers))
    size, topics = len(layers), [fit.prompts.topic.to_numpy()[places] for places in tried.places]
    kinds = fit.prompts.kind.to_numpy()[tried.places[1]]
    asked = needed(-logit(tried.needs.clip(1e-12, 1 - 1e-12)), tried.steps) * size
    kept = [tolerated(right, tried.steps) * size for right in (tried.harmful > 0.5, tried.other <= 0.5)]
    tables = [_fifths(tried.pos_r, asked, topics[0], PANELS[0], "harmful"),
              _fifths(tried.pos_h[0], kept[0], topics[0], PANELS[1], "harmful")]  # fmt: skip
    for kind in np.unique(kinds):
        of = kinds == kind
        tables.append(_fifths(tried.pos_h[1][of], kept[1][of], topics[1][of], PANELS[1], str(kind)))
    slopes, positions = [], (tried.pos_r, np.concatenate(tried.pos_h))
    for panel, law, drawn, at in zip(PANELS, laws, _redrawn_rules(tried, topics), positions, strict=True):
        x = torch.linspace(float(at.min()), float(at.max()), 25, dtype=torch.float64)
        lines = np.stack([to_host(rule(x)) for rule in (law.rule, *drawn)]) * size
        low, high = np.quantile(lines, (0.025, 0.975), axis=0)
        line = {"panel": panel, "group": LINE, "x": to_host(x), "estimate": lines[0]}
        tables.append(pd.DataFrame(line | {"low": np.minimum(low, lines[0]), "high": np.maximum(high, lines[0])}))
        limits = np.quantile([rule.slope * size for rule in (law.rule, *drawn)], (0.025, 0.975))
        slopes.append((panel, law.layer, law.rule.slope * size, *limits, law.rule.offset * size))
    table = pd.concat([one for one in tables if len(one)], ignore_index=True)
    return table, pd.DataFrame(slopes, columns=["law", "read at layer", "slope", "low", "high", "at position 0"])


def _redrawn_rules(tried: Tried, topics: Sequence[np.ndarray]) -> tuple[list[Affine], list[Affine]]:
    """Both rules fitted anew on topics drawn with replacement; the first not in draws where v_R makes refusals no likelier."""
    rng, rules = np.random.default_rng(0), (list[Affine](), list[Affine]())
    groups = [[np.flatnonzero(own == topic) for topic in np.unique(own)] for own in topics]
    for _ in range(REDRAWS):
        harm, other = (np.concatenate([own[i] for i in rng.integers(len(own), size=len(own))]) for own in groups)
        with suppress(InputError):
            rules[0].append(_rejection_rule(tried.pos_r[harm], tried.needs[:, harm] > 0.5, tried.steps))
        rules[1].append(_harmfulness_rule(tried, (harm, other)))
    return rules


def needed(odds: Float[np.ndarray, "tried prompt"], grid: Steps) -> Float[np.ndarray, "prompt"]:
    """The smallest coefficient that makes the model refuse, between grid points by a straight line; NaN where none does."""
    refused, column = odds < 0, np.arange(odds.shape[1])
    first = refused.argmax(0)
    before = np.maximum(first - 1, 0)
    low, high = odds[before, column], odds[first, column]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(first == 0, 0.0, low / (low - high))
    return np.where(refused.any(0), grid[before] + share * (grid[first] - grid[before]), np.nan)


def tolerated(right: Outcomes, grid: Steps) -> Float[np.ndarray, "prompt"]:
    """The largest coefficient of the grid with which a prompt is treated right; NaN where it is with none."""
    return np.where(right.any(0), grid[len(grid) - 1 - right[::-1].argmax(0)], np.nan)


def _fifths(position: np.ndarray, coefficient: np.ndarray, topic: np.ndarray, panel: str, group: str) -> pd.DataFrame:
    """Mean coefficient over fifths of the position, with intervals over topics; prompts without one are left out."""
    table = pd.DataFrame({"position": position, "y": coefficient, "topic": topic}).dropna()
    rows = []
    if len(table) >= 2 * BINS:
        fifth = pd.qcut(table.position, BINS, labels=False, duplicates="drop")
        for _, part in table.groupby(fifth):
            if part.topic.nunique() > 1:
                change = mean_change(part.y.to_numpy(), part.topic.to_numpy())
                rows.append((panel, group, float(part.position.mean()), *astuple(change)[:3]))
    return pd.DataFrame(rows, columns=["panel", "group", "x", "estimate", "low", "high"])
