"""A clean run: one forward pass of the plain library model, with every site and every layer's call kept.

Sites are named once for the whole companion: `resid_post` (the residual stream after a block), `attn_out` and `mlp_out` (what
a block writes into it, after a post-norm where the family has one), `head` (one head's slice of the output projection's input,
`z`) and `neuron` (one entry of the down projection's input, `neurons`). The tokens with which a chat template opens every
prompt hang on nothing behind them: layers compute them for one row (`shared_prefix`, `prefix_once`), which is exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from companion.base.device import to_host
from companion.base.errors import InputError
from companion.model.architecture import Subject

KEPT = ("resid", "attn_out", "mlp_out", "z", "neurons", "cache")
_KEPT_AS = {"resid_post": "resid", "attn_out": "attn_out", "mlp_out": "mlp_out", "head": "z", "neuron": "neurons"}
SMALLEST: Final = 2**20  # weights of a layer: of smaller ones, as the shipped models have, calls cost most
# Weights of a layer times tokens that it need not compute, from which on that saves more than a second call costs.
PAYS: Final = {"cpu": 8e7, "elsewhere": 1e10}
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
        """A site's activations at one layer, those of `head` and `neuron` side by side; InputError if `keep` left them out."""
        kept: Layers = self.resid_post if site == "resid_post" else getattr(self, _KEPT_AS[site])
        if not kept:
            raise InputError(f"the clean run holds no {site}; add {_KEPT_AS[site]!r} to clean_run's keep")
        return kept[layer]

    def rows(self, chosen: slice | list[int]) -> CleanRun:
        """Some pairs of the run; a slice makes no copies."""
        return self._changed(lambda own: own[chosen])

    def above(self, other: CleanRun) -> CleanRun:
        """This run and another of as many pairs of one length as a single run."""
        return self._changed(lambda *both: torch.cat(both), other)

    def _changed(self, change: Callable[..., Tensor], *others: CleanRun) -> CleanRun:
        def changed(own: Any, *theirs: Any) -> Any:
            has_rows = isinstance(own, Tensor) and own.ndim > 1 and len(own) == len(self.tokens)
            return change(own, *theirs) if has_rows else own  # what all pairs share stays

        return CleanRun(**tree_map(changed, vars(self), *map(vars, others)))


def clean_run(
    subject: Subject, tokens: Int[Tensor, "pair pos"], *, keep: Sequence[str] = KEPT, shared: int | None = None
) -> CleanRun:
    """One forward pass over pairs of one length; nothing is padded.

    `keep` limits memory. A base of `interchange` needs resid, attn_out and cache (and what its own patches read); a source only
    the sites that are taken from it. The first `shared` tokens, the same in all rows, are computed once (None: those of
    `shared_prefix`); runs that are compared bit for bit must be made with the same number.
    """
    if unknown := set(keep) - set(KEPT):
        raise InputError(f"keep names {', '.join(sorted(unknown))}; expected some of {', '.join(KEPT)}")
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise InputError(f"tokens must be integers of shape (pair, pos), not {tokens.dtype} {tuple(tokens.shape)}")
    n = shared_prefix(subject, tokens) if shared is None else shared
    cache = DynamicCache()  # without a config it keeps every position, sliding windows included
    with torch.no_grad(), prefix_once(subject, n), _recording(subject, keep) as seen:
        # The base model stops before the unembedding.
        final = subject.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
    if not bool(torch.isfinite(final).all()):
        raise InputError(
            "the model returns NaN or infinity: broken weights, or an overflow in half precision (then use float32)"
        )
    for name in ("attn_out", "mlp_out", "z", "neurons") if n else ():  # of which hooks saw prefix and rest by turns
        seen[name] = list(map(_behind, seen[name][::2], seen[name][1::2]))
    if "cache" in keep:
        seen |= {name: [getattr(layer, name) for layer in cache.layers] for name in ("keys", "values")}
    return CleanRun(tokens, **{name: tuple(layers) for name, layers in seen.items()})


def visible_keys(run: CleanRun) -> list[Bool[np.ndarray, "query key"]]:
    """For each layer, which keys its attention mask shows each query of the first pair, read off the library's own call."""
    plain, shown = causal(run.tokens.shape[1], run.tokens.device), []
    for call in run.calls:
        mask = call.get("attention_mask")
        own = plain if mask is None else mask[:1, :, :, : run.tokens.shape[1]]
        # Boolean masks say what is seen; additive ones hold 0 there and a large negative number elsewhere.
        shown.append(to_host((own if own.dtype == torch.bool else own == 0) & plain)[0, 0])
    return shown


@contextmanager
def eager_attention(subject: Subject) -> Iterator[None]:
    """For a while the library computes attention in plain steps and can hand out its weights (`output_attentions=True`)."""
    before = subject.model.config._attn_implementation
    subject.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        subject.model.set_attn_implementation(before)


def live_positions(run: CleanRun) -> Bool[np.ndarray, "layer pos"]:
    """Where a change of the residual stream after each layer can still reach the last token, or an answer behind it.

    A token of the answer sees no token of the prompt that the last one does not see: masks are causal, and windows move on.
    """
    shown = visible_keys(run)
    live = np.zeros((len(shown), run.tokens.shape[1]), dtype=bool)
    live[:, -1] = True
    for layer in range(len(shown) - 2, -1, -1):
        live[layer] |= shown[layer + 1][live[layer + 1]].any(axis=0) | live[layer + 1]
    return live


def shared_prefix(subject: Subject, *sides: Int[Tensor, "row pos"]) -> int:
    """How many first tokens, without the last, all rows of all sides share, where computing them once pays; else 0.

    Under hooks, which may tell rows apart, nothing is shared, nor by a model that `companion.model.verify` did not check.
    """
    weights = sum(p.numel() for p in subject.layers[0].block.parameters())
    if subject.facts is None or weights < SMALLEST:
        return 0
    same = torch.stack([(side == sides[0][0]).all(0) for side in sides]).all(0)[:-1]
    n = int(same.long().cumprod(0).sum())
    saved = n * (sum(map(len, sides)) - 1) * weights
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())
    return 0 if hooked or saved < PAYS["cpu" if subject.device.type == "cpu" else "elsewhere"] else n


@contextmanager
def prefix_once(subject: Subject, n: int, top: int | None = None) -> Iterator[None]:
    """For a while every layer (of those below `top`) computes the first `n` tokens for one row, and the rest for all.

    `n` is that of `shared_prefix`; 0 changes nothing. Hooks on a block see whole rows; hooks on its parts see them called twice.
    """
    with ExitStack() as stack:
        for layer, parts in enumerate(subject.layers[:top] if n else ()):
            stack.enter_context(replaced(parts.block, _in_two(parts.block.forward, layer, n)))
        yield


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """For a while the module computes something else."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _Gathered:
    """The part of a cache that an attention layer calls: one row's keys and values, then all rows' behind them."""

    parts: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the library's attention after the rotary embedding, first for the prefix and then for the rest."""
        if self.parts is not None:
            keys, values = map(_behind, self.parts, (keys, values))
        self.parts = keys, values
        return keys, values


def _behind(prefix: Tensor, rest: Tensor) -> Tensor:
    """The rest's rows, each behind the one row of the prefix; positions are the last dimension but one."""
    return torch.cat([prefix.expand(len(rest), *prefix.shape[1:]), rest], dim=-2)


def _in_two(block: Callable[..., Any], layer: int, n: int) -> Callable[..., Any]:
    """A layer's computation, called for one row of the first `n` tokens, then for all rows of the others."""
    signature = inspect.signature(block)

    @wraps(block)  # who looks at the arguments' names sees the layer's own
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = named_arguments(signature, args, kwargs)
        hidden, cache, gathered = call.pop("hidden_states"), call.pop("past_key_values", None), _Gathered()
        mask, n_pos = call.get("attention_mask"), hidden.shape[1]
        one = {name: at_positions(name, value, slice(n), rows=1) for name, value in call.items()}
        rest = {name: at_positions(name, value, slice(n, None)) for name, value in call.items()}
        if mask is None:  # the library leaves it out where its kernel knows better, but only for a square
            rest["attention_mask"] = causal(n_pos, hidden.device)[:, :, n:]
        else:
            one["attention_mask"], rest["attention_mask"] = mask[:1, :, :n, :n], mask[:, :, n:]
        prefix = first(block(hidden[:1, :n], **one, past_key_values=gathered))
        out = block(hidden[:, n:], **rest, past_key_values=gathered)
        if cache is not None and gathered.parts is not None:
            cache.update(*gathered.parts, layer)
        made = _behind(prefix, first(out))
        return (made, *out[1:]) if isinstance(out, tuple) else made

    return forward


def causal(n_pos: int, device: torch.device) -> Bool[Tensor, "1 1 pos pos"]:
    """The mask that no mask stands for."""
    return torch.ones(1, 1, n_pos, n_pos, dtype=torch.bool, device=device).tril()


def at_positions(name: str, value: Any, position: Any, rows: int | None = None) -> Any:
    """An argument of a layer's call, for some positions only (and the first `rows`); masks are left as they are.

    Raises InputError for a tensor of which it is not known where its positions are.
    """
    if name == "position_embeddings" and value is not None:
        return tuple(part[:rows, position] for part in value)
    if name == "position_ids" and value is not None:
        return value[:rows, position]
    if isinstance(value, Tensor) and name != "attention_mask":
        raise InputError(
            f"the model hands its layers a tensor {name!r} that an exact replay does not know how to cut to positions; "
            "use a model of a known family"
        )
    return value


@contextmanager
def _recording(subject: Subject, wanted: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Hooks on every layer; what they see is gathered by name, in the order of the layers."""
    seen: dict[str, list[Any]] = {field.name: [] for field in fields(CleanRun) if field.name != "tokens"}
    with ExitStack() as stack:
        for parts in subject.layers:
            hooks: list[tuple[str, str, Any, nn.Module | None]] = [
                ("cache", "calls", on_call, parts.block), ("resid", "resid_pre", on_input, parts.block),
                ("resid", "resid_post", on_output, parts.block), ("attn_out", "attn_out", on_output, parts.attn_write),
                ("mlp_out", "mlp_out", on_output, parts.mlp_write), ("z", "z", on_input, parts.o_proj),
                ("neurons", "neurons", on_input, parts.down_proj),
            ]  # fmt: skip
            for kept, name, hook, module in hooks:
                if kept in wanted and module is not None:
                    stack.enter_context(hook(module, seen[name].append))
        yield seen


def first(output: Any) -> Tensor:
    """A module's output tensor, also where the library returns it first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


Hook = AbstractContextManager[Any]  # works from now on; leaving the context removes it


def on_call(module: nn.Module, see: Callable[[dict[str, Any]], Any]) -> Hook:
    """Hands every call's named arguments to `see`, without the input and the cache, which a replay supplies."""
    signature = inspect.signature(module.forward)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        named = named_arguments(signature, args, kwargs)
        see({name: value for name, value in named.items() if name not in ("hidden_states", "past_key_values")})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def named_arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call hands to a module, by the names of its arguments."""
    named = dict(signature.bind(*args, **kwargs).arguments)
    return named | named.pop("kwargs", {})


def on_input(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Hook:
    """Hands a module's first input to `see`; a tensor that `see` returns takes its place."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = see(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Hook:
    """Hands a module's output to `see`; a tensor that `see` returns takes its place."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        new = see(first(output))
        return None if new is None else ((new, *output[1:]) if isinstance(output, tuple) else new)

    return module.register_forward_hook(hook)
