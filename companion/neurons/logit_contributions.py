"""What the final norm and the openers read of sets of last-layer neurons, without a vector for each set.

A set S adds w_S, the sum of d_j w_j, to the final residual stream h. The openers' logits need U (g h) and the sum of
d_j U (g w_j), the norm's scale |h|^2 + 2 h.w_S + |w_S|^2, and |w_S|^2 the products of the members' vectors with each other:
a few numbers for each member where the vector has one for each channel. In float64; for LayerNorm on centred h and w_j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.model.architecture import Subject, written_vectors
from companion.model.interventions import projection
from companion.model.readout import is_centred, norm_gain
from companion.prompts.tokens import Openers


@dataclass(frozen=True)
class Reads:
    """A model's last layer as its openers read it: w_j, U (g w_j) and U g, the norm's epsilon, and the logits' bias."""

    vectors: Float[Tensor, "neuron d"]
    outputs: Float[Tensor, "neuron row"]
    unembed: Float[Tensor, "row d"]
    bias: Float[Tensor, row]
    eps: float
    n_comply: int
    centred: bool


def reads(subject: Subject, openers: Openers) -> Reads | None:
    """None where something stands between the MLP's write and the logits that is not a norm alone."""
    if subject.post_norm or subject.soft_cap is not None:
        return None
    gain, norm_bias, eps = norm_gain(subject.final_norm)
    rows = torch.tensor(openers.comply + openers.refuse, device=subject.device)
    weight, head_bias = subject.unembedding
    chosen = weight[rows].double()
    bias = torch.zeros(len(rows), dtype=torch.float64, device=chosen.device)
    for part in (
        None if norm_bias is None else chosen @ norm_bias.double(),
        None if head_bias is None else head_bias[rows],
    ):
        bias = bias if part is None else bias + part
    vectors = written_vectors(projection(subject.layers[-1], "neuron")).double()
    centred, unembed = is_centred(subject.final_norm), chosen * gain.double()
    vectors = vectors - vectors.mean(-1, keepdim=True) if centred else vectors
    return Reads(vectors, vectors @ unembed.T, unembed, bias, eps, len(openers.comply), centred)


def products(one: Reads, members: Int[Tensor, "... member"]) -> Float[Tensor, "... member member"]:
    """Products of the members' vectors with each other, for `joint_effects` and (upper part) `cumulative_effects`."""
    vectors = one.vectors[members]
    return vectors @ vectors.mT


def joint_effects(
    one: Reads,
    resid: Float[Tensor, "pair d"],
    change: Float[Tensor, "pair neuron"],
    members: Int[Tensor, "set member"],
    known: Float[Tensor, "set member member"],
    outputs: Float[Tensor, "set member row"],
) -> Float[Tensor, "pair set"]:
    """Change of Y1 if each set's neurons change together; `known` are their `products`, `outputs` what they write."""
    resid, change = _centred(one, resid), change.double()
    own = change[:, members].transpose(0, 1)
    square = ((own @ known) * own).sum(-1).T
    inner = (change * (resid @ one.vectors.T))[:, members].sum(-1)
    return _after(one, resid, inner, square, (own @ outputs).transpose(0, 1))


def cumulative_effects(
    one: Reads,
    resid: Float[Tensor, "pair d"],
    change: Float[Tensor, "pair neuron"],
    order: Int[Tensor, neuron],
    known: Float[Tensor, "neuron neuron"],
) -> Float[Tensor, "pair size"]:
    """Change of Y1 if the first 1, 2, ... neurons of an order change together; `known` are their `products`."""
    resid, own = _centred(one, resid), change.double()[:, order]
    # What a neuron adds to |w_S|^2: twice its product with those before it, and its own square.
    added = own * (2 * own @ known.triu(1) + own * known.diagonal())
    inner = (own * (resid @ one.vectors[order].T)).cumsum(-1)
    return _after(one, resid, inner, added.cumsum(-1), (own[..., None] * one.outputs[order]).cumsum(1))


def _centred(one: Reads, resid: Float[Tensor, "pair d"]) -> Float[Tensor, "pair d"]:
    resid = resid.double()
    return resid - resid.mean(-1, keepdim=True) if one.centred else resid


def _after(
    one: Reads,
    resid: Float[Tensor, "pair d"],
    inner: Float[Tensor, "pair set"],
    square: Float[Tensor, "pair set"],
    moved: Float[Tensor, "pair set row"],
) -> Float[Tensor, "pair set"]:
    z, size = (resid @ one.unembed.T)[:, None], resid.pow(2).sum(-1, keepdim=True)
    start = _odds(one, z, size)
    return _odds(one, z + moved, size + 2 * inner + square) - start


def _odds(
    one: Reads, unscaled: Float[Tensor, "pair set row"], size: Float[Tensor, "pair set"]
) -> Float[Tensor, "pair set"]:
    """Y1 from the logits before the norm's scale and the squared length of what the norm divides."""
    scale = torch.rsqrt(size / one.vectors.shape[1] + one.eps)
    logits = unscaled * scale[..., None] + one.bias
    return logits[..., : one.n_comply].logsumexp(-1) - logits[..., one.n_comply :].logsumexp(-1)
