"""Published ways to steer, each as `method(fit, strength, **extras) -> Steering`.

Layers default to all of them; vectors are added to every token of the prompt and to none of the answer, unless it says
otherwise. Sources: refusal direction and its ablation, Arditi et al. 2406.11717; CAST, Lee et al. 2409.05907; AlphaSteer,
Sheng et al. 2506.07022. They are written anew from their descriptions; where those leave room the docstring says what is ours.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from sklearn.metrics import roc_curve
from torch import Tensor

from helpers import steering_fit as sf
from helpers import steering_positions as sp
from helpers.errors import InputError
from helpers.steering import Edit, Read, Steering, Where
from helpers.steering_fit import Fit
from helpers.steering_prompt import Prompt

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
    vectors = sf.rejection(fit)
    edits = tuple(
        Edit(layer, "resid_post", constant(vectors[layer]), where, blind=True) for layer in layers_of(fit, layers)
    )
    return Steering("fixed", edits, strength)


def ablation(fit: Fit, strength: float = 1.0, *, layers: Collection[int] | None = None) -> Steering:
    """The harmfulness direction is taken out of every token, generated ones too: h <- h - strength (vhat_H . h) vhat_H."""
    vectors = sf.harmfulness(fit)
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
    sf.need(fit, "benign")
    at = fit.subject.n_layers // 2 if layer is None else layer
    x, harmful = fit.last["resid_post"][:, at], harmful_rows(fit)
    discover, validate = (sf.rows(fit, split) for split in ("discover", "validate"))
    line = sp.scale(x[discover & ~harmful].mean(0, dtype=float), x[discover & harmful].mean(0, dtype=float))
    _both_kinds(harmful[validate])
    false, true, cuts = roc_curve(harmful[validate], sp.position(line, x[validate]))
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
    sf.need(fit, "benign")
    vectors = sf.rejection(fit)
    harmful, benign = sf.rows(fit, "discover", "refused", "complied"), sf.rows(fit, "discover", "benign")
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


def unit(vector: Float[np.ndarray, "width"]) -> Float[np.ndarray, "width"]:
    """The vector at length 1; `InputError` for a zero vector."""
    norm = np.linalg.norm(vector)
    if not norm > 0:
        raise InputError("a direction has length 0: two classes have the same mean; are the labels right?")
    made: np.ndarray = vector / norm
    return made


def constant(vector: Float[np.ndarray, "width"]) -> partial[Tensor]:
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


def _beyond(line: sp.Scale, cut: float, prompt: Prompt) -> Float[Tensor, "prompt"]:
    return (sp.position_of(line, prompt.read["condition"]) >= cut).float()


def _both_kinds(harmful: np.ndarray) -> None:
    if harmful.all() or not harmful.any():
        raise InputError("a gate needs harmful and other prompts in the split validate: supply both kinds")
