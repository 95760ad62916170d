"""A clean run: one forward pass of the plain library model, with every site and every layer's call kept.

Sites are named once for the whole companion: `resid_post` (the residual stream after a block), `attn_out` and
`mlp_out` (what a block writes into it, after a post-norm where the family has one), `head` (one head's slice of the
output projection's input, `z`) and `neuron` (one entry of the down projection's input, `neurons`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from companion.base.errors import InputError
from companion.model.architecture import Subject

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
        kept = self.kept(site)
        if not kept:
            raise InputError(f"the clean run holds no {site}; add {_KEPT_AS[site]!r} to clean_run's keep")
        return kept[layer]

    def kept(self, site: str) -> Layers:
        """A site's activations of all layers; empty if the run was made without them."""
        layers: Layers = self.resid_post if site == "resid_post" else getattr(self, _KEPT_AS[site])
        return layers


def clean_run(subject: Subject, tokens: Int[Tensor, "pair pos"], *, keep: Iterable[str] = KEPT) -> CleanRun:
    """One forward pass over pairs of one length; nothing is padded.

    `keep` limits memory: among resid, attn_out, mlp_out, z, neurons, cache. A base of `interchange` needs resid, attn_out
    and cache (and what its own patches read); a source only the sites that are taken from it.
    """
    wanted = frozenset(keep)
    if unknown := wanted - set(KEPT):
        raise InputError(f"keep names {', '.join(sorted(unknown))}; expected some of {', '.join(KEPT)}")
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise InputError(f"tokens must be integers of shape (pair, pos), not {tokens.dtype} {tuple(tokens.shape)}")
    cache = DynamicCache()  # without a config it keeps every position, sliding windows included
    with torch.no_grad(), _recording(subject, wanted) as seen:  # the base model stops before the unembedding
        final = subject.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
    if not bool(torch.isfinite(final).all()):
        raise InputError(
            "the model returns NaN or infinity: broken weights, or an overflow in half precision (then use float32)"
        )
    if "cache" in wanted:
        seen |= {"keys": [layer.keys for layer in cache.layers], "values": [layer.values for layer in cache.layers]}
    return CleanRun(tokens, **{name: tuple(layers) for name, layers in seen.items()})


def model_inputs(tokens: Int[Tensor, "pair pos"], mask: Bool[Tensor, "pair pos"] | None) -> dict[str, Tensor]:
    """What the library's model is called with; it does not count padded positions from the first real token by itself."""
    if mask is None:
        return {"input_ids": tokens}
    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": position_ids}


@contextmanager
def _recording(subject: Subject, wanted: frozenset[str]) -> Iterator[dict[str, list[Any]]]:
    """Hooks on every layer; what they see is gathered by name, in the order of the layers."""
    names = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "neurons", "keys", "values", "calls")
    seen: dict[str, list[Any]] = {name: [] for name in names}
    with ExitStack() as stack:
        for parts in subject.layers:
            hooks: list[tuple[str, str, Any, nn.Module | None]] = [
                ("cache", "calls", on_call, parts.block),
                ("resid", "resid_pre", on_input, parts.block),
                ("resid", "resid_post", on_output, parts.block),
                ("attn_out", "attn_out", on_output, parts.attn_write),
                ("mlp_out", "mlp_out", on_output, parts.mlp_write),
                ("z", "z", on_input, parts.o_proj),
                ("neurons", "neurons", on_input, parts.down_proj),
            ]
            for kept, name, hook, module in hooks:
                if kept in wanted and module is not None:
                    stack.enter_context(hook(module, seen[name].append))
        yield seen


def first(output: Any) -> Tensor:
    """A module's output tensor, also where the library returns it first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


Hook = AbstractContextManager[Any]  # works from now on; leaving the context removes it


def on_call(module: nn.Module, see: Callable[[dict[str, Any]], Any]) -> Hook:
    """Hands every call's arguments, by their names, to `see`, without the input and the cache, which a replay supplies."""
    signature = inspect.signature(module.forward)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        named = dict(signature.bind(*args, **kwargs).arguments)
        named |= named.pop("kwargs", {})
        see({name: value for name, value in named.items() if name not in ("hidden_states", "past_key_values")})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def on_input(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Hook:
    """Hands a module's first input to `see`; a tensor that `see` returns takes its place."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = see(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = see(kwargs["hidden_states"])
        return None if new is None else (args, kwargs | {"hidden_states": new})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Hook:
    """Hands a module's output to `see`; a tensor that `see` returns takes its place."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        new = see(first(output))
        return None if new is None else ((new, *output[1:]) if isinstance(output, tuple) else new)

    return module.register_forward_hook(hook)
