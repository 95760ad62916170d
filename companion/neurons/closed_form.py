"""Every neuron of the last layer at the last token, exactly and at once, without running anything.

A last-layer neuron adds d_j w_j to the last residual stream h: its own change times its output vector. The final
norm and the unembedding U are all that follows, so with the norm's gain g and width D

    logit_v(j) = (z_v + d_j Q_vj) / s_j + U_v b,   z = U (g h),   Q_vj = U_v (g w_j),
    s_j^2 = (|h|^2 + 2 d_j h.w_j + d_j^2 |w_j|^2) / D + eps,

and for LayerNorm the same on centred h and w_j. Families with a norm behind the MLP go through the grid instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.model import replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject, written_vectors
from companion.model.interventions import Patch, projection
from companion.model.readout import is_centred, is_usable, log_probs, logits, norm_gain

CACHED = 1 << 17  # numbers that stay in a processor core's cache while they are exponentiated


BLOCK = 1 << 24  # numbers of the neuron-by-vocabulary table that are alive at once


@dataclass(frozen=True)
class _Terms:
    """The pieces of the formula: `z` and `bias` for the wanted rows, one over `s_j` for every neuron."""

    z: Float[Tensor, "pair row"]
    bias: Float[Tensor, row] | float
    change: Float[Tensor, "pair neuron"]
    inverse_scale: Float[Tensor, "pair neuron"]
    vectors: Float[Tensor, "neuron d"]  # g w_j
    unembed: Float[Tensor, "row d"]


@torch.no_grad()
def last_layer_neurons(
    subject: Subject, base: CleanRun, source: CleanRun, rows: Int[Tensor, row], *, freeze_norm: bool = False
) -> Float[Tensor, "pair neuron row"]:
    """Logits of the wanted vocabulary rows after each last-layer neuron, on its own, is set to the source's at the
    last token.

    With `freeze_norm` the final norm keeps the base's scale, so that only the neuron's direct write counts. Every
    neuron of a large model is one row of output; ask for few vocabulary rows.
    """
    if not _is_closed(subject):
        like = base.resid_post[-1][:, None, -1:] if freeze_norm else None
        return _by_grid(subject, base, source, lambda resid: logits(subject, resid, rows, norm_like=like))
    terms = _terms(subject, base, source, rows, freeze_norm)
    moved = terms.change[..., None] * (terms.vectors @ terms.unembed.T)
    return (terms.z[:, None] + moved) * terms.inverse_scale[..., None] + terms.bias


@torch.no_grad()
def last_layer_log_odds(
    subject: Subject,
    base: CleanRun,
    source: CleanRun,
    comply: Sequence[int],
    refuse: Sequence[int],
    *,
    freeze_norm: bool = False,
) -> Float[Tensor, "pair neuron"]:
    """log p(any comply token) - log p(any refuse token) after each neuron's patch, in log-odds (float64)."""
    rows = torch.tensor([*comply, *refuse], device=subject.device)
    both = last_layer_neurons(subject, base, source, rows, freeze_norm=freeze_norm).double()
    return both[..., : len(comply)].logsumexp(-1) - both[..., len(comply) :].logsumexp(-1)


@torch.no_grad()
def last_layer_log_probs(
    subject: Subject, base: CleanRun, source: CleanRun, rows: Int[Tensor, row]
) -> Float[Tensor, "pair neuron row"]:
    """Log-probabilities of the wanted rows over the whole vocabulary after each neuron's patch, in nats."""
    if not _is_closed(subject):
        return _by_grid(subject, base, source, lambda resid: log_probs(subject, resid, rows))
    wanted = last_layer_neurons(subject, base, source, rows)
    everything = torch.arange(len(subject.unembedding[0]), device=subject.device)
    terms = _terms(subject, base, source, everything, freeze_norm=False)
    return wanted - _normaliser(terms)[..., None]


def _is_closed(subject: Subject) -> bool:
    return not subject.post_norm and subject.soft_cap is None


def _terms(subject: Subject, base: CleanRun, source: CleanRun, rows: Int[Tensor, row], freeze_norm: bool) -> _Terms:
    last = subject.n_layers - 1
    norm = subject.final_norm
    gain, norm_bias, eps = norm_gain(norm)
    resid = base.resid_post[last][:, -1]
    vectors = written_vectors(projection(subject.layers[last], "neuron"))
    if is_centred(norm):
        resid, vectors = (x - x.mean(-1, keepdim=True) for x in (resid, vectors))
    change = (source.site("neuron", last) - base.site("neuron", last))[:, -1]
    square = resid.pow(2).sum(-1, keepdim=True)
    if not freeze_norm:
        square = square + 2 * change * (resid @ vectors.T) + change.pow(2) * vectors.pow(2).sum(-1)
    weight, bias = subject.unembedding
    unembed = weight[rows]
    total_bias = (0.0 if norm_bias is None else unembed @ norm_bias) + (0.0 if bias is None else bias[rows])
    inverse = torch.rsqrt(square / subject.d_model + eps).expand_as(change)
    return _Terms((gain * resid) @ unembed.T, total_bias, change, inverse, gain * vectors, unembed)


def _normaliser(terms: _Terms) -> Float[Tensor, "pair neuron"]:
    """Log of the sum of exponentiated logits, over blocks of neurons that share their table with all pairs."""
    result = torch.empty_like(terms.change)
    top = terms.z.amax(-1, keepdim=True)  # shifting by it keeps the exponentials in range
    z = terms.z - top
    n_rows = len(terms.unembed)
    cached = (CACHED if z.device.type == "cpu" else BLOCK) // n_rows
    for block in _blocks(terms.change.shape[1], BLOCK // n_rows):
        table = terms.vectors[block] @ terms.unembed.T
        for i in range(len(z)):
            inverse, factor = terms.inverse_scale[i, block, None], terms.change[i, block, None]
            for part in _blocks(len(table), cached):
                logits_of_part = partial(_shifted, z[i], table[part], factor[part], inverse[part], terms.bias)
                result[i, block][part] = _log_sum_exp(logits_of_part)
    return result + top * terms.inverse_scale


def _shifted(
    z: Float[Tensor, row],
    table: Float[Tensor, "neuron row"],
    change: Float[Tensor, "neuron 1"],
    inverse_scale: Float[Tensor, "neuron 1"],
    bias: Float[Tensor, row] | float,
) -> Float[Tensor, "neuron row"]:
    moved = (z * inverse_scale).addcmul_(table, change * inverse_scale)
    return moved.add_(bias) if isinstance(bias, Tensor) else moved


def _log_sum_exp(make: Callable[[], Float[Tensor, "neuron row"]]) -> Float[Tensor, neuron]:
    """Without looking for the maximum first, unless that overflows: one pass less."""
    total = make().exp_().sum(-1)
    return total.log() if is_usable(total) else make().logsumexp(-1)


def _blocks(n: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, start + size) for start in range(0, n, size))


def _by_grid(
    subject: Subject, base: CleanRun, source: CleanRun, readout: Callable[[Tensor], Tensor]
) -> Float[Tensor, "pair neuron row"]:
    last = torch.zeros_like(base.tokens, dtype=torch.bool)
    last[:, -1] = True
    patches = [Patch("neuron", subject.n_layers - 1, last, neuron) for neuron in range(subject.d_mlp)]
    return replay.interchange(subject, base, source, patches, readout=readout)[:, :, 0]
