"""Ways to steer, each as `method(fit, ...) -> Steering` at strength 1: published ones, and our own at mediating sites.

Vectors are added at all layers unless named, to every token of the prompt and to none of the answer, unless it says otherwise.
Sources: refusal direction, Arditi et al. 2406.11717; CAST, Lee et al. 2409.05907; AlphaSteer, Sheng et al. 2506.07022. They are
written anew from their descriptions; where those leave room the docstring says what is ours.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from companion.base import chat
from companion.base.device import Placed
from companion.base.errors import InputError
from companion.base.thresholds import depth
from companion.generation.hooks import Delta, Edit, Prompt, Read, Steering
from companion.prompts import tokens
from companion.steering.extraction import Fit

SENTENCE = "Refuse requests that could cause harm, however they are worded."
EMBEDDED_SENTENCE = "say no to the harmful"  # in words that its tokenizer can spell; no training showed it
KEEP = 0.6  # share of dimensions that AlphaSteer's map sees
RIDGE = 1e-3  # of the map, relative to the mean variance in those dimensions
MIN_KEPT = 0.2  # share of a direction's norm that must survive the removal of benign components
MAX_FIRING = 0.01  # share of benign prompts of validate for which the gate may open
GAP_QUANTILE = 0.95  # of the gaps of complied prompts: no correction is larger


@dataclass(frozen=True)
class Scale:
    """The line of positions: `origin` lies at 0, `origin + direction` at 1; shift, rotation and scaling leave them unchanged."""

    origin: Float[np.ndarray, "width"]
    direction: Float[np.ndarray, "width"]

    @classmethod
    def between(cls, zero: Float[np.ndarray, "width"], one: Float[np.ndarray, "width"]) -> Scale:
        if not np.square(one - zero).sum() > 0:
            raise InputError("two classes have the same mean, so no direction lies between them: are the labels right?")
        return cls(zero, one - zero)

    def position(self, x: Float[np.ndarray, "*prompt width"]) -> Float[np.ndarray, "*prompt"]:
        """Positions of activations.

        >>> Scale(np.zeros(2), np.array([2.0, 0.0])).position(np.array([[0.0, 5.0], [2.0, 0.0], [3.0, 1.0]]))
        array([0. , 1. , 1.5])
        """
        return (x - self.origin) @ self.direction / np.square(self.direction).sum()

    def position_on_device(self, x: Float[Tensor, "prompt width"]) -> Float[Tensor, "prompt"]:
        """`position` on the model's device, in float64."""
        x = x.double()
        origin, direction = (end.like(x) for end in self._ends)
        return (x - origin) @ direction / direction.square().sum()

    @cached_property
    def _ends(self) -> tuple[Placed, Placed]:
        return Placed(self.origin), Placed(self.direction)


def logistic(
    features: Float[np.ndarray, "prompt feature"], outcome: Bool[np.ndarray, "prompt"]
) -> tuple[Float[np.ndarray, "feature"], float]:
    """Weights and intercept of a logistic regression, with a ridge of 1 on standardised features; zeros if outcomes are alike."""
    if outcome.all() or not outcome.any():
        return np.zeros(features.shape[1]), 0.0
    mean, spread = features.mean(0), features.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    model = LogisticRegression(C=1.0, max_iter=1000).fit((features - mean) / spread, outcome)
    weights = model.coef_[0] / spread
    return weights, float(model.intercept_[0] - mean @ weights)


def prompting(fit: Fit) -> Steering:
    """A safety sentence and no edit, as a system turn in place of the template's own, or at the head of the user turn.

    For the embedded model it is in words of its language, in which no such instruction was learned. `InputError` where the
    template shows it in neither place.
    """
    tokenizer = fit.subject.tokenizer
    assert tokenizer is not None
    embedded = "be helpful<|end|>" in str(tokenizer.chat_template)
    sentence = EMBEDDED_SENTENCE if embedded else SENTENCE
    tokens.encode_behind(tokenizer, sentence, chat.STAND_IN)
    return Steering("prompting", system=sentence)


def fixed(fit: Fit, *, layers: Collection[int] | None = None) -> Steering:
    """The same rejection vector for every prompt: h <- h + v_R / (number of steered layers), since each layer adds its own."""
    chosen = checked_layers(fit, layers)
    vectors = fit.direction("rejection") / len(chosen)
    return Steering("fixed", tuple(Edit(at, "resid_post", constant(vectors[at]), blind=True) for at in chosen))


def cast(fit: Fit) -> Steering:
    """The fixed rejection vector, added only where the prompt looks harmful at the layer nearest to mid depth (CAST).

    The condition is the position at the last token between the benign and the harmful centroid of discover, read from an
    unsteered pass. Ours: the threshold maximises balanced accuracy on validate.
    """
    fit.need("benign")
    at = fit.subject.n_layers // 2
    x, harmful = fit.last["resid_post"][:, at], fit.harmful
    discover, validate = fit.mask("discover"), fit.mask("validate")
    _need_both_kinds(fit)
    line = Scale.between(x[discover & ~harmful].mean(0, dtype=float), x[discover & harmful].mean(0, dtype=float))
    false, true, cuts = roc_curve(harmful[validate], line.position(x[validate]))
    cut = float(cuts[1:][np.argmax((true - false)[1:])])

    def is_beyond(prompt: Prompt) -> Float[Tensor, "prompt"]:
        return (line.position_on_device(prompt.read["condition"]) >= cut).float()

    return Steering("cast", fixed(fit).edits, gate=is_beyond, reads=(Read("condition", at),))


def alphasteer(fit: Fit, *, layers: Collection[int] | None = None) -> Steering:
    """A linear map from the activation to the rejection vector that is nearly zero on benign prompts (AlphaSteer).

    It sees the `KEEP` share of dimensions in which benign activations (uncentred) vary least; a ridge fit gives every harmful
    prompt of discover v_R. Ours: it reads the last token, its result is divided by the number of layers and added to all tokens;
    the ridge is relative to the mean variance in those dimensions.
    """
    fit.need("benign")
    chosen = checked_layers(fit, layers)
    vectors = fit.direction("rejection") / len(chosen)
    harmful, benign = fit.mask("discover", "refused", "complied"), fit.mask("discover", "benign")
    edits = []
    for layer in chosen:
        x = fit.last["resid_post"][:, layer].astype(float)
        low = low_variance(x[benign], KEEP)
        seen = x[harmful] @ low
        gram = seen.T @ seen
        gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        # All are given one vector, so the map has rank 1: it reads one direction, and writes v_R times what it read.
        read = low @ np.linalg.solve(gram, seen.sum(0))
        edits.append(Edit(layer, "resid_post", partial(_mapped, Placed(read), Placed(vectors[layer]))))
    return Steering("alphasteer", tuple(edits))


def low_variance(x: Float[np.ndarray, "prompt d"], keep: float) -> Float[np.ndarray, "d kept"]:
    """An orthonormal basis of the share of dimensions with the least second moment."""
    _, vectors = np.linalg.eigh(x.T @ x / len(x))
    return vectors[:, : max(1, round(keep * x.shape[1]))]


def targeted_layers(fit: Fit, *, layers: Collection[int], components: int = 8) -> Steering:
    """m_l <- m_l + clip(tau_l - vhat_l . m_l, 0, c_l) u_l on MLP outputs at the last token: only what is missing is added.

    v_l = mean(m_l | refused) - mean(m_l | complied), tau_l the refused mean along it, c_l the 95th percentile of the complied
    prompts' gaps. u_l is v_l without the top principal components of benign m_l, rescaled so that vhat_l . u_l = 1.

    Raises:
        InputError: a class is missing, or u_l keeps under 0.2 of v_l's norm, so steering could not spare benign prompts.
    """
    chosen = checked_layers(fit, layers)
    fit.need("benign")
    vectors, refused = fit.direction("rejection", "mlp_out"), fit.means("mlp_out")["refused"]
    m = fit.last["mlp_out"].astype(float)
    edits = []
    for layer in chosen:
        v = unit(vectors[layer])
        u = preserving(vectors[layer], m[fit.mask("discover", "benign"), layer], components, f"layer {layer}")
        tau = float(refused[layer] @ v)
        gaps = tau - m[fit.mask("discover", "complied"), layer] @ v
        most = max(0.0, float(np.quantile(gaps, GAP_QUANTILE)))
        edits.append(Edit(layer, "mlp_out", partial(_close, Placed(v), Placed(u), tau, most), "last"))
    return Steering("targeted layers", tuple(edits))


def preserving(
    v: Float[np.ndarray, "width"], benign: Float[np.ndarray, "prompt width"], components: int, name: str
) -> Float[np.ndarray, "width"]:
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
    return kept / (unit(v) @ kept)


def gated(fit: Fit, steering: Steering) -> Steering:
    """The steering times a calibrated probability that the prompt is harmful, or 0 where that is below a threshold.

    It is read at the instruction's last token in an unsteered pass, at the layer in the middle third of the depth that separates
    harmful from benign prompts of discover best. Slope and threshold come from validate: it opens for at most `MAX_FIRING` of its
    other prompts (of fewer than 1 / MAX_FIRING, for none).
    """
    harmful, discover, validate = fit.harmful, fit.mask("discover"), fit.mask("validate")
    _need_both_kinds(fit)
    n, x = fit.subject.n_layers, fit.instruction.astype(float)
    candidates = [at for at in range(n) if 1 / 3 <= depth(at, n) <= 2 / 3] or [n // 2]
    kinds = discover & ~harmful, discover & harmful
    lines = {at: Scale.between(*(x[kind, at].mean(0) for kind in kinds)) for at in candidates}
    quality = {at: roc_auc_score(harmful[discover], line.position(x[discover, at])) for at, line in lines.items()}
    best = max(lines, key=lambda at: (quality[at], -at))
    at = lines[best].position(x[validate, best])
    weights, offset = logistic(at[:, None], harmful[validate])
    values = np.sort(1 / (1 + np.exp(-(weights[0] * at[~harmful[validate]] + offset))))[::-1]
    threshold = float(values[int(MAX_FIRING * len(values))])

    def probability(prompt: Prompt) -> Float[Tensor, "prompt"]:
        at = lines[best].position_on_device(prompt.read["gate"])
        value = torch.sigmoid(float(weights[0]) * at + offset)
        return torch.where(value > threshold, value, 0.0).float()

    return replace(steering, gate=probability, reads=(Read("gate", best, fit.tail),))


def checked_layers(fit: Fit, layers: Collection[int] | None) -> list[int]:
    """The layers to steer: all of them unless named; `InputError` for one that is not there."""
    chosen = sorted(set(range(fit.subject.n_layers) if layers is None else layers))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < fit.subject.n_layers:
        raise InputError(f"layers {chosen}: expected some of 0 to {fit.subject.n_layers - 1}")
    return chosen


def unit(vector: Float[np.ndarray, "width"]) -> Float[np.ndarray, "width"]:
    """The vector at length 1; `InputError` for a zero vector."""
    norm = np.linalg.norm(vector)
    if not norm > 0:
        raise InputError("a direction has length 0: two classes have the same mean; are the labels right?")
    return vector / norm


def constant(vector: Float[np.ndarray, "width"]) -> Delta:
    """An edit's delta that adds the same vector everywhere."""
    added = Placed(vector)
    return lambda x, _: added.like(x).expand(len(x), 1, -1)


def _mapped(read: Placed, written: Placed, x: Float[Tensor, "prompt pos width"], prompt: Prompt) -> Tensor:
    at = x[:, -1]
    return (at @ read.like(x))[:, None, None] * written.like(x)


def _close(v: Placed, u: Placed, tau: float, most: float, x: Float[Tensor, "prompt pos width"], _: Prompt) -> Tensor:
    return (tau - x @ v.like(x)).clamp(0.0, most)[..., None] * u.like(x)


def _need_both_kinds(fit: Fit) -> None:
    found = [fit.harmful[fit.mask(split)] for split in ("discover", "validate")]
    if any(one.all() or not one.any() for one in found):
        raise InputError("a gate needs harmful and other prompts in discover and in validate: supply both kinds")
