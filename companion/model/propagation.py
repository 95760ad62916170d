"""One sweep up the grid of cells (layer, position) for many interventions at once.

A patch at layer l and position p changes only cells above l at positions from p on: a *stretch* of the sequence. All
stretches of a chunk lie side by side as extra tokens of the same pair; a block-diagonal mask lets each see its own tokens
and the clean prefix before it, whose keys and values come from the clean run. The library's own layer code does the
arithmetic. A stretch joins the running batch when the sweep reaches its layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion.model.activations import CleanRun, at_positions, causal, first
from companion.model.architecture import Subject
from companion.model.interventions import RunPair, Stretch, clean_stretch, enter, layer_edits, only_tokens


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a chunk's stretches lie, in the order in which the stretches join."""

    offset: Int[Tensor, "stretch"]
    start: Int[Tensor, "stretch"]
    position: Int[Tensor, "token"]
    owner: Int[Tensor, "token"]
    prefix: int
    masks: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prefix:
    """The part of a cache that an attention layer calls: it puts the clean prefix's keys and values before the new ones."""

    keys: Float[Tensor, "pair head pos width"]
    values: Float[Tensor, "pair head pos width"]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the library's attention after the rotary embedding; nothing is stored."""
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)


@torch.no_grad()
def sweep(runs: RunPair, chunk: Sequence[Stretch], read: Int[Tensor, "read"]) -> Float[Tensor, "pair stretch read d"]:
    """Final residual stream at the read positions for every stretch; the chunk must be ordered by entry layer."""
    subject, base, end = runs.subject, runs.base, int(read.max()) + 1
    layout = make_layout(chunk, end, base.tokens.device)
    resid = base.resid_pre[0].new_empty(len(base.tokens), len(layout.position), subject.d_model)
    running, joined = 0, 0
    for layer in range(chunk[0].entry, subject.n_layers):
        if running:
            with _layer_hooks(runs, chunk[:joined], layout, layer, read):
                resid[:, :running] = replay_layer(subject, base, layer, resid[:, :running], layout)
        entering = [stretch for stretch in chunk[joined:] if stretch.entry == layer]
        edited = iter(enter(runs, [s for s in entering if len(s.variant) == 1], layer, end))
        for s in entering:
            state = next(edited) if len(s.variant) == 1 else clean_stretch(base, layer, s.start, end)
            resid[:, running : running + state.shape[1]] = state
            running += state.shape[1]
        joined += len(entering)
    return _read_out(base, resid, layout, read)


def make_layout(chunk: Sequence[Stretch], end: int, device: torch.device) -> Layout:
    """Stretches side by side, each from its start up to `end`."""
    start = torch.tensor([stretch.start for stretch in chunk], device=device)
    length = end - start
    offset = length.cumsum(0) - length
    owner = torch.repeat_interleave(torch.arange(len(chunk), device=device), length)
    position = torch.arange(len(owner), device=device) - offset[owner] + start[owner]
    return Layout(offset, start, position, owner, prefix=max(stretch.start for stretch in chunk))


def replay_layer(
    subject: Subject, base: CleanRun, layer: int, resid: Float[Tensor, "pair token d"], layout: Layout
) -> Float[Tensor, "pair token d"]:
    """The library's layer, called on the stretches that are running."""
    n_tokens = resid.shape[1]
    position = layout.position[:n_tokens]
    call = {name: at_positions(name, value, position) for name, value in base.calls[layer].items()}
    mask = stretch_mask(base.calls[layer].get("attention_mask"), layout, base.tokens.shape[1])
    call["attention_mask"] = mask[:, :, :n_tokens, : layout.prefix + n_tokens]
    call["past_key_values"] = Prefix(base.keys[layer][:, :, : layout.prefix], base.values[layer][:, :, : layout.prefix])
    return first(subject.layers[layer].block(resid, **call))


def stretch_mask(
    mask: Tensor | None, layout: Layout, n_pos: int
) -> Float[Tensor, "pair 1 token key"] | Bool[Tensor, ...]:
    """The library's own mask, re-indexed: a token sees the clean prefix before its stretch, and its own stretch.

    Sliding windows come along because the rows and columns are the library's. No mask at all means causal: the library
    leaves it out where its attention kernel knows better.
    """
    key = id(mask)
    if key in layout.masks:
        return layout.masks[key]
    if mask is None:
        mask = causal(n_pos, layout.position.device)
    rows = mask[:, :, layout.position]
    seen = torch.cat([rows[..., : layout.prefix], rows[..., layout.position]], dim=-1)
    prefix = torch.arange(layout.prefix, device=rows.device)
    before = prefix < layout.start[layout.owner, None]
    own = layout.owner[:, None] == layout.owner
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    layout.masks[key] = torch.where(torch.cat([before, own], dim=-1), seen, closed)
    return layout.masks[key]


def _layer_hooks(
    runs: RunPair, chunk: Sequence[Stretch], layout: Layout, layer: int, read: Int[Tensor, "read"]
) -> ExitStack:
    """Hooks while a layer is called: edits of joint interventions; in the last layer, only the MLP of tokens that are read."""
    joint = [
        (patch, offset - stretch.start)
        for stretch, offset in zip(chunk, layout.offset.tolist(), strict=False)
        if len(stretch.variant) > 1
        for patch in stretch.variant
        if patch.layer == layer
    ]
    hooks = layer_edits(runs, joint, int(read.max()) + 1)
    is_read = torch.isin(layout.position, read)
    if layer == runs.subject.n_layers - 1 and not joint and not bool(is_read.all()):
        hooks.enter_context(only_tokens(runs.subject.layers[layer].mlp, is_read))
    return hooks


def _read_out(
    base: CleanRun, resid: Float[Tensor, "pair token d"], layout: Layout, read: Int[Tensor, "read"]
) -> Float[Tensor, "pair stretch read d"]:
    """A read position before the stretch is the clean run's own."""
    behind = read - layout.start[:, None]
    patched = resid[:, layout.offset[:, None] + behind.clamp(min=0)]
    return torch.where((behind < 0)[..., None], base.resid_post[-1][:, None, read], patched)
