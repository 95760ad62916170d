"""Exact interventions on a grid of cells (layer, position): total effects, direct effects, single neurons.

Replacing what one layer computes at one position changes only the cells above it and behind it; all else is the clean run,
which is kept. So an intervention costs the cells to its upper right and not a forward pass, and it is exact.

A patch at layer l and position p changes a *stretch* of the sequence, from p on. All stretches of a chunk lie side by side as
extra tokens of the same pair; a block-diagonal mask lets each see its own tokens and the clean prefix before it, whose keys
and values come from the clean run. A stretch joins the running batch when the sweep up the grid reaches its layer.

>>> from companion.model import activations, interventions, load
>>> subject = load.load("embedded")
>>> control, treated = torch.randint(9, 99, (2, 3, 12), generator=torch.Generator().manual_seed(0))
>>> base, source = activations.clean_run(subject, control), activations.clean_run(subject, treated)
>>> last = interventions.position_mask(control, -1)
>>> patches = [Patch("mlp_out", layer, last) for layer in range(subject.n_layers)]
>>> interchange(subject, base, source, patches).shape
torch.Size([3, 6, 1, 128])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion.base.device import synchronize
from companion.base.display import progress
from companion.model.activations import CleanRun, Hook, at_positions, causal, first, on_input
from companion.model.architecture import Subject, written_vectors
from companion.model.interventions import (
    Patch,
    RunPair,
    Stretch,
    Variant,
    as_variants,
    clean_stretch,
    columns,
    enter,
    entries,
    on_site,
    only_tokens,
    projection,
    values_at,
    written,
)
from companion.model.memory import fill_in_chunks, token_budget
from companion.model.readout import read_positions

Patches = Sequence[Patch | Sequence[Patch]]


@torch.no_grad()
def interchange(
    subject: Subject, base: CleanRun, source: CleanRun, patches: Patches, read: Sequence[int] = (-1,),
    readout: Callable[[Tensor], Tensor] = lambda resid: resid,
) -> Float[Tensor, "pair patch read ..."]:  # fmt: skip
    """Final residual stream (before the final norm) after each intervention on its own: total effects.

    An entry of `patches` that is a sequence is one joint intervention; a patch that changes nothing returns the base's residual.
    `readout` turns residuals of some patches, (pair, patch, read, d), into what is wanted and kept. Raises InputError for a
    patch or read position that does not exist, and two runs of different shapes.
    """
    variants, positions = as_variants(subject, base, patches), read_positions(base, read)
    runs, end = RunPair(subject, base, source), int(positions.max()) + 1
    stretches = [s for slot, v in enumerate(variants) if (s := _stretch(runs, v, slot, end))]
    clean = base.resid_post[-1][:, positions]
    unchanged = readout(clean[:, None])
    result = unchanged.expand(-1, len(variants), *unchanged.shape[2:]).clone()
    budget = token_budget(subject, base.tokens.shape[1])
    fill_in_chunks(result, stretches, end, budget, lambda chunk: readout(sweep(runs, chunk, positions)))
    return result


@torch.no_grad()
def direct(
    subject: Subject, base: CleanRun, source: CleanRun, patches: Sequence[Patch]
) -> Float[Tensor, "pair patch 1 d"]:
    """Final residual stream at the last token if only the site's own write into it is swapped: direct effects.

    No later layer sees the change. For `resid_post` this is the skip path alone. A patch of other tokens has none.
    """
    runs, last = RunPair(subject, base, source), base.tokens.shape[1] - 1
    clean, results = base.resid_post[-1][:, [last]], []
    for (patch,) in as_variants(subject, base, patches):
        cols = columns(patch)
        old, new = written(runs, patch, cols)
        change = (new - old)[:, [cols.index(last)]] if last in cols else torch.zeros_like(clean)
        results.append(clean + change)
    return torch.stack(results, dim=1)


def _stretch(runs: RunPair, variant: Variant, slot: int, end: int) -> Stretch | None:
    """The cells to recompute for one variant, or None if it changes nothing that is read."""
    cols, entry = [c for patch in variant for c in columns(patch)], min(patch.layer for patch in variant)
    if len(variant) > 1:  # edited while its layers run
        entry -= 1
    else:  # of one patch, positions where it changes anything, bit for bit: none before the first token that differs
        old, new = values_at(runs, variant[0], cols)
        changed = (old != new).any(-1).any(0).tolist()  # NaN differs from itself, so it is never skipped
        cols = [c for c, is_changed in zip(cols, changed, strict=True) if is_changed]
    start = min(cols, default=end)
    return Stretch(variant, slot, entry, start) if start < end else None


def both_ways(
    subject: Subject, control: CleanRun, treated: CleanRun, into_control: Patches, into_treated: Patches, *, at_once: int,
) -> tuple[Float[Tensor, "pair patch d"], Float[Tensor, "pair patch d"]]:  # fmt: skip
    """Final residual stream at the last token of `interchange` into the control run, and of the same into the treated.

    A small batch costs what calling the layers costs, not what they compute, so both runs, one above the other, are one
    batch of twice the size. The two lists hold the same interventions; only the values that they write may differ.
    `at_once` is how many pairs may run together: with copies of both runs in both orders, a third of it is joined.
    """
    n_pairs = len(control.tokens)
    if 3 * n_pairs > at_once:
        sweeps = ((control, treated, into_control), (treated, control, into_treated))
        into, out = (interchange(subject, *sweep)[:, :, 0] for sweep in sweeps)
        return into, out
    values: dict[tuple[int, int], Tensor] = {}  # of both runs: many patches write the same

    def stacked(upper: Patch, lower: Patch) -> Patch:
        positions, value, key = torch.cat([upper.positions, lower.positions]), None, (id(upper.value), id(lower.value))
        if upper.value is not None and lower.value is not None:
            if key not in values:
                values[key] = torch.cat([own.expand(n_pairs, -1, -1) for own in (upper.value, lower.value)])
            value = values[key]
        return Patch(upper.site, upper.layer, positions, upper.index, value)

    lists = (as_variants(subject, control, patches) for patches in (into_control, into_treated))
    patches = [tuple(stacked(*two) for two in zip(*both, strict=True)) for both in zip(*lists, strict=True)]
    found = interchange(subject, control.above(treated), treated.above(control), patches)[:, :, 0]
    return found[:n_pairs], found[n_pairs:]


@torch.no_grad()
def each_neuron(
    subject: Subject, base: CleanRun, source: CleanRun, layer: int, chosen: Int[Tensor, "neuron"],
    readout: Callable[[Tensor], Tensor],
) -> Float[Tensor, "pair neuron ..."]:  # fmt: skip
    """What `interchange` gives for each chosen neuron on its own at the last token, read there by `readout` (pair, neuron, d).

    Each neuron changes one cell, so the edited states of a chunk are made by one multiplication and climb the layers side by
    side. A neuron that no pair changes gives the base's own.
    """
    change = (source.site("neuron", layer) - base.site("neuron", layer))[:, -1, chosen]
    clean = readout(base.resid_post[-1][:, None, -1])
    found = clean.expand(-1, len(chosen), *clean.shape[2:]).clone()
    end, slots = base.tokens.shape[1], (change != 0).any(0).nonzero().flatten().tolist()
    stretches = [Stretch((), slot, layer, end - 1) for slot in slots]
    down, post = projection(subject.layers[layer], "neuron"), subject.layers[layer].mlp_post
    vectors, middle = written_vectors(down), (base.resid_pre[layer] + base.site("attn_out", layer))[:, None, -1]
    own = base.site("mlp_out", layer)[:, None, -1] if post is None else down(base.site("neuron", layer)[:, None, -1])

    def climb(chunk: Sequence[Stretch]) -> Tensor:
        at = torch.tensor([stretch.slot for stretch in chunk], device=change.device)
        layout = make_layout(chunk, end, change.device)
        write = own + change[:, at, None] * vectors[chosen[at]]
        resid = middle + (write if post is None else post(write))
        for above in range(layer + 1, subject.n_layers):
            resid = replay_layer(subject, base, above, resid, layout)
        return readout(resid)

    fill_in_chunks(found, stretches, end, token_budget(subject, end), climb)
    return found


@torch.no_grad()
def interchange_full_forward(
    subject: Subject, base: CleanRun, source: CleanRun, patches: Patches, read: Sequence[int] = (-1,)
) -> Float[Tensor, "pair patch read d"]:
    """`interchange` by one full forward pass per intervention, with forward hooks: slow, and what the grid is held equal to."""
    positions, variants, results = read_positions(base, read), as_variants(subject, base, patches), []
    for variant in progress(variants, desc="full forward passes"):
        seen: list[Tensor] = []
        with ExitStack() as stack:
            for patch in variant:
                stack.enter_context(_hook(subject, source, patch))
            stack.enter_context(on_input(subject.final_norm, seen.append))
            subject.model.base_model(input_ids=base.tokens, use_cache=False)
        results.append(seen[-1][:, positions])  # hooks set outside may make a pass of their own first
        synchronize(subject.device)  # so that the bar's estimate is of work done, not of work told
    return torch.stack(results, dim=1)


def _hook(subject: Subject, source: CleanRun, patch: Patch) -> Hook:
    chosen = entries(subject, patch)
    value = source.site(patch.site, patch.layer)[..., chosen] if patch.value is None else patch.value

    def replace(tensor: Tensor) -> Tensor:
        new = tensor.clone()
        new[..., chosen] = torch.where(patch.positions[..., None], value.to(new), new[..., chosen])
        return new

    return on_site(subject.layers[patch.layer], patch.site, replace)


# ---- the sweep up the grid ----


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
    behind = read - layout.start[:, None]
    patched = resid[:, layout.offset[:, None] + behind.clamp(min=0)]
    before = base.resid_post[-1][:, None, read]  # a read position before the stretch is the clean run's own
    return torch.where((behind < 0)[..., None], before, patched)


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
    """The library's own mask (None: causal), re-indexed: a token sees the clean prefix before its stretch, and its stretch.

    Sliding windows come along because the rows and columns are the library's.
    """
    key = id(mask)
    if key not in layout.masks:
        mask = causal(n_pos, layout.position.device) if mask is None else mask
        rows = mask[:, :, layout.position]
        seen = torch.cat([rows[..., : layout.prefix], rows[..., layout.position]], dim=-1)
        before = torch.arange(layout.prefix, device=rows.device) < layout.start[layout.owner, None]
        own = layout.owner[:, None] == layout.owner
        closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        layout.masks[key] = torch.where(torch.cat([before, own], dim=-1), seen, closed)
    return layout.masks[key]


# Tokens and entries of the cells, (pair, col, 1) where they change, and (pair, col, width) what is written there.
_CellEdit = tuple[list[int], slice | list[int], Tensor, Tensor]


def _layer_hooks(
    runs: RunPair, chunk: Sequence[Stretch], layout: Layout, layer: int, read: Int[Tensor, "read"]
) -> ExitStack:
    """Hooks while a layer is called: edits of joint interventions; in the last layer, only the MLP of tokens that are read."""
    parts, end, stack = runs.subject.layers[layer], int(read.max()) + 1, ExitStack()
    sites: dict[str, list[_CellEdit]] = {}
    for stretch, offset in zip(chunk, layout.offset.tolist(), strict=False):
        for patch in stretch.variant if len(stretch.variant) > 1 else ():
            if patch.layer == layer:
                cols = [c for c in columns(patch) if c < end]
                tokens, new = [offset - stretch.start + c for c in cols], values_at(runs, patch, cols)[1]
                edit = (tokens, entries(runs.subject, patch), patch.positions[:, cols, None], new)
                sites.setdefault(patch.site, []).append(edit)
    for site, edits in sites.items():
        stack.enter_context(on_site(parts, site, partial(_set_cells, edits)))
    is_read = torch.isin(layout.position, read)
    if layer == runs.subject.n_layers - 1 and not sites and not bool(is_read.all()):
        stack.enter_context(only_tokens(parts.mlp, is_read))
    return stack


def _set_cells(edits: Sequence[_CellEdit], tensor: Tensor) -> Float[Tensor, "pair token width"]:
    tensor = tensor.clone()
    for tokens, chosen, mask, new in edits:
        cells = tensor[:, tokens]
        cells[..., chosen] = torch.where(mask, new, cells[..., chosen])
        tensor[:, tokens] = cells
    return tensor
