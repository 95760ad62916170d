"""AdaSteer (Zhao et al., arXiv 2504.09466): coefficients that follow a prompt's position, twice.

`adasteer` is the method as published: two directions, coefficients affine in two positions and clipped, fitted here on
validate. `adasteer_released` follows the published code, in which the second vector is the projection of the harmfulness
direction on the rejection direction, so that one direction is left, and the coefficients are typed in. Both add their
vectors at all layers to all tokens of the prompt and to none of the answer. Positions are read at one decision layer each,
at the last real token, in an unsteered pass: the paper's decision layers are early-middle, so this is not late steering.

The plane of rejection and harmfulness: where prompts lie, and how much steering each of them needs.

Positions are shares: 0 at the mean of the harmful prompts that the model complied with, 1 at the mean of those it refused
(rejection) or of the benign ones it answered (harmfulness).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats as st
from scipy.special import logit
from sklearn.metrics import roc_auc_score
from torch import Tensor

from companion.base.errors import InputError
from companion.base.thresholds import depth
from companion.generation import forward, outcomes
from companion.generation.hooks import Edit, Prompt, Read, Steering
from companion.model.activations import clean_run
from companion.stats import rates
from companion.steering import extraction, methods
from companion.steering.experiment import SteeringExperiment
from companion.steering.extraction import Fit

GRID = (0.0, 0.125, 0.25, 0.5, 1.0)  # coefficients tried on validate; the largest is the clip


REFUSED = 0.95  # wanted probability of refusing a harmful prompt, and of answering another


N_FIT = 60  # prompts of a kind on which coefficients are tried


DECISION = (0.2, 0.5)  # relative depth of decision layers


ROUNDING = 1e-4  # of the activations' norm: centroids that differ by less differ by rounding


RELEASED_SCALE = 100.0


RELEASED_REJECTION = methods.Affine(0.0025, -0.25, -0.25, 0.0)


RELEASED_HARMFULNESS = methods.Affine(0.0, 0.0, 0.0, 0.25)


@dataclass(frozen=True)
class Law:
    """A fitted coefficient: where its position is read, on which line, and the affine rule. The laws predict the sign of
    the slope: negative for rejection (R-law), positive for harmfulness (H-law); it is reported, not imposed.
    """

    layer: int
    line: methods.Scale
    rule: methods.Affine


def adasteer(
    fit: Fit, strength: float = 1.0, *, layers: Collection[int] | None = None, laws: tuple[Law, Law] | None = None
) -> Steering:
    """h <- h + strength (lambda_r(pos_R) v_R + lambda_c(pos_H) v_H) with coefficients from `fit_laws` or given `laws`."""
    chosen = methods.layers_of(fit, layers)
    rejection, harmfulness = laws or fit_laws(fit, layers=chosen)
    vectors = {"r": extraction.rejection(fit), "c": extraction.harmfulness(fit)}
    return _adaptive("adasteer", strength, chosen, {"r": rejection, "c": harmfulness}, vectors)


def decision_line(fit: Fit, one: str) -> tuple[int, methods.Scale]:
    """The decision layer and its line from the complied centroid (0) to that of class `one` (1).

    It is the layer between relative depths 0.2 and 0.5 at which the two classes' centroids lie furthest apart on discover
    in units of the spread along the line between them. Where nothing has arrived at the last token (the centroids differ by
    rounding alone) a position would be noise over noise: such a layer is no candidate, and if none is left it is the
    earliest layer above at which something has arrived.
    """
    extraction.need(fit, "complied", one)
    masks = [extraction.rows(fit, "discover", name) for name in ("complied", one)]
    n = fit.subject.n_layers
    found = {}
    for layer in range(n):
        zero, unit = (fit.last["resid_post"][mask, layer].astype(float) for mask in masks)
        gap, size = np.linalg.norm(unit.mean(0) - zero.mean(0)), np.linalg.norm(zero, axis=-1).mean()
        if gap > ROUNDING * size:
            line = methods.scale(zero.mean(0), unit.mean(0))
            spread = np.sqrt(np.mean([methods.position(line, x).var() for x in (zero, unit)]))
            found[layer] = (1 / max(spread, 1e-12), line)
    wanted = [at for at in found if DECISION[0] <= depth(at, n) <= DECISION[1]]
    above = [at for at in found if depth(at, n) > DECISION[1]]
    if not wanted and not above:
        raise InputError(
            "harmful prompts that were complied with look like the others at every layer: no decision layer"
        )
    best = max(wanted, key=lambda layer: found[layer][0]) if wanted else above[0]
    return best, found[best][1]


def fit_laws(fit: Fit, *, layers: Collection[int] | None = None, grid: Sequence[float] = GRID) -> tuple[Law, Law]:
    """Slopes and offsets of both coefficients, by logistic regression of "refused after steering" on validate.

    lambda_r is the coefficient at which the regression on position and coefficient gives a harmful prompt 0.95 of refusing.
    With that in place, lambda_c runs through two points: at position 1 the coefficient at which benign prompts are
    answered with 0.95; at position 0 the one at which harmful ones would still be refused with 0.95. Both are clipped to
    [0, largest coefficient tried].

    Raises:
        InputError: a class or split is missing, or adding v_R makes refusals no likelier on this model.
    """
    chosen = methods.layers_of(fit, layers)
    harmful, validate = methods.harmful_rows(fit), extraction.rows(fit, "validate")
    kinds = {
        name: _thinned(np.flatnonzero(validate & (harmful == wanted)))
        for name, wanted in (("harm", True), ("other", False))
    }
    if not all(len(places) for places in kinds.values()):
        raise InputError("AdaSteer's coefficients need harmful and other prompts in the split validate: supply both")
    (at_r, line_r), (at_h, line_h) = decision_line(fit, "refused"), decision_line(fit, "benign")
    pos_r = methods.position(line_r, fit.last["resid_post"][:, at_r].astype(float))
    pos_h = methods.position(line_h, fit.last["resid_post"][:, at_h].astype(float))
    high = max(grid)
    zero = Law(at_h, line_h, methods.Affine(0.0, 0.0, 0.0, high))
    tried = [adasteer(fit, layers=chosen, laws=(Law(at_r, line_r, methods.Affine(0, c, 0, high)), zero)) for c in grid]
    law_r = Law(at_r, line_r, _rejection_rule(pos_r[kinds["harm"]], _refused(fit, kinds["harm"], tried), grid))
    tried = [adasteer(fit, layers=chosen, laws=(law_r, Law(at_h, line_h, methods.Affine(0, c, 0, high)))) for c in grid]
    anchors = [
        _anchor(pos_h[places], _refused(fit, places, tried), grid, at, wanted)
        for places, at, wanted in ((kinds["harm"], 0.0, REFUSED), (kinds["other"], 1.0, 1 - REFUSED))
    ]
    return law_r, Law(at_h, line_h, methods.Affine(anchors[1] - anchors[0], anchors[0], 0.0, high))


def _thinned(places: np.ndarray) -> np.ndarray:
    """At most `N_FIT` of them, evenly spaced: prompts of one kind stand together in a prompt set."""
    return places[np.unique(np.linspace(0, len(places) - 1, min(N_FIT, len(places))).round().astype(int))]


def _refused(fit: Fit, places: np.ndarray, tried: Sequence[Steering]) -> Bool[np.ndarray, "tried prompt"]:
    texts = fit.prompts.text.to_numpy()[places].tolist()
    # Not the log-odds: a benign behaviour opens its answer with words that are in neither camp.
    found = outcomes.log_odds_each(fit.subject, texts, fit.openers, tried)
    return np.stack([np.asarray(one.p_refuse) > 0.5 for one in found])


def _response(
    at: Float[np.ndarray, prompt], refused: Bool[np.ndarray, "tried prompt"], grid: Sequence[float]
) -> tuple[float, float, float] | None:
    """Logistic weights of the position and of the coefficient, and the intercept."""
    table = np.column_stack([np.tile(at, len(grid)), np.repeat(np.asarray(grid, dtype=float), len(at))])
    found = methods.logistic(table, refused.ravel())
    return None if found is None else (float(found[0][0]), float(found[0][1]), found[1])


def _rejection_rule(
    at: Float[np.ndarray, prompt], refused: Bool[np.ndarray, "tried prompt"], grid: Sequence[float]
) -> methods.Affine:
    if refused.all():
        return methods.Affine(0.0, 0.0, 0.0, max(grid))
    made = _response(at, refused, grid)
    if made is None or made[1] <= 0:
        raise InputError(
            f"adding the rejection vector with up to {max(grid)} of its length makes refusals no likelier on validate: "
            "its role is not rejection in this model; try other layers or check the class labels"
        )
    of_position, of_coefficient, intercept = made
    logit = float(np.log(REFUSED / (1 - REFUSED)))
    return methods.Affine(-of_position / of_coefficient, (logit - intercept) / of_coefficient, 0.0, max(grid))


def _anchor(
    at: Float[np.ndarray, prompt],
    refused: Bool[np.ndarray, "tried prompt"],
    grid: Sequence[float],
    where: float,
    wanted: float,
) -> float:
    """The coefficient at which prompts at position `where` are refused with probability `wanted`, within the grid.

    Where the response is flat or rises, no coefficient helps, and it is 0; always refused harm allows the largest.
    """
    if refused.all() and wanted > 0.5:
        return float(max(grid))
    made = _response(at, refused, grid)
    if made is None or made[1] >= 0:
        return 0.0
    of_position, of_coefficient, intercept = made
    coefficient = (np.log(wanted / (1 - wanted)) - intercept - of_position * where) / of_coefficient
    return float(np.clip(coefficient, 0.0, max(grid)))


def adasteer_released(
    fit: Fit,
    strength: float = 1.0,
    *,
    layers: Collection[int] | None = None,
    rejection: methods.Affine = RELEASED_REJECTION,
    harmfulness: methods.Affine = RELEASED_HARMFULNESS,
) -> Steering:
    """As the published code does it: h <- h + lambda_r r + lambda_c (projection of v_H on r), positions in hundredths.

    r = mean(complied) - mean(refused), the opposite of the paper's sign, so a *negative* lambda_r raises refusals. The affine
    clamps are parameters; the defaults are ours, not the authors' (a quarter of r against compliance at position 0, nothing
    at position 100).

    Raises:
        InputError: a class is missing or lies where another does, or lambda_r cannot be negative.
    """
    chosen = methods.layers_of(fit, layers)
    if rejection.low >= 0:
        raise InputError(
            f"lambda_r is clamped to [{rejection.low}, {rejection.high}], but the released vector points towards complying: "
            "only a negative lambda_r makes refusals likelier; give the clamp a negative lower end"
        )
    r, h = -extraction.rejection(fit), extraction.harmfulness(fit)
    length = (r * r).sum(-1)
    onto = ((h * r).sum(-1) / np.where(length > 0, length, 1.0))[
        :, None
    ] * r  # a layer without r has no projection on it
    laws = {
        name: Law(*decision_line(fit, one), _rescaled(rule))
        for name, one, rule in (("r", "refused", rejection), ("c", "benign", harmfulness))
    }
    return _adaptive("adasteer_released", strength, chosen, laws, {"r": r, "c": onto})


def _rescaled(rule: methods.Affine) -> methods.Affine:
    return methods.Affine(rule.slope * RELEASED_SCALE, rule.offset, rule.low, rule.high)


def _adaptive(
    name: str, strength: float, layers: Sequence[int], laws: dict[str, Law], vectors: dict[str, np.ndarray]
) -> Steering:
    edits = []
    for layer in layers:
        terms = tuple((key, laws[key], methods.constant(vectors[key][layer])) for key in laws)
        edits.append(Edit(layer, "resid_post", partial(_sum, terms), blind=True))
    reads = tuple(Read(f"position {key}", law.layer, plain=True) for key, law in laws.items())
    return Steering(name, tuple(edits), strength, reads=reads)


def _sum(
    terms: Sequence[tuple[str, Law, partial[Tensor]]], x: Float[Tensor, "prompt pos d"], prompt: Prompt
) -> Float[Tensor, "prompt 1 d"]:
    made = x.new_zeros(len(x), 1, x.shape[-1])
    for key, law, vector in terms:
        at = methods.position_of(law.line, prompt.read[f"position {key}"])
        made = made + methods.coefficient(law.rule, at).to(x)[:, None, None] * vector(x, prompt)
    return made


PLANE_GRID: Final = tuple(np.round(np.arange(0, 2.01, 0.25), 2))  # coefficients tried, in lengths of the direction


BINS: Final = 5


WAYS: Final = {"rejection": "pos_R", "harmfulness": "pos_H"}


@torch.no_grad()
def residuals(lab: SteeringExperiment, prompts: pd.DataFrame) -> Float[np.ndarray, "prompt layer d"]:
    """The plain model's residual stream after every layer at the last prompt token."""
    found = np.empty((len(prompts), lab.subject.n_layers, lab.subject.d_model), dtype=np.float32)
    for places, ids in forward.buckets(lab.subject, list(prompts.text)):
        run = clean_run(lab.subject, ids, keep=("resid",))
        found[places] = torch.stack([h[:, -1] for h in run.resid_post], 1).float().cpu().numpy()
    return found


def plane_positions(
    directions: extraction.Directions, at: Float[np.ndarray, "prompt layer d"], layer: int
) -> pd.DataFrame:
    """`pos_R` and `pos_H` of every prompt at a layer."""
    columns = {}
    for one, column in (("refused", "pos_R"), ("benign", "pos_H")):
        ends = [np.asarray(getattr(directions, name)[layer], dtype=float) for name in ("complied", one)]
        columns[column] = methods.position(methods.scale(*ends), at[:, layer])
    return pd.DataFrame(columns)


def separation(lab: SteeringExperiment, fit: Fit) -> pd.DataFrame:
    """AUROC on validate, by layer: pos_R tells refused from complied harmful prompts, pos_H benign from harmful ones."""
    directions = extraction.fit_directions(fit)
    prompts = lab.prompts[lab.prompts.split == "validate"].reset_index(drop=True)
    validate = extraction.rows(fit, "validate")  # the fit has read them
    assert list(fit.prompts.text[validate]) == list(prompts.text), "the fit is of another lab"
    at = fit.last["resid_post"][validate]
    harmful = (prompts.kind == "harmful").to_numpy()
    rows = []
    for layer in range(lab.subject.n_layers):
        found = plane_positions(directions, at, layer)
        rejection = roc_auc_score(prompts.refused[harmful], found.pos_R[harmful])
        rows.append((layer, rejection, roc_auc_score(~harmful, found.pos_H)))
    return pd.DataFrame(rows, columns=["layer", "rejection", "harmfulness"])


def decision_layer(separated: pd.DataFrame) -> int:
    """The earliest layer whose worse AUROC is within 0.01 of the best layer's."""
    worse = separated[["rejection", "harmfulness"]].min(axis=1).to_numpy()
    return int(separated.layer[np.flatnonzero(worse >= worse.max() - 0.01)[0]])


def groups(prompts: pd.DataFrame) -> pd.Series:
    """What a prompt is, for the plane: kind, what the plain model did, and how strong its wrapper is."""
    harmful = prompts.kind == "harmful"
    names = [
        ("harmful, unseen wrapper, answered", harmful & (prompts.family == "unseen") & ~prompts.refused),
        ("harmful, strong wrapper, answered", harmful & ~prompts.refused & (prompts.tier > 3)),
        ("harmful, other, answered", harmful & ~prompts.refused),
        ("harmful, wrapped, refused", harmful & prompts.wrapped),
        ("harmful, plain, refused", harmful),
        ("borderline", prompts.kind == "borderline"),
        ("harmless", prompts.kind == "harmless"),
    ]
    return pd.Series(np.select([mask for _, mask in names], [name for name, _ in names], "other"), prompts.index)


def plane(prompts: pd.DataFrame, found: pd.DataFrame, by: pd.Series | None = None) -> pd.DataFrame:
    """Mean position of every group along both directions, with intervals over topics; for the figure.

    `by` names each prompt's group (by default `groups`); prompts of group "" are left out, and groups of one topic.
    """
    rows = []
    named = groups(prompts.reset_index(drop=True)) if by is None else by.to_numpy()
    table = prompts.reset_index(drop=True).assign(**found, group=named).query("group != ''")
    for group, part in table.groupby("group", sort=True):
        if part.topic.nunique() > 1:
            for name, column in WAYS.items():
                change = rates.mean_change(part[column].to_numpy(), part.topic.to_numpy())
                rows.append((group, name, change.estimate, change.low, change.high))
    return pd.DataFrame(rows, columns=["group", "projection", "estimate", "low", "high"])


def along(directions: extraction.Directions, layers: Sequence[int], coefficients: dict[str, float]) -> Steering:
    """Constant steering: so many times each direction at these layers, at all prompt tokens."""

    def edit(layer: int) -> Edit:
        parts = [size * np.asarray(getattr(directions, name)[layer]) for name, size in coefficients.items()]
        return Edit(layer, "resid_post", methods.constant(np.sum(parts, axis=0)), blind=True)

    return Steering("constant", tuple(edit(layer) for layer in layers))


def odds_over(
    lab: SteeringExperiment, directions: extraction.Directions, layers: Sequence[int], prompts: pd.DataFrame, name: str,
    held: dict[str, float] | None = None,
) -> Float[np.ndarray, "coefficient prompt"]:  # fmt: skip
    """Log-odds of not refusing under each coefficient of `GRID` along one direction, the `held` ones constant."""
    steered = [along(directions, layers, {**(held or {}), name: float(size)}) for size in PLANE_GRID]
    found = outcomes.log_odds_each(lab.subject, prompts.text, lab.openers, steered)
    return np.stack([-logit(one.p_refuse.to_numpy()) for one in found])


def needed(odds: Float[np.ndarray, "coefficient prompt"]) -> Float[np.ndarray, prompt]:
    """The smallest coefficient that makes the model refuse, between grid points by a straight line; NaN where none does.

    >>> needed(np.array([[1.0], [-3.0], [1.0]] + [[1.0]] * 6)).tolist()
    [0.0625]
    """
    refused = odds < 0
    first = refused.argmax(0)
    column = np.arange(odds.shape[1])
    before = np.maximum(first - 1, 0)
    low, high = odds[before, column], odds[first, column]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(first == 0, 0.0, low / (low - high))
    grid = np.array(PLANE_GRID)
    return np.where(refused.any(0), grid[before] + share * (grid[first] - grid[before]), np.nan)


def tolerated(odds: Float[np.ndarray, "coefficient prompt"], answered: np.ndarray) -> Float[np.ndarray, prompt]:
    """The largest coefficient of the grid with which a prompt is treated right: answered or refused, as it should be."""
    right = np.where(answered, odds >= 0, odds < 0)
    return np.where(right.any(0), np.array(PLANE_GRID)[len(PLANE_GRID) - 1 - right[::-1].argmax(0)], np.nan)


def law(position: np.ndarray, coefficient: np.ndarray, topic: np.ndarray, panel: str, group: str) -> pd.DataFrame:
    """Mean coefficient over fifths of the position, with intervals over topics; prompts without one are left out."""
    table = pd.DataFrame({"position": position, "y": coefficient, "topic": topic}).dropna()
    rows = []
    if len(table) >= 2 * BINS:
        fifth = pd.qcut(table.position, BINS, labels=False, duplicates="drop")
        for _, part in table.groupby(fifth):
            if part.topic.nunique() > 1:
                change = rates.mean_change(part.y.to_numpy(), part.topic.to_numpy())
                rows.append((panel, group, float(part.position.mean()), change.estimate, change.low, change.high))
    return pd.DataFrame(rows, columns=["panel", "group", "x", "estimate", "low", "high"])


def trend(position: np.ndarray, coefficient: np.ndarray) -> float:
    """Spearman's rank correlation of position and coefficient over the prompts that have one."""
    known = np.isfinite(coefficient)
    return float(st.spearmanr(position[known], coefficient[known]).statistic)
