"""The check of every model before it is used: it asserts what later code assumes, by calling what later code calls.

Are the sites what they are called, does each part read and write what its name says, and does the replay give what the
plain library gives? Every comparison is written so that NaN fails it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from companion.base import device
from companion.base.chat import template_facts
from companion.base.errors import InputError, explained
from companion.model import replay
from companion.model.activations import CleanRun, clean_run, first, prefix_once
from companion.model.architecture import ModelFacts, Subject, end_tokens, written_vectors
from companion.model.interventions import Patch, component_output, position_mask, projection
from companion.model.readout import frozen_norm, is_centred, logits

# Share of the largest compared value; the library's float64 casts to float32 inside its norms.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
N_POS = 10
_UNKNOWN = "its blocks are put together in a way that companion/model/architecture.py does not know; add the family's names there"
_FAMILY = "use a model of a known family"


@torch.no_grad()
def verify(subject: Subject) -> float:
    """Compares kept activations and replayed interventions with the plain library, on random tokens.

    Returns the largest difference found, as a share of the largest value compared: the model's rounding noise. Raises InputError:
    a site is not what its name says, a part reads something else, or the replay does not give the model's numbers.
    """
    kind, attention = f"{subject.name}: a {type(subject.model).__name__}", subject.model.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise InputError(
            f"{subject.name}: attention {attention!r} takes no mask that the replay can cut to cells; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    if any(parts.down_proj is None for parts in subject.layers):
        raise InputError(
            f"{subject.name}: its MLP has no down projection by a known name (a mixture of experts?), so its neurons are "
            "not found; use a dense model"
        )
    with explained(f"{kind} could not be run on random tokens", _UNKNOWN):
        vocabulary = subject.model.get_input_embeddings().num_embeddings
        seeded = (torch.Generator().manual_seed(seed) for seed in (0, 1))
        drawn = [torch.randint(0, vocabulary, (2, N_POS), generator=one) for one in seeded]
        base, source = (clean_run(subject, tokens.to(subject.device)) for tokens in drawn)
    with explained(f"{kind} has parts that cannot be called alone", _UNKNOWN):
        noise = check_sites(subject, base)
    with explained(f"{kind} cannot be replayed from one of its layers", _FAMILY):
        noise = max(noise, check_replay(subject, base, source))
    with explained(f"{kind} cannot be read in two parts", _FAMILY):
        check_shared_prefix(subject, base.tokens)
    return noise


@torch.no_grad()
def check_sites(subject: Subject, run: CleanRun) -> float:
    """Sites are what their names say, and parts that are called alone give what they gave: the largest relative difference."""
    for site in ("resid_post", "attn_out", "mlp_out", "z", "neurons"):
        if (n_seen := len(getattr(run, site))) != subject.n_layers:
            raise InputError(f"{subject.name}: {site} was seen in {n_seen} of {subject.n_layers} layers; {_UNKNOWN}")
    compared = (one for layer in range(subject.n_layers) for one in _in_layer(subject, run, layer))
    worst = max(_same(subject, *one) for one in compared)
    last, plain = run.resid_post[-1], subject.model(input_ids=run.tokens, use_cache=False).logits
    read = _same(subject, logits(subject, last), plain, "final norm and unembedding do not give the model's logits")
    normed, frozen = subject.final_norm(last), frozen_norm(subject.final_norm, last, last)
    return max(worst, read, _same(subject, frozen, normed, "the final norm with its own scale frozen is another norm"))


def _in_layer(subject: Subject, run: CleanRun, layer: int) -> Iterator[tuple[Tensor, Tensor, str]]:
    """What must be the same in a layer, pair by pair, with what is said if it is not."""
    parts, below, wanted = subject.layers[layer], run.resid_pre[layer], run.mlp_out[layer]
    behind = below + run.attn_out[layer]
    yield behind + wanted, run.resid_post[layer], f"resid_pre + attn_out + mlp_out is not resid_post in layer {layer}"
    _check_heads(subject, run, layer)
    made, beside = (component_output(subject, run, "mlp_out", layer, read) for read in (behind, below))
    if _gap(beside, wanted) < _gap(made, wanted) and _gap(beside, wanted) <= TOLERANCE[subject.dtype]:
        raise InputError(
            f"{subject.name}: its blocks compute attention and MLP side by side (parallel residual), and the measures "
            "here are defined for an MLP that reads what attention wrote; use a model with sequential blocks"
        )
    yield made, wanted, f"the MLP, given the stream behind attention, writes something else in layer {layer}"
    own = component_output(subject, run, "attn_out", layer, below)
    yield own, run.attn_out[layer], f"attention, called alone, writes something else in layer {layer}"
    for site, post, out in (("head", parts.attn_post, "attn_out"), ("neuron", parts.mlp_post, "mlp_out")):
        module, entries = projection(parts, site), run.site(site, layer)
        raw = module(entries)
        what = f"{site} entries do not project to {out} in layer {layer}"
        yield raw if post is None else post(raw), run.site(out, layer), what
        linear = entries @ written_vectors(module) + module(torch.zeros_like(entries))
        yield linear, raw, f"{out} is no linear map of {site} entries in layer {layer}"


def check_replay(subject: Subject, base: CleanRun, source: CleanRun) -> float:
    """Interventions at every site and at about four layers, against one full forward pass each."""
    patches = [
        Patch(site, layer, position_mask(base.tokens, column), 0 if site in ("head", "neuron") else None)
        for layer in range(0, subject.n_layers, max(1, subject.n_layers // 4))
        for site, column in (("resid_post", 1), ("attn_out", -1), ("mlp_out", 4), ("head", 2), ("neuron", -1))
    ]
    fast = replay.interchange(subject, base, source, patches)
    plain = replay.interchange_full_forward(subject, base, source, patches)
    return _same(subject, fast, plain, "a replay of its layers differs from the model itself", _FAMILY)


def check_shared_prefix(subject: Subject, tokens: Int[Tensor, "pair pos"]) -> None:
    """Every layer that computes a prefix once for all rows gives what it gives where each row computes its own."""
    shared = tokens.shape[1] // 2
    run = clean_run(subject, torch.cat([tokens[:1, :shared].expand(len(tokens), -1), tokens[:, shared:]], 1), shared=0)
    cache = DynamicCache()
    with prefix_once(subject, shared):
        for layer, (parts, call) in enumerate(zip(subject.layers, run.calls, strict=True)):
            made = first(parts.block(run.resid_pre[layer], **call, past_key_values=cache))
            kept, wanted = cache.layers[layer], (run.resid_post[layer], run.keys[layer], run.values[layer])
            what = f"tokens behind a prefix that is computed once for all rows are others in layer {layer}"
            for got, own in zip((made, kept.keys, kept.values), wanted, strict=True):
                _same(subject, got, own, what, _FAMILY)


def _check_heads(subject: Subject, run: CleanRun, layer: int) -> None:
    """Heads lie side by side in the output projection's input: at the first token each can only read its own value."""
    z, values = run.z[layer][:, 0], run.values[layer][:, :, 0]
    n_pairs, n_keys = values.shape[:2]
    if z.shape[-1] != subject.n_heads * values.shape[-1] or subject.n_heads % n_keys:
        raise InputError(
            f"{subject.name}: layer {layer} hands {z.shape[-1]} numbers to its output projection, which are not "
            f"{subject.n_heads} heads of {values.shape[-1]}; {_UNKNOWN}"
        )
    heads = z.view(n_pairs, subject.n_heads, -1).double()
    own = values.repeat_interleave(subject.n_heads // n_keys, dim=1).double()
    share = (heads * own).sum(-1, keepdim=True) / own.pow(2).sum(-1, keepdim=True).clamp(min=1e-30)
    foreign = (heads - share * own).abs().max()  # a gate or a sink may scale what a head reads, and nothing else
    if not foreign <= 10 * TOLERANCE[subject.dtype] * heads.abs().max():
        raise InputError(
            f"{subject.name}: the heads of layer {layer} do not lie side by side in the input of its output projection; "
            f"{_UNKNOWN}"
        )


def _gap(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest value; 0 where both are 0."""
    difference, scale = float((got - wanted).abs().max()), float(wanted.abs().max())
    return difference / scale if scale else difference


def _same(subject: Subject, got: Tensor, wanted: Tensor, what: str, hint: str = _UNKNOWN) -> float:
    gap = _gap(got, wanted)
    if not gap <= TOLERANCE[subject.dtype]:
        raise InputError(f"{subject.name}: {what} (off by {gap:.1e} of the largest value); {hint}")
    return gap


def read_facts(subject: Subject, noise: float, adapter: str = "") -> ModelFacts:
    """What is known of a checked model, `noise` being what the check found."""
    config, mlp = subject.model.config, subject.layers[0].mlp
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    norm = "LayerNorm" if is_centred(subject.final_norm) else "RMSNorm"
    embedding = subject.model.get_input_embeddings().weight
    named = str if subject.tokenizer is None else subject.tokenizer.convert_ids_to_tokens
    return ModelFacts(
        architecture=type(subject.model).__name__, layers=subject.n_layers, heads=subject.n_heads,
        key_heads=getattr(config, "num_key_value_heads", None) or subject.n_heads,
        width=subject.d_model, neurons=subject.d_mlp,
        norm=norm if getattr(subject.final_norm, "weight", None) is not None else f"{norm} without weights",
        norm_after=subject.post_norm, gated=hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj"),
        windows=(window,) if window else (), soft_cap=subject.soft_cap, tied=subject.unembedding[0] is embedding,
        vocabulary=len(subject.unembedding[0]), noise=noise, adapter=adapter, device=device.facts(subject.device),
        ends={str(named(token)): places for token, places in end_tokens(subject).items()},
        template=None if subject.tokenizer is None else template_facts(subject.tokenizer),
    )  # fmt: skip
