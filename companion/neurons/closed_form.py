"""The last layer at the last token in closed form: each neuron on its own, and sets of neurons, without running anything.

A last-layer neuron adds d_j w_j to the last residual stream h: its own change times its output vector. The final
norm and the unembedding U are all that follows, so with the norm's gain g and width D

    logit_v(j) = (z_v + d_j Q_vj) / s_j + U_v b,   z = U (g h),   Q_vj = U_v (g w_j),
    s_j^2 = (|h|^2 + 2 d_j h.w_j + d_j^2 |w_j|^2) / D + eps,

and for LayerNorm the same on centred h and w_j. A set S adds the sum of d_j w_j, and |w_S|^2 needs the products of its members'
vectors with each other. Single neurons are computed in the model's precision, sets in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion.base.device import running_sum
from companion.model import readout, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject, written_vectors
from companion.model.interventions import Patch, position_mask, projection
from companion.model.readout import BLOCK_LOGITS, blocks_of_rows, is_centred, norm_gain
from companion.prompts.tokens import Openers

LOST: Final = 1e-30  # a sum of exponentials below it may hold numbers that float32 keeps with fewer digits
OUTPUT_BYTES: Final = 2**29  # of what the last layer's neurons add to all logits, kept for the batches of a sweep


def is_closed(subject: Subject) -> bool:
    """Whether a norm and the unembedding are all that follows the MLP; other families are replayed."""
    return not subject.post_norm and subject.soft_cap is None


def _centred(centred: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as the final norm scales them: without their mean if it is a LayerNorm."""
    return tuple(tensor - tensor.mean(-1, keepdim=True) for tensor in tensors) if centred else tensors


def last_layer_vectors(subject: Subject) -> Float[Tensor, "neuron d"]:
    """What each last-layer neuron writes per unit."""
    return written_vectors(projection(subject.layers[-1], "neuron"))


@torch.no_grad()
def last_layer_neurons(
    subject: Subject, base: CleanRun, source: CleanRun, rows: Int[Tensor, "row"]
) -> Float[Tensor, "pair neuron row"]:
    """Logits of a few vocabulary rows after each last-layer neuron, on its own, is set to the source's at the last token."""
    last = subject.n_layers - 1
    if not is_closed(subject):
        return _replayed(subject, base, source, lambda resid: readout.logits(subject, resid, rows))
    gain, norm_bias, eps = norm_gain(subject.final_norm)
    resid, vectors = _centred(is_centred(subject.final_norm), base.resid_post[last][:, -1], last_layer_vectors(subject))
    change = (source.site("neuron", last) - base.site("neuron", last))[:, -1]
    square = resid.pow(2).sum(-1, keepdim=True)
    square = square + 2 * change * (resid @ vectors.T) + change.pow(2) * vectors.pow(2).sum(-1)
    inverse_scale = torch.rsqrt(square / subject.d_model + eps)
    weight, head_bias = subject.unembedding
    unembed = weight[rows]
    bias = (0.0 if norm_bias is None else unembed @ norm_bias) + (0.0 if head_bias is None else head_bias[rows])
    moved = change[..., None] * ((gain * vectors) @ unembed.T)
    return (((gain * resid) @ unembed.T)[:, None] + moved) * inverse_scale[..., None] + bias


def _replayed(
    subject: Subject, base: CleanRun, source: CleanRun, read: Callable[[Tensor], Tensor]
) -> Float[Tensor, "pair neuron ..."]:
    where, last = position_mask(base.tokens, -1), subject.n_layers - 1
    patches = [Patch("neuron", last, where, neuron) for neuron in range(subject.d_mlp)]
    return replay.interchange(subject, base, source, patches, readout=read)[:, :, 0]


@torch.no_grad()
def last_layer_log_odds(
    subject: Subject, base: CleanRun, source: CleanRun, openers: Openers
) -> Float[Tensor, "pair neuron"]:
    """log p(any comply) - log p(any refuse token) after each neuron's patch (float64); refusals against the rest are replayed."""
    if openers.rest:
        return _replayed(subject, base, source, partial(readout.log_odds_against_rest, subject, rows=openers.refuse))
    rows, n_comply = subject.tensor([*openers.comply, *openers.refuse]), len(openers.comply)
    both = last_layer_neurons(subject, base, source, rows).double()
    return both[..., :n_comply].logsumexp(-1) - both[..., n_comply:].logsumexp(-1)


@torch.no_grad()
def written_log_odds(
    subject: Subject, resid: Float[Tensor, "pair d"], change: Float[Tensor, "pair neuron"],
    vectors: Float[Tensor, "neuron d"], refuse: Sequence[int], frozen: Bool[Tensor, "pair"] | None = None,
    said: Float[Tensor, "neuron row"] | None = None,
) -> Float[Tensor, "pair neuron"]:  # fmt: skip
    """log p(any other token) - log p(any refuse token) if each neuron on its own changes what it writes (float64).

    The whole vocabulary, for a model that `is_closed`: the neurons' outputs U (g w_j) are `said`, or made once for all
    pairs, some neurons at a time. Where a pair is `frozen` the final norm keeps the scale of its `resid`.
    """
    gain, norm_bias, eps = norm_gain(subject.final_norm)
    weight, head_bias = subject.unembedding
    resid, vectors = _centred(is_centred(subject.final_norm), resid, vectors)
    own = resid.pow(2).sum(-1, keepdim=True).expand_as(change)
    square = own + 2 * change * (resid @ vectors.T) + change.pow(2) * vectors.pow(2).sum(-1)
    square = square if frozen is None else torch.where(frozen[:, None], own, square)
    scale = torch.rsqrt(square / subject.d_model + eps)
    biases = ([] if norm_bias is None else [weight @ norm_bias]) + ([] if head_bias is None else [head_bias])
    unscaled, found = (gain * resid) @ weight.T, torch.empty_like(change, dtype=torch.float64)
    # All logits of a case below the scaled largest of its clean run: both sums have it, and it leaves their ratio alone.
    kind = torch.promote_types(unscaled.dtype, torch.float32)
    below = unscaled.to(kind) - unscaled.amax(-1, keepdim=True).to(kind)
    step = max(1, BLOCK_LOGITS // len(weight))
    for some in (slice(start, start + step) for start in range(0, len(vectors), step)):
        outputs = (gain * vectors[some]) @ weight.T if said is None else said[some]
        at, moved = scale[:, some, None], (scale * change)[:, some, None]
        found[:, some] = _against_rest(subject, outputs, below, at, moved, biases, refuse)
        for i in (~found[:, some].isfinite()).any(1).nonzero().flatten().tolist():  # far from its clean run
            made = ((b, outputs[:, b] * moved[i] + at[i] * unscaled[i, b]) for b in blocks_of_rows(subject, step))
            parts = ((b.start, sum((bias[b] for bias in biases), part)) for b, part in made)
            found[i, some] = readout.rest_against(parts, refuse)
    return found


@torch.no_grad()
def last_layer_outputs(subject: Subject) -> Float[Tensor, "neuron row"] | None:
    """What each last-layer neuron adds to all logits per unit, U (g w_j), for many batches; None where too large to keep."""
    (weight, _), (vectors,) = subject.unembedding, _centred(is_centred(subject.final_norm), last_layer_vectors(subject))
    if len(vectors) * weight.shape[0] * weight.element_size() > OUTPUT_BYTES:
        return None
    return (norm_gain(subject.final_norm)[0] * vectors) @ weight.T


def _against_rest(
    subject: Subject, outputs: Float[Tensor, "neuron row"], below: Float[Tensor, "pair row"],
    at: Float[Tensor, "pair neuron 1"], moved: Float[Tensor, "pair neuron 1"], biases: Sequence[Tensor],
    refuse: Sequence[int],
) -> Float[Tensor, "pair neuron"]:  # fmt: skip
    """`readout.rest_against` of the logits `at` x `below` + `moved` x `outputs`, which need no largest logit of their own.

    Not finite where an exponential overflows, or all of a sum are so small that they lose digits. A block of outputs stays
    in the processor's cache while all pairs read it.
    """
    others = torch.zeros(at.shape[:2], dtype=torch.float64, device=at.device)
    mine, kind = [list[Tensor]() for _ in at], below.dtype
    for block in blocks_of_rows(subject, len(outputs)):
        written = outputs[:, block].to(kind)
        here = [row - block.start for row in refuse if block.start <= row < block.stop]
        for i in range(len(at)):
            part = (written * moved[i]).addcmul_(at[i].to(kind), below[i, block])
            for bias in biases:
                part += bias[block]
            if here:
                mine[i].append(part[:, here].double())
                part[:, here] = -torch.inf
            others[i] += part.exp_().sum(-1)
    others = torch.where(others < LOST, 0.0, others)
    return others.log() - torch.stack([torch.cat(rows, -1).logsumexp(-1) for rows in mine])


def last_layer_both_ways(
    subject: Subject, control: CleanRun, treated: CleanRun, refuse: Sequence[int],
    said: Float[Tensor, "neuron row"] | None = None,
) -> tuple[Float[Tensor, "pair neuron"], ...]:  # fmt: skip
    """`written_log_odds` of last-layer neurons set in the control run, in the treated run, and in both with the norm frozen."""
    last = subject.n_layers - 1
    change = (treated.site("neuron", last) - control.site("neuron", last))[:, -1]
    resid = torch.cat(2 * [run.resid_post[last][:, -1] for run in (control, treated)])
    frozen = torch.arange(4, device=change.device).repeat_interleave(len(change)) >= 2
    both = torch.cat(2 * [change, -change])
    return written_log_odds(subject, resid, both, last_layer_vectors(subject), refuse, frozen, said).chunk(4)


@dataclass(frozen=True)
class OpenerReadout:
    """A model's last layer as its openers read it: w_j, U (g w_j) and U g, the norm's epsilon, and the logits' bias."""

    vectors: Float[Tensor, "neuron d"]
    outputs: Float[Tensor, "neuron row"]
    unembed: Float[Tensor, "row d"]
    bias: Float[Tensor, "row"]
    eps: float
    n_comply: int
    centred: bool

    def products(self, members: Int[Tensor, "... member"]) -> Float[Tensor, "... member member"]:
        """Products of the members' vectors with each other, for `joint_effects` and (upper part) `cumulative_effects`."""
        vectors = self.vectors[members]
        return vectors @ vectors.mT

    def joint_effects(
        self, resid: Float[Tensor, "pair d"], change: Float[Tensor, "pair neuron"], members: Int[Tensor, "set member"],
        products: Float[Tensor, "set member member"], outputs: Float[Tensor, "set member row"],
    ) -> Float[Tensor, "pair set"]:  # fmt: skip
        """Change of Y1 if each set's neurons change together; `outputs` is what its members write."""
        (resid,), change = _centred(self.centred, resid.double()), change.double()
        own = change[:, members].transpose(0, 1)
        square = ((own @ products) * own).sum(-1).T
        inner = (change * (resid @ self.vectors.T))[:, members].sum(-1)
        return self._change(resid, inner, square, (own @ outputs).transpose(0, 1))

    def cumulative_effects(
        self, resid: Float[Tensor, "pair d"], change: Float[Tensor, "pair neuron"], order: Int[Tensor, "neuron"],
        products: Float[Tensor, "neuron neuron"],
    ) -> Float[Tensor, "pair size"]:  # fmt: skip
        """Change of Y1 if the first 1, 2, ... neurons of an order change together."""
        (resid,), own = _centred(self.centred, resid.double()), change.double()[:, order]
        # What a neuron adds to |w_S|^2: twice its product with those before it, and its own square.
        added = own * (2 * own @ products.triu(1) + own * products.diagonal())
        inner = running_sum(own * (resid @ self.vectors[order].T), -1)
        return self._change(resid, inner, running_sum(added, -1), running_sum(own[..., None] * self.outputs[order], 1))

    def _change(
        self, resid: Float[Tensor, "pair d"], inner: Float[Tensor, "pair set"], square: Float[Tensor, "pair set"],
        moved: Float[Tensor, "pair set row"],
    ) -> Float[Tensor, "pair set"]:  # fmt: skip
        """From h.w_S, |w_S|^2 and the change of the logits before the norm's scale."""
        z, size = (resid @ self.unembed.T)[:, None], resid.pow(2).sum(-1, keepdim=True)
        return self._log_odds(z + moved, size + 2 * inner + square) - self._log_odds(z, size)

    def _log_odds(
        self, unscaled: Float[Tensor, "pair set row"], size: Float[Tensor, "pair set"]
    ) -> Float[Tensor, "pair set"]:
        scale = torch.rsqrt(size / self.vectors.shape[1] + self.eps)
        logits = unscaled * scale[..., None] + self.bias
        return logits[..., : self.n_comply].logsumexp(-1) - logits[..., self.n_comply :].logsumexp(-1)


def opener_readout(subject: Subject, openers: Openers) -> OpenerReadout | None:
    """None where more than a norm stands between the MLP's write and the logits, and where almost every token is an opener."""
    if openers.rest or not is_closed(subject):
        return None
    gain, norm_bias, eps = norm_gain(subject.final_norm)
    rows = subject.tensor(openers.comply + openers.refuse)
    weight, head_bias = subject.unembedding
    chosen = weight[rows].double()
    bias = chosen.new_zeros(len(rows)) if norm_bias is None else chosen @ norm_bias.double()
    bias = bias if head_bias is None else bias + head_bias[rows]
    centred, unembed = is_centred(subject.final_norm), chosen * gain.double()
    (vectors,) = _centred(centred, last_layer_vectors(subject).double())
    return OpenerReadout(vectors, vectors @ unembed.T, unembed, bias, eps, len(openers.comply), centred)
