"""A clean run: one forward pass of the plain library model, with every site and every layer's call kept.

Sites are named once for the whole companion: `resid_post` (the residual stream after a block), `attn_out` and
`mlp_out` (what a block writes into it, after a post-norm where the family has one), `head` (one head's slice of the
output projection's input, `z`) and `neuron` (one entry of the down projection's input, `neurons`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from companion.base.errors import InputError
from companion.model.architecture import Subject

Site = Literal["resid_post", "attn_out", "mlp_out", "head", "neuron"]
KEPT = ("resid", "attn_out", "mlp_out", "z", "neurons", "cache")
_KEPT_AS = {"resid_post": "resid", "attn_out": "attn_out", "mlp_out": "mlp_out", "head": "z", "neuron": "neurons"}
Layers = tuple[Tensor, ...]


@dataclass(frozen=True)
class CleanRun:
    """Everything an exact replay needs. Tuples run over layers; one that was not kept is empty.

    `resid_pre[l + 1]` is `resid_post[l]`, the same tensor. `calls[l]` holds the arguments the library passed to layer l:
    its own attention mask, rotary embeddings and position ids.
    """

    tokens: Int[Tensor, "pair pos"]
    mask: Bool[Tensor, "pair pos"] | None
    resid_pre: Layers  # each (pair, pos, d)
    resid_post: Layers
    attn_out: Layers
    mlp_out: Layers
    z: Layers  # each (pair, pos, head * head width)
    neurons: Layers  # each (pair, pos, neuron)
    keys: Layers  # each (pair, key head, pos, head width)
    values: Layers
    calls: tuple[dict[str, Any], ...]

    def site(self, site: str, layer: int) -> Float[Tensor, "pair pos width"]:
        """A site's activations at one layer; for `head` and `neuron` all of them side by side.

        Raises:
            InputError: the run was made without them (`keep`).
        """
        if not self.n_kept(site):
            raise InputError(f"the clean run holds no {site}; add {_KEPT_AS[site]!r} to clean_run's keep")
        return self._kept(site)[layer]

    def n_kept(self, site: str) -> int:
        """The number of layers of which the run holds a site."""
        return len(self._kept(site))

    def _kept(self, site: str) -> Layers:
        name = _KEPT_AS[site]
        kept: Layers = self.resid_post if name == "resid" else getattr(self, name)
        return kept


def clean_run(
    subject: Subject,
    tokens: Int[Tensor, "pair pos"],
    attention_mask: Tensor | None = None,
    *,
    keep: Iterable[str] = KEPT,
) -> CleanRun:
    """One forward pass over pairs of one length, or padded ones with a mask (1 for a token, 0 for padding).

    Padded positions count from each prompt's first real token, which the library does not do by itself. `keep`
    limits memory: among resid, attn_out, mlp_out, z, neurons, cache. A base of `interchange` needs resid, attn_out
    and cache (and what its own patches read); a source only the sites that are taken from it.
    """
    wanted = _check_keep(keep)
    mask = _check_mask(tokens, attention_mask)
    cache = DynamicCache()  # without a config it keeps every position, sliding windows included
    with torch.no_grad(), _recording(subject, wanted) as seen:
        final = subject.model.base_model(  # stops before the unembedding
            **model_inputs(tokens, mask), past_key_values=cache, use_cache=True
        ).last_hidden_state
    _refuse_nan(final, mask)
    calls = tuple(_without_state(call) for call in seen.pop("calls"))
    keep_cache = "cache" in wanted
    return CleanRun(
        tokens=tokens,
        mask=mask,
        keys=tuple(layer.keys for layer in cache.layers) if keep_cache else (),
        values=tuple(layer.values for layer in cache.layers) if keep_cache else (),
        calls=calls if keep_cache else (),
        **{name: tuple(tensors) for name, tensors in seen.items()},
    )


def model_inputs(tokens: Int[Tensor, "pair pos"], mask: Bool[Tensor, "pair pos"] | None) -> dict[str, Tensor]:
    """What the library's model is called with; it does not count padded positions from the first real token by itself."""
    if mask is None:
        return {"input_ids": tokens}
    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": position_ids}


def _refuse_nan(final: Float[Tensor, "pair pos d"], mask: Bool[Tensor, "pair pos"] | None) -> None:
    real = final if mask is None else final[mask]
    if not bool(torch.isfinite(real).all()):
        raise InputError(
            "the model returns NaN or infinity: broken weights, an overflow in half precision, or the library's float64 "
            "eager attention on left-padded prompts; use float32, and prompts of one length without padding"
        )


def _check_keep(keep: Iterable[str]) -> frozenset[str]:
    wanted = frozenset(keep)
    if unknown := wanted - set(KEPT):
        raise InputError(f"keep names {', '.join(sorted(unknown))}; expected some of {', '.join(KEPT)}")
    return wanted


def _check_mask(tokens: Tensor, attention_mask: Tensor | None) -> Bool[Tensor, "pair pos"] | None:
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise InputError(f"tokens must be integers of shape (pair, pos), not {tokens.dtype} {tuple(tokens.shape)}")
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if attention_mask.shape != tokens.shape:
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}, tokens {tuple(tokens.shape)}")
    return attention_mask.bool()


@contextmanager
def _recording(subject: Subject, wanted: frozenset[str]) -> Any:
    """Hooks on every layer; what they see is gathered by name, in the order of the layers."""
    seen: dict[str, list[Any]] = {
        name: [] for name in ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "neurons", "calls")
    }
    with ExitStack() as stack:
        for parts in subject.layers:
            stack.enter_context(on_call(parts.block, seen["calls"].append))
            if "resid" in wanted:
                stack.enter_context(on_input(parts.block, seen["resid_pre"].append))
                stack.enter_context(on_output(parts.block, seen["resid_post"].append))
            if "attn_out" in wanted:
                stack.enter_context(on_output(parts.attn_write, seen["attn_out"].append))
            if "mlp_out" in wanted:
                stack.enter_context(on_output(parts.mlp_write, seen["mlp_out"].append))
            if "z" in wanted:
                stack.enter_context(on_input(parts.o_proj, seen["z"].append))
            if "neurons" in wanted and parts.down_proj is not None:
                stack.enter_context(on_input(parts.down_proj, seen["neurons"].append))
        yield seen


def first(output: Any) -> Tensor:
    """A module's output tensor, also where the library returns it first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def on_call(module: nn.Module, see: Callable[[dict[str, Any]], Any]) -> Any:
    """Hands every call's arguments, by their names, to `see`."""
    signature = inspect.signature(module.forward)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        named = dict(signature.bind(*args, **kwargs).arguments)
        see(named | named.pop("kwargs", {}))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_input(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Any:
    """Hands a module's first input to `see`; a tensor that `see` returns takes its place."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = see(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = see(kwargs["hidden_states"])
        return None if new is None else (args, kwargs | {"hidden_states": new})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_output(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Any:
    """Hands a module's output to `see`; a tensor that `see` returns takes its place."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        new = see(first(output))
        return None if new is None else ((new, *output[1:]) if isinstance(output, tuple) else new)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _without_state(call: dict[str, Any]) -> dict[str, Any]:
    """A layer's call without its input and the cache, which a replay supplies."""
    return {name: value for name, value in call.items() if name not in ("hidden_states", "past_key_values")}
