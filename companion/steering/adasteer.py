"""AdaSteer (Zhao et al., arXiv 2504.09466), and the plane of rejection and harmfulness on which its laws can be seen.

Positions are shares: 0 at the mean of the harmful prompts that the model complied with, 1 at the mean of those it refused
(`pos_R`) or of the benign ones it answered (`pos_H`). They are read at one decision layer each, at the last real token, in an
unsteered pass: the paper's decision layers are early-middle, so this is not late steering.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from scipy import stats as st
from scipy.special import logit
from sklearn.metrics import roc_auc_score
from torch import Tensor

from companion.base.device import to_host
from companion.base.errors import InputError
from companion.base.thresholds import depth
from companion.generation import forward, outcomes
from companion.generation.hooks import Delta, Edit, Prompt, Read, Steering
from companion.model.activations import clean_run
from companion.stats.rates import mean_change
from companion.steering import methods
from companion.steering.experiment import SteeringExperiment
from companion.steering.extraction import ENDS, Directions, Fit
from companion.steering.methods import Scale
from companion.steering.prompts import thinned

# Coefficients tried on validate, summed over the steered layers, since each adds its own; the largest is the clip.
GRID: Final = (0.0, 0.25, 0.5, 1.0, 2.0)
SURE: Final = 0.95  # wanted probability of refusing a harmful prompt, and of answering another
N_FIT: Final = 60  # prompts of a kind on which coefficients are tried
DECISION: Final = (0.2, 0.5)  # relative depth of decision layers
ROUNDING: Final = 1e-4  # of the activations' norm: centroids that differ by less differ by rounding
PLANE_GRID: Final = tuple(np.arange(0, 4.01, 0.5))  # the same for the figure of the laws
BINS: Final = 5
N_LAW: Final = 100  # prompts of a kind on which the laws are read
AXES: Final = {"rejection": "pos_R", "harmfulness": "pos_H"}


@dataclass(frozen=True)
class Affine:
    """A coefficient that is affine in the position and clipped: clip(slope * position + offset, low, high)."""

    slope: float
    offset: float
    low: float
    high: float

    def __call__(self, at: Float[Tensor, "prompt"]) -> Float[Tensor, "prompt"]:
        """The coefficient at these positions."""
        return (self.slope * at + self.offset).clamp(self.low, self.high)


@dataclass(frozen=True)
class Law:
    """A fitted coefficient: where its position is read, on which line, and the affine rule.

    The laws predict the sign of the slope, negative for rejection and positive for harmfulness; it is reported, not imposed.
    """

    layer: int
    line: Scale
    rule: Affine


# The constants in the authors' code for Llama-3.1, which has 32 layers, with positions as shares instead of hundredths and in
# the paper's signs: the code's vectors and coefficients both have the opposite ones.
RELEASED: Final = {"r": Affine(-2.0, -1.2, 0.08, 0.22), "c": Affine(5.0, 0.75, -math.inf, 0.75)}
RELEASED_LAYERS: Final = 32


def adasteer(fit: Fit, *, layers: Collection[int] | None = None, laws: tuple[Law, Law] | None = None) -> Steering:
    """h <- h + lambda_r(pos_R) v_R + lambda_c(pos_H) v_H as published, with coefficients from `fit_laws` or given `laws`.

    Vectors are added at these layers (default: all) to all tokens of the prompt and to none of the answer.
    """
    chosen = methods.checked_layers(fit, layers)
    rejection, harmfulness = laws or laws_of(fit, tuple(chosen))
    vectors = {"r": fit.direction("rejection"), "c": fit.direction("harmfulness")}
    return _adaptive("adasteer", chosen, {"r": rejection, "c": harmfulness}, vectors)


def adasteer_released(fit: Fit, *, layers: Collection[int] | None = None) -> Steering:
    """As the authors' code does it: h <- h + lambda_r v_R + lambda_c (projection of v_H on v_R), with typed coefficients.

    The second vector is a projection on the first, so one direction is left. The constants (`RELEASED`) are those for a model of
    32 layers; as every layer adds its share, they are multiplied by 32 / (number of layers).
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

    It is the layer between relative depths 0.2 and 0.5 at which the two classes' centroids lie furthest apart on discover,
    in units of the spread along the line between them. Where the centroids differ by rounding alone a position would be
    noise over noise: such a layer is no candidate, and if none is left it is the earliest layer above that is one.
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
    above = [at for at in found if depth(at, n) > DECISION[1]]
    if not wanted and not above:
        why = "harmful prompts that were complied with look like the others at every layer: no decision layer"
        raise InputError(why)
    best = max(wanted, key=lambda layer: found[layer][0]) if wanted else above[0]
    return best, found[best][1]


def laws_of(fit: Fit, layers: tuple[int, ...]) -> tuple[Law, Law]:
    """`fit_laws`, once for a fit: methods, rivals and figures ask for the same."""
    if ("laws", layers) not in fit.memo:
        fit.memo["laws", layers] = fit_laws(fit, layers)
    laws: tuple[Law, Law] = fit.memo["laws", layers]
    return laws


def fit_laws(fit: Fit, layers: Collection[int]) -> tuple[Law, Law]:
    """Slopes and offsets of both coefficients, by logistic regression of "refused after steering" on validate.

    lambda_r is the coefficient that a harmful prompt *needs*: at which the regression on position and coefficient gives it
    0.95 of being refused. With that in place, lambda_c is the coefficient that a prompt *tolerates*, the largest with which
    it is still treated right with 0.95: a harmful prompt at position 0 refused, a benign one at position 1 answered. Both
    are clipped to [0, largest coefficient tried].

    Raises:
        InputError: a class or split is missing, or adding v_R makes refusals no likelier on this model.
    """
    validate = fit.mask("validate")
    kinds = [np.flatnonzero(validate & (fit.harmful == wanted)) for wanted in (True, False)]
    if not all(map(len, kinds)):
        raise InputError("AdaSteer's coefficients need harmful and other prompts in the split validate: supply both")
    # Prompts of one kind stand together in a prompt set, so those that are tried are evenly spaced.
    harm, other = (
        places[np.unique(np.linspace(0, len(places) - 1, min(N_FIT, len(places))).round().astype(int))]
        for places in kinds
    )
    (at_r, line_r), (at_h, line_h) = decision_line(fit, "refused"), decision_line(fit, "benign")
    pos_r = line_r.position(fit.last["resid_post"][:, at_r].astype(float))
    pos_h = line_h.position(fit.last["resid_post"][:, at_h].astype(float))
    steps = np.array(GRID) / len(layers)  # a coefficient for each layer

    def tried(law_r: Law | None) -> list[Steering]:
        """Both vectors with one coefficient constant at each step: v_R's, or v_H's once that one is fitted."""
        flat = [Affine(0.0, c, 0.0, c) for c in steps]
        zero = Law(at_h, line_h, flat[0])
        laws = [(law_r, Law(at_h, line_h, c)) if law_r else (Law(at_r, line_r, c), zero) for c in flat]
        return [adasteer(fit, layers=layers, laws=one) for one in laws]

    law_r = Law(at_r, line_r, _rejection_rule(pos_r[harm], _refused(fit, harm, tried(None)), steps))
    steered = tried(law_r)
    at_harmful = _tolerated_at(0.0, pos_h[harm], _refused(fit, harm, steered), steps)
    at_benign = _tolerated_at(1.0, pos_h[other], ~_refused(fit, other, steered), steps)
    return law_r, Law(at_h, line_h, Affine(at_benign - at_harmful, at_harmful, 0.0, steps[-1]))


def _refused(fit: Fit, places: np.ndarray, tried: Sequence[Steering]) -> Bool[np.ndarray, "tried prompt"]:
    texts = fit.prompts.text.to_numpy()[places].tolist()
    # Not the log-odds: a benign behaviour opens its answer with words that are in neither camp.
    found = outcomes.log_odds_each(fit.subject, texts, fit.openers, tried)
    return np.stack([np.asarray(one.p_refuse) > 0.5 for one in found])


def _response(
    at: Float[np.ndarray, "prompt"], outcome: Bool[np.ndarray, "tried prompt"], steps: Float[np.ndarray, "tried"]
) -> tuple[float, float, float]:
    """Logistic weights of the position and of the coefficient, and the intercept; zeros where only one outcome occurs."""
    table = np.column_stack([np.tile(at, len(steps)), np.repeat(steps, len(at))])
    found = methods.logistic(table, outcome.ravel())
    return (0.0, 0.0, 0.0) if found is None else (float(found[0][0]), float(found[0][1]), found[1])


def _rejection_rule(
    at: Float[np.ndarray, "prompt"], refused: Bool[np.ndarray, "tried prompt"], steps: Float[np.ndarray, "tried"]
) -> Affine:
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


def _tolerated_at(
    where: float, at: Float[np.ndarray, "prompt"], right: Bool[np.ndarray, "tried prompt"],
    steps: Float[np.ndarray, "tried"],
) -> float:  # fmt: skip
    """The largest coefficient up to the last step with which prompts at position `where` are treated right with 0.95.

    It is the last step where a coefficient makes that no less likely, and 0 where none keeps it.
    """
    if not right.any():
        return 0.0
    of_position, of_coefficient, intercept = _response(at, right, steps)
    if of_coefficient >= 0:
        return float(steps[-1])
    return float(np.clip((logit(SURE) - intercept - of_position * where) / of_coefficient, 0.0, steps[-1]))


def _adaptive(name: str, layers: Sequence[int], laws: dict[str, Law], vectors: dict[str, np.ndarray]) -> Steering:
    edits = []
    for layer in layers:
        terms = tuple((key, laws[key], methods.constant(vectors[key][layer])) for key in laws)
        edits.append(Edit(layer, "resid_post", partial(_sum, terms), blind=True))
    reads = tuple(Read(f"position {key}", law.layer, plain=True) for key, law in laws.items())
    return Steering(name, tuple(edits), reads=reads)


def _sum(
    terms: Sequence[tuple[str, Law, Delta]], x: Float[Tensor, "prompt pos d"], prompt: Prompt
) -> Float[Tensor, "prompt 1 d"]:
    made = x.new_zeros(len(x), 1, x.shape[-1])
    for key, law, vector in terms:
        at = law.line.position_on_device(prompt.read[f"position {key}"])
        made = made + law.rule(at).to(x)[:, None, None] * vector(x, prompt)
    return made


@torch.no_grad()
def residuals(experiment: SteeringExperiment, prompts: pd.DataFrame) -> Float[np.ndarray, "prompt layer d"]:
    """The plain model's residual stream after every layer at the last prompt token."""
    subject = experiment.subject
    found = np.empty((len(prompts), subject.n_layers, subject.d_model), dtype=np.float32)
    for places, ids in forward.buckets(subject, list(prompts.text)):
        run = clean_run(subject, ids, keep=("resid",))
        found[places] = to_host(torch.stack([h[:, -1] for h in run.resid_post], 1).float())
    return found


def plane_positions(directions: Directions, at: Float[np.ndarray, "prompt layer d"], layer: int) -> pd.DataFrame:
    """`pos_R` and `pos_H` of every prompt at a layer."""
    columns = {}
    for role, column in AXES.items():
        one, zero = (np.asarray(getattr(directions, name)[layer], dtype=float) for name in ENDS[role])
        columns[column] = Scale.between(zero, one).position(at[:, layer])
    return pd.DataFrame(columns)


def separation(experiment: SteeringExperiment) -> pd.DataFrame:
    """AUROC on validate, by layer: pos_R tells refused from complied harmful prompts, pos_H benign from harmful ones."""
    fit = experiment.fit
    validate = fit.mask("validate")
    at, prompts, harmful = fit.last["resid_post"][validate], fit.prompts[validate], fit.harmful[validate]
    rows = []
    for layer in range(experiment.subject.n_layers):
        found = plane_positions(fit.directions(), at, layer)
        rejection = roc_auc_score(prompts.refused[harmful], found.pos_R[harmful])
        rows.append((layer, rejection, roc_auc_score(~harmful, found.pos_H)))
    return pd.DataFrame(rows, columns=["layer", *AXES])


def decision_layer(separated: pd.DataFrame) -> int:
    """The earliest layer whose worse AUROC is within 0.01 of the best layer's."""
    worse = separated[[*AXES]].min(axis=1).to_numpy()
    return int(separated.layer[np.flatnonzero(worse >= worse.max() - 0.01)[0]])


def plane_table(prompts: pd.DataFrame, placed: pd.DataFrame, by: pd.Series | None = None) -> pd.DataFrame:
    """Mean position of every group along both directions, with intervals over topics; for the figure.

    `by` names each prompt's group (by default kind, what the plain model did, and how strong its wrapper is); prompts of group
    "" are left out, and groups of one topic.
    """
    rows = []
    named = _groups(prompts) if by is None else by
    table = prompts.reset_index(drop=True).assign(**placed, group=named.to_numpy()).query("group != ''")
    for group, part in table.groupby("group", sort=True):
        if part.topic.nunique() > 1:
            for name, column in AXES.items():
                change = mean_change(part[column].to_numpy(), part.topic.to_numpy())
                rows.append((group, name, *astuple(change)[:3]))
    return pd.DataFrame(rows, columns=["group", "projection", "estimate", "low", "high"])


def _groups(prompts: pd.DataFrame) -> pd.Series:
    harmful = prompts.kind == "harmful"
    masks = {
        "harmful, unseen wrapper, answered": harmful & (prompts.family == "unseen") & ~prompts.refused,
        "harmful, strong wrapper, answered": harmful & ~prompts.refused & (prompts.tier > 3),
        "harmful, other, answered": harmful & ~prompts.refused,
        "harmful, wrapped, refused": harmful & prompts.wrapped,
        "harmful, plain, refused": harmful,
    }
    return pd.Series(np.select(list(masks.values()), list(masks), prompts.kind), prompts.index)


def along(directions: Directions, layers: Sequence[int], coefficients: Mapping[str, float]) -> Steering:
    """Constant steering: so many times each direction at these layers, at all prompt tokens."""

    def edit(layer: int) -> Edit:
        parts = [size * np.asarray(getattr(directions, name)[layer]) for name, size in coefficients.items()]
        return Edit(layer, "resid_post", methods.constant(np.sum(parts, axis=0)), blind=True)

    return Steering("constant", tuple(edit(layer) for layer in layers))


def law_table(
    experiment: SteeringExperiment,
    prompts: pd.DataFrame,
    at: Float[np.ndarray, "prompt layer d"],
    layers: Sequence[int],
) -> tuple[pd.DataFrame, dict[str, str]]:
    """R-law and H-law on these prompts, with the fitted coefficients as lines, and in words what the figure cannot show.

    `at` holds the prompts' unsteered activations (`residuals`); positions are read where AdaSteer reads them.
    """
    fit, (panel_r, panel_h) = experiment.fit, ("R-law: needed along v_R", "H-law: tolerated along v_H")
    grid = np.array(PLANE_GRID) / len(layers)
    lines = {panel_r: decision_line(fit, "refused"), panel_h: decision_line(fit, "benign")}
    pos_r, pos_h = (line.position(at[:, layer].astype(float)) for layer, line in lines.values())

    def odds_over(part: pd.DataFrame, name: str, held: Mapping[str, float]) -> Float[np.ndarray, "coefficient prompt"]:
        """Log-odds of not refusing under each coefficient of the grid along one direction, the `held` ones constant."""
        steered = [along(fit.directions(), layers, {**held, name: float(size)}) for size in grid]
        return np.stack([-logit(one.p_refuse.to_numpy()) for one in experiment.first_tokens(part, steered)])

    answered = thinned(prompts[(prompts.kind == "harmful") & ~prompts.refused], N_LAW)
    need = needed(odds_over(answered, "rejection", {}), grid)
    facts = {"answered harmful prompts that no coefficient flips": f"{np.isnan(need).mean():.2f}"}
    if not np.isfinite(need).any():
        return binned_law([], [], [], "", ""), facts
    tables = [binned_law(pos_r[answered.index], need, answered.topic, panel_r, "harmful, answered")]
    held = {"rejection": float(np.nanmedian(need))}
    both, positions = [], []
    for kind, wanted in (("harmful", False), ("borderline", True), ("harmless", True)):
        part = thinned(prompts[prompts.kind == kind], N_LAW)
        both.append(tolerated(odds_over(part, "harmfulness", held), np.full(len(part), wanted), grid))
        positions.append(pos_h[part.index])
        tables.append(binned_law(positions[-1], both[-1], part.topic, panel_h, kind))
    facts["R-law, rank correlation"] = f"{trend(pos_r[answered.index], need):.2f}"
    facts["H-law, rank correlation"] = f"{trend(np.concatenate(positions), np.concatenate(both)):.2f}"
    try:
        laws = laws_of(fit, tuple(layers))
    except InputError as error:
        return pd.concat(tables, ignore_index=True), facts | {"fitted": f"not defined: {error}"}
    for panel, law, position in zip(lines, laws, (pos_r, pos_h), strict=True):
        rule = law.rule
        facts[f"{panel[:5]}, fitted"] = (
            f"{rule.slope:.3f} position + {rule.offset:.3f}, kept in [{rule.low:g}, {rule.high:.2g}], read at layer {law.layer}"
        )
        tables.append(law_line(law, position, panel))
    return pd.concat(tables, ignore_index=True), facts


def law_line(law: Law, position: Float[np.ndarray, "prompt"], panel: str) -> pd.DataFrame:
    """The fitted coefficient over the positions of some prompts, as a line for their figure."""
    x = np.linspace(position.min(), position.max(), 25)
    table = pd.DataFrame({"panel": panel, "group": "fitted", "x": x})
    return table.assign(**dict.fromkeys(("estimate", "low", "high"), to_host(law.rule(torch.from_numpy(x)))))


def needed(
    odds: Float[np.ndarray, "coefficient prompt"], grid: Float[np.ndarray, "coefficient"]
) -> Float[np.ndarray, "prompt"]:
    """The smallest coefficient that makes the model refuse, between grid points by a straight line; NaN where none does.

    >>> needed(np.array([[1.0], [-3.0], [1.0]]), np.array([0.0, 0.25, 0.5])).tolist()
    [0.0625]
    """
    refused = odds < 0
    first = refused.argmax(0)
    column = np.arange(odds.shape[1])
    before = np.maximum(first - 1, 0)
    low, high = odds[before, column], odds[first, column]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(first == 0, 0.0, low / (low - high))
    return np.where(refused.any(0), grid[before] + share * (grid[first] - grid[before]), np.nan)


def tolerated(
    odds: Float[np.ndarray, "coefficient prompt"], answered: np.ndarray, grid: Float[np.ndarray, "coefficient"]
) -> Float[np.ndarray, "prompt"]:
    """The largest coefficient of the grid with which a prompt is treated right: answered or refused, as it should be."""
    right = np.where(answered, odds >= 0, odds < 0)
    return np.where(right.any(0), grid[len(grid) - 1 - right[::-1].argmax(0)], np.nan)


def binned_law(position: ArrayLike, coefficient: ArrayLike, topic: ArrayLike, panel: str, group: str) -> pd.DataFrame:
    """Mean coefficient over fifths of the position, with intervals over topics; prompts without one are left out."""
    table = pd.DataFrame({"position": position, "y": coefficient, "topic": np.asarray(topic)}).dropna()
    rows = []
    if len(table) >= 2 * BINS:
        fifth = pd.qcut(table.position, BINS, labels=False, duplicates="drop")
        for _, part in table.groupby(fifth):
            if part.topic.nunique() > 1:
                change = mean_change(part.y.to_numpy(), part.topic.to_numpy())
                rows.append((panel, group, float(part.position.mean()), *astuple(change)[:3]))
    return pd.DataFrame(rows, columns=["panel", "group", "x", "estimate", "low", "high"])


def trend(position: np.ndarray, coefficient: np.ndarray) -> float:
    """Spearman's rank correlation of position and coefficient over the prompts that have one."""
    known = np.isfinite(coefficient)
    return float(st.spearmanr(position[known], coefficient[known]).statistic)
