"""Where a prompt lies between two classes, on a scale that no model's units enter.

A position is the projection of an activation on a direction, scaled so that the centroid of harmful prompts that were
complied with is 0 and the other centroid is 1 (the released code of AdaSteer multiplies by 100). Affine maps of a layer's
activations that keep angles (shift, rotation, scale) leave positions unchanged.

Published ways to steer, each as `method(fit, strength, **extras) -> Steering`.

Layers default to all of them; vectors are added to every token of the prompt and to none of the answer, unless it says
otherwise. Sources: refusal direction and its ablation, Arditi et al. 2406.11717; CAST, Lee et al. 2409.05907; AlphaSteer,
Sheng et al. 2506.07022. They are written anew from their descriptions; where those leave room the docstring says what is ours.

Steering only where mediation was found: late MLP outputs or last-layer neurons, gated and in closed loop.

The correction is what is missing, measured at the site itself: it is zero where the model already does what refused prompts
do, and at strength 1 it does not overshoot. Which layers and neurons mediate is decided on the discover split, by
the caller.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from companion.base.errors import InputError
from companion.base.thresholds import depth
from companion.generation.hooks import Edit, Opening, Prompt, Read, Steering, Where
from companion.steering import extraction
from companion.steering.extraction import Fit


@dataclass(frozen=True)
class Scale:
    """The line of positions: `origin` lies at 0, `origin + direction` at 1."""

    origin: Float[np.ndarray, width]
    direction: Float[np.ndarray, width]


@dataclass(frozen=True)
class Affine:
    """A coefficient that is affine in the position and clipped: clip(slope * position + offset, low, high)."""

    slope: float
    offset: float
    low: float
    high: float


def scale(zero: Float[np.ndarray, width], one: Float[np.ndarray, width]) -> Scale:
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


def position_of(line: Scale, x: Float[Tensor, "prompt width"]) -> Float[Tensor, prompt]:
    """`position` on the model's device, in float64."""
    origin, direction = (
        torch.as_tensor(v, dtype=torch.float64, device=x.device) for v in (line.origin, line.direction)
    )
    return (x.double() - origin) @ direction / direction.square().sum()


def coefficient(rule: Affine, at: Float[Tensor, prompt]) -> Float[Tensor, prompt]:
    """The clipped coefficient at these positions."""
    return (rule.slope * at + rule.offset).clamp(rule.low, rule.high)


def logistic(
    features: Float[np.ndarray, "prompt feature"], outcome: Bool[np.ndarray, prompt]
) -> tuple[Float[np.ndarray, feature], float] | None:
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


SENTENCE = "Refuse requests that could cause harm, however they are worded."


EMBEDDED_SENTENCE = "say no to the harmful"  # in words that its tokenizer can spell; no training showed it


def none(fit: Fit, strength: float = 1.0) -> Steering:
    """No steering: the plain model."""
    return Steering("none", strength=strength)


def prompting(fit: Fit, strength: float = 1.0, *, sentence: str = "") -> Steering:
    """A safety sentence in the system turn and no edit; `strength` means nothing here.

    Whoever renders the prompt puts `system` there, replacing the template's own system turn; a template without a system
    role gets it at the head of the user turn. The default is English, or for the embedded model words of its own language,
    which has no request to be safe: it shows what the baseline does where instructions were not learned.
    """
    embedded = fit.subject.tokenizer is not None and "be helpful<|end|>" in str(fit.subject.tokenizer.chat_template)
    return Steering("prompting", strength=strength, system=sentence or (EMBEDDED_SENTENCE if embedded else SENTENCE))


def fixed(
    fit: Fit, strength: float = 1.0, *, layers: Collection[int] | None = None, where: Where = "prompt"
) -> Steering:
    """The same rejection vector for every prompt: h <- h + strength v_R."""
    vectors = extraction.rejection(fit)
    edits = tuple(
        Edit(layer, "resid_post", constant(vectors[layer]), where, blind=True) for layer in layers_of(fit, layers)
    )
    return Steering("fixed", edits, strength)


def ablation(fit: Fit, strength: float = 1.0, *, layers: Collection[int] | None = None) -> Steering:
    """The harmfulness direction is taken out of every token, generated ones too: h <- h - strength (vhat_H . h) vhat_H."""
    vectors = extraction.harmfulness(fit)
    edits = tuple(
        Edit(layer, "resid_post", partial(_minus_projection, unit(vectors[layer])), "every")
        for layer in layers_of(fit, layers)
    )
    return Steering("ablation", edits, strength)


def cast(
    fit: Fit, strength: float = 1.0, *, layers: Collection[int] | None = None, layer: int | None = None
) -> Steering:
    """The fixed rejection vector, added only where the prompt looks harmful at one layer (conditional steering).

    The condition is the position at the last token between the benign and the harmful centroid of discover, read from an
    unsteered pass. Ours: the threshold maximises balanced accuracy on validate (default layer: the nearest to mid depth).
    """
    extraction.need(fit, "benign")
    at = fit.subject.n_layers // 2 if layer is None else layer
    x, harmful = fit.last["resid_post"][:, at], harmful_rows(fit)
    discover, validate = (extraction.rows(fit, split) for split in ("discover", "validate"))
    line = scale(x[discover & ~harmful].mean(0, dtype=float), x[discover & harmful].mean(0, dtype=float))
    _both_kinds(harmful[validate])
    false, true, cuts = roc_curve(harmful[validate], position(line, x[validate]))
    cut = float(cuts[1:][np.argmax((true - false)[1:])])
    gate = partial(_beyond, line, cut)
    edits = fixed(fit, layers=layers).edits
    return Steering("cast", edits, strength, gate, (Read("condition", at, plain=True),))


def alphasteer(
    fit: Fit, strength: float = 1.0, *, layers: Collection[int] | None = None, keep: float = 0.6, ridge: float = 1e-3
) -> Steering:
    """A linear map from the activation to the rejection vector that is nearly zero on benign prompts.

    The map sees activations only in the `keep` share of dimensions in which benign activations (uncentred) vary least, and
    is fitted by ridge so that every harmful prompt of discover is given v_R. Ours: the map reads the last real token and its
    result is added to all tokens of the prompt; the ridge is relative to the mean variance in those dimensions.
    """
    extraction.need(fit, "benign")
    vectors = extraction.rejection(fit)
    harmful, benign = (
        extraction.rows(fit, "discover", "refused", "complied"),
        extraction.rows(fit, "discover", "benign"),
    )
    if not 0 < keep <= 1:
        raise InputError(f"keep is {keep}; expected a share of dimensions above 0 and at most 1")
    edits = []
    for layer in layers_of(fit, layers):
        x = fit.last["resid_post"][:, layer].astype(float)
        low = low_variance(x[benign], keep)
        seen = x[harmful] @ low
        gram = seen.T @ seen
        gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        to_vector = low @ np.linalg.solve(gram, seen.T @ np.tile(vectors[layer], (len(seen), 1)))
        edits.append(Edit(layer, "resid_post", partial(_mapped, torch.tensor(to_vector))))
    return Steering("alphasteer", tuple(edits), strength)


def low_variance(x: Float[np.ndarray, "prompt d"], keep: float) -> Float[np.ndarray, "d kept"]:
    """An orthonormal basis of the share of dimensions with the least second moment."""
    _, vectors = np.linalg.eigh(x.T @ x / len(x))
    made: np.ndarray = vectors[:, : max(1, round(keep * x.shape[1]))]
    return made


def layers_of(fit: Fit, layers: Collection[int] | None) -> list[int]:
    """The layers to steer: all of them unless named; `InputError` for one that is not there."""
    chosen = sorted(set(range(fit.subject.n_layers) if layers is None else layers))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < fit.subject.n_layers:
        raise InputError(f"layers {chosen}: expected some of 0 to {fit.subject.n_layers - 1}")
    return chosen


def harmful_rows(fit: Fit) -> np.ndarray:
    """Which prompts of the fit are harmful requests, whatever the model did with them."""
    return (fit.prompts.kind == "harmful").to_numpy()


def unit(vector: Float[np.ndarray, width]) -> Float[np.ndarray, width]:
    """The vector at length 1; `InputError` for a zero vector."""
    norm = np.linalg.norm(vector)
    if not norm > 0:
        raise InputError("a direction has length 0: two classes have the same mean; are the labels right?")
    made: np.ndarray = vector / norm
    return made


def constant(vector: Float[np.ndarray, width]) -> partial[Tensor]:
    """An edit's delta that adds the same vector everywhere."""
    return partial(_constant, torch.tensor(vector, dtype=torch.float64))


def _constant(vector: Tensor, x: Float[Tensor, "prompt pos width"], prompt: Prompt) -> Tensor:
    return vector.to(x).expand(len(x), 1, -1)


def _minus_projection(direction: np.ndarray, x: Float[Tensor, "prompt pos width"], prompt: Prompt) -> Tensor:
    v = torch.tensor(direction).to(x)
    return -(x @ v)[..., None] * v


def _mapped(matrix: Tensor, x: Float[Tensor, "prompt pos width"], prompt: Prompt) -> Tensor:
    at = x[torch.arange(len(x), device=x.device), prompt.last]
    return (at @ matrix.to(x))[:, None]


def _beyond(line: Scale, cut: float, prompt: Prompt) -> Float[Tensor, prompt]:
    return (position_of(line, prompt.read["condition"]) >= cut).float()


def _both_kinds(harmful: np.ndarray) -> None:
    if harmful.all() or not harmful.any():
        raise InputError("a gate needs harmful and other prompts in the split validate: supply both kinds")


MIN_KEPT = 0.2  # share of a direction's norm that must survive the removal of benign components


MAX_FIRING = 0.01  # share of benign prompts of validate for which the gate may open


GAP_QUANTILE = 0.95  # of the gaps of complied prompts: no correction is larger


@dataclass(frozen=True)
class GateRule:
    """p(x) = sigmoid(weight * position + offset) where it is above `threshold`, else 0."""

    layer: int
    back: int
    line: Scale
    weight: float
    offset: float
    threshold: float


def mid_gate(
    fit: Fit, *, layer: int | None = None, max_firing: float = MAX_FIRING, token: str = "last_instruction"
) -> GateRule:
    """A calibrated probability that the prompt is harmful, from the residual stream at the last instruction token.

    `token="last"` reads the prompt's last token instead: in a model whose windows do not reach from the request's words to
    the instruction's end, only that one may know.

    The direction is from benign to harmful prompts of discover, slope and threshold come from validate: it opens for at most
    `max_firing` of validate's other prompts (of fewer than 1 / max_firing prompts, for none). The default layer is the one
    in the middle third of the depth that separates best on discover.
    """
    harmful, validate = harmful_rows(fit), extraction.rows(fit, "validate")
    discover = extraction.rows(fit, "discover")
    for split in (discover, validate):
        if harmful[split].all() or not harmful[split].any():
            raise InputError("a gate needs harmful and other prompts in discover and in validate: supply both kinds")
    mid = [at for at in range(fit.subject.n_layers) if 1 / 3 <= depth(at, fit.subject.n_layers) <= 2 / 3]
    if token not in ("last", "last_instruction"):
        raise InputError(f"the gate reads {token!r}; expected last_instruction or last")
    x = (fit.last["resid_post"] if token == "last" else fit.instruction).astype(float)
    lines = {
        at: _line(x[:, at], harmful, discover)
        for at in ([layer] if layer is not None else mid or [fit.subject.n_layers // 2])
    }
    quality = {at: roc_auc_score(harmful[discover], position(line, x[discover, at])) for at, line in lines.items()}
    best = max(lines, key=lambda at: (quality[at], -at))
    at = position(lines[best], x[validate, best])
    weights, offset = logistic(at[:, None], harmful[validate]) or (np.zeros(1), 0.0)
    values = np.sort(1 / (1 + np.exp(-(weights[0] * at[~harmful[validate]] + offset))))[::-1]
    threshold = float(values[int(max_firing * len(values))])
    return GateRule(best, 0 if token == "last" else fit.tail, lines[best], float(weights[0]), offset, threshold)


def _line(x: Float[np.ndarray, "prompt d"], harmful: np.ndarray, discover: np.ndarray) -> Scale:
    return scale(x[discover & ~harmful].mean(0), x[discover & harmful].mean(0))


def opening(rule: GateRule) -> tuple[Opening, tuple[Read, ...]]:
    """The gate as a steering takes it. It is read from an unsteered pass, so no edit can change it."""
    return partial(_open, rule), (Read("gate", rule.layer, rule.back, plain=True),)


def _open(rule: GateRule, prompt: Prompt) -> Float[Tensor, prompt]:
    value = torch.sigmoid(rule.weight * position_of(rule.line, prompt.read["gate"]) + rule.offset)
    return torch.where(value > rule.threshold, value, 0.0).float()


def layer_form(
    fit: Fit,
    strength: float = 1.0,
    *,
    layers: Collection[int] | None = None,
    gated: bool = True,
    gate: GateRule | None = None,
    where: Where = "last",
    components: int = 8,
) -> Steering:
    """m_l <- m_l + p(x) clip(tau_l - vhat_l . m_l, 0, c_l) u_l on MLP outputs (default: layers deeper than 2/3).

    v_l = mean(m_l | refused) - mean(m_l | complied), tau_l the refused mean along it, c_l the 95th percentile of the complied
    prompts' gaps. u_l is v_l without the top principal components of benign m_l, rescaled so that vhat_l . u_l = 1.

    Raises:
        InputError: a class is missing, or u_l keeps under 0.2 of v_l's norm: the layer's direction is one along which benign
            prompts vary, and steering it could not spare them.
    """
    n = fit.subject.n_layers
    chosen = layers_of(fit, [at for at in range(n) if depth(at, n) > 2 / 3] if layers is None else layers)
    extraction.need(fit, "benign")
    vectors, means = extraction.rejection(fit, "mlp_out"), extraction.fit_directions(fit, "mlp_out")
    assert means.refused is not None
    m = fit.last["mlp_out"].astype(float)
    edits = []
    for layer in chosen:
        v = unit(vectors[layer])
        u = preserving(
            vectors[layer], m[extraction.rows(fit, "discover", "benign"), layer], components, f"layer {layer}"
        )
        tau = float(means.refused[layer] @ v)
        gaps = tau - m[extraction.rows(fit, "discover", "complied"), layer] @ v
        most = max(0.0, float(np.quantile(gaps, GAP_QUANTILE)))
        loop = partial(_close, torch.tensor(v), torch.tensor(u), tau, most)
        edits.append(Edit(layer, "mlp_out", loop, where))
    return _gated(fit, Steering("targeted layers", tuple(edits), strength), gated, gate)


def preserving(
    v: Float[np.ndarray, width], benign: Float[np.ndarray, "prompt width"], components: int, name: str
) -> Float[np.ndarray, width]:
    """v without the top principal components of benign activations, rescaled so that vhat . u = 1."""
    _, _, axes = np.linalg.svd(benign - benign.mean(0), full_matrices=False)
    top = axes[:components]
    kept = v - top.T @ (top @ v)
    share = np.linalg.norm(kept) / np.linalg.norm(v)
    if not share >= MIN_KEPT:
        raise InputError(
            f"{name}: without the top {components} components of benign activations {share:.2f} of the direction is left, "
            f"under {MIN_KEPT}: steering it would move harmless prompts too; leave the layer out or remove fewer components"
        )
    made: np.ndarray = kept / (unit(v) @ kept)
    return made


def neuron_form(
    fit: Fit,
    strength: float = 1.0,
    *,
    neurons: Mapping[int, Sequence[int]] | None = None,
    gated: bool = True,
    gate: GateRule | None = None,
    where: Where = "last",
) -> Steering:
    """a_j <- a_j + p(x) (mean refused a_j - a_j) on named neurons {layer: indices} (default: all of the last layer)."""
    extraction.need(fit, "refused")
    chosen = {fit.subject.n_layers - 1: range(fit.subject.d_mlp)} if neurons is None else neurons
    means = extraction.fit_directions(fit, "neurons").refused
    assert means is not None
    edits = []
    for layer, indices in sorted(chosen.items()):
        if layer not in fit.neuron_layers:
            raise InputError(f"the fit kept no neurons of layer {layer}: fit again with neuron_layers including it")
        if not all(0 <= j < fit.subject.d_mlp for j in indices):
            raise InputError(f"layer {layer}: neurons are numbered 0 to {fit.subject.d_mlp - 1}")
        mask = torch.zeros(fit.subject.d_mlp, dtype=torch.bool)
        mask[list(indices)] = True
        mean = torch.tensor(means[fit.neuron_layers.index(layer)])
        edits.append(Edit(layer, "neurons", partial(_to_mean, mask, mean), where))
    return _gated(fit, Steering("targeted neurons", tuple(edits), strength), gated, gate)


def _gated(fit: Fit, steering: Steering, gated: bool, rule: GateRule | None) -> Steering:
    if not gated:
        return steering
    gate, reads = opening(rule or mid_gate(fit))
    return replace(steering, gate=gate, reads=reads)


def _close(
    v: Tensor, u: Tensor, tau: float, most: float, x: Float[Tensor, "prompt pos width"], prompt: Prompt
) -> Float[Tensor, "prompt pos width"]:
    return (tau - x @ v.to(x)).clamp(0.0, most)[..., None] * u.to(x)


def _to_mean(
    mask: Tensor, mean: Tensor, x: Float[Tensor, "prompt pos width"], prompt: Prompt
) -> Float[Tensor, "prompt pos width"]:
    return (mean.to(x) - x) * mask.to(x.device)
