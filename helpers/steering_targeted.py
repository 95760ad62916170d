"""Steering only where mediation was found: late MLP outputs or last-layer neurons, gated and in closed loop.

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
from jaxtyping import Float
from sklearn.metrics import roc_auc_score
from torch import Tensor

from helpers import steering_fit as sf
from helpers import steering_methods as sm
from helpers import steering_positions as sp
from helpers.depth import depth
from helpers.errors import InputError
from helpers.steering import Edit, Opening, Read, Steering, Where
from helpers.steering_fit import Fit
from helpers.steering_prompt import Prompt

MIN_KEPT = 0.2  # share of a direction's norm that must survive the removal of benign components
MAX_FIRING = 0.01  # share of benign prompts of validate for which the gate may open
GAP_QUANTILE = 0.95  # of the gaps of complied prompts: no correction is larger


@dataclass(frozen=True)
class GateRule:
    """p(x) = sigmoid(weight * position + offset) where it is above `threshold`, else 0."""

    layer: int
    back: int
    line: sp.Scale
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
    harmful, validate = sm.harmful_rows(fit), sf.rows(fit, "validate")
    discover = sf.rows(fit, "discover")
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
    quality = {at: roc_auc_score(harmful[discover], sp.position(line, x[discover, at])) for at, line in lines.items()}
    best = max(lines, key=lambda at: (quality[at], -at))
    at = sp.position(lines[best], x[validate, best])
    weights, offset = sp.logistic(at[:, None], harmful[validate]) or (np.zeros(1), 0.0)
    values = np.sort(1 / (1 + np.exp(-(weights[0] * at[~harmful[validate]] + offset))))[::-1]
    threshold = float(values[int(max_firing * len(values))])
    return GateRule(best, 0 if token == "last" else fit.tail, lines[best], float(weights[0]), offset, threshold)


def _line(x: Float[np.ndarray, "prompt d"], harmful: np.ndarray, discover: np.ndarray) -> sp.Scale:
    return sp.scale(x[discover & ~harmful].mean(0), x[discover & harmful].mean(0))


def opening(rule: GateRule) -> tuple[Opening, tuple[Read, ...]]:
    """The gate as a steering takes it. It is read from an unsteered pass, so no edit can change it."""
    return partial(_open, rule), (Read("gate", rule.layer, rule.back, plain=True),)


def _open(rule: GateRule, prompt: Prompt) -> Float[Tensor, "prompt"]:
    value = torch.sigmoid(rule.weight * sp.position_of(rule.line, prompt.read["gate"]) + rule.offset)
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
    chosen = sm.layers_of(fit, [at for at in range(n) if depth(at, n) > 2 / 3] if layers is None else layers)
    sf.need(fit, "benign")
    vectors, means = sf.rejection(fit, "mlp_out"), sf.directions(fit, "mlp_out")
    assert means.refused is not None
    m = fit.last["mlp_out"].astype(float)
    edits = []
    for layer in chosen:
        v = sm.unit(vectors[layer])
        u = preserving(vectors[layer], m[sf.rows(fit, "discover", "benign"), layer], components, f"layer {layer}")
        tau = float(means.refused[layer] @ v)
        gaps = tau - m[sf.rows(fit, "discover", "complied"), layer] @ v
        most = max(0.0, float(np.quantile(gaps, GAP_QUANTILE)))
        loop = partial(_close, torch.tensor(v), torch.tensor(u), tau, most)
        edits.append(Edit(layer, "mlp_out", loop, where))
    return _gated(fit, Steering("targeted layers", tuple(edits), strength), gated, gate)


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
    made: np.ndarray = kept / (sm.unit(v) @ kept)
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
    sf.need(fit, "refused")
    chosen = {fit.subject.n_layers - 1: range(fit.subject.d_mlp)} if neurons is None else neurons
    means = sf.directions(fit, "neurons").refused
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
