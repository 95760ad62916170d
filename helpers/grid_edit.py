"""What a patch does inside its own layer: the edited residual stream above it, or hooks for joint interventions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from helpers.grid_patch import Patch, columns, entries, projection, values_at
from helpers.grid_run import CleanRun, first, on_input, on_output
from helpers.subject_parts import LayerParts, Subject, written_vectors


@dataclass(frozen=True)
class Entering:
    """A single patch that joins a sweep, and the positions [start, end) that are followed from there."""

    patch: Patch
    start: int
    end: int


@dataclass(frozen=True)
class _CellEdit:
    tokens: list[int]
    entries: slice | list[int]
    mask: Bool[Tensor, "pair col 1"]
    new: Float[Tensor, "pair col width"]


def enter(
    subject: Subject, base: CleanRun, source: CleanRun, entering: Sequence[Entering], layer: int
) -> list[Float[Tensor, "pair pos d"]]:
    """The residual stream above `layer` on each stretch: the clean one, with the patched cells recomputed."""
    cols = [[c for c in columns(e.patch) if e.start <= c < e.end] for e in entering]
    writes = [_write(subject, base, source, e.patch, c) for e, c in zip(entering, cols, strict=True)]
    through_mlp = [i for i, e in enumerate(entering) if e.patch.site in ("attn_out", "head")]
    edited = dict(zip(through_mlp, _finish_layer(subject, base, layer, cols, writes, through_mlp), strict=True))
    states = []
    for i, e in enumerate(entering):
        new = edited[i] if i in edited else _above(base, e.patch, cols[i], writes[i])
        state = clean_stretch(base, layer, e.start, e.end).clone()
        inside = [c - e.start for c in cols[i]]
        state[:, inside] = new
        states.append(state)
    return states


def clean_stretch(base: CleanRun, layer: int, start: int, end: int) -> Float[Tensor, "pair pos d"]:
    """The clean residual stream above a layer; layer -1 is the embedding."""
    resid = base.resid_pre[0] if layer < 0 else base.resid_post[layer]
    return resid[:, start:end]


def written(
    subject: Subject, base: CleanRun, source: CleanRun, patch: Patch, cols: list[int]
) -> tuple[Float[Tensor, "pair col d"], Float[Tensor, "pair col d"]]:
    """What attention or MLP writes into the residual stream at some positions: in the base, and after the patch."""
    old, new = values_at(subject, base, source, patch, cols)
    if patch.site not in ("head", "neuron"):
        return old, new
    parts = subject.layers[patch.layer]
    vectors = written_vectors(projection(parts, patch.site))[entries(subject, patch)]
    raw = _raw_output(parts, base, patch, cols)
    post = parts.attn_post if patch.site == "head" else parts.mlp_post
    change = (new - old) @ vectors  # the projection is linear: only the patched entries matter
    return (raw, raw + change) if post is None else (post(raw), post(raw + change))


def _write(subject: Subject, base: CleanRun, source: CleanRun, patch: Patch, cols: list[int]) -> Tensor:
    return written(subject, base, source, patch, cols)[1]


def _raw_output(parts: LayerParts, base: CleanRun, patch: Patch, cols: list[int]) -> Float[Tensor, "pair col d"]:
    """Attention's or the MLP's output before any post-norm."""
    site = "attn_out" if patch.site == "head" else "mlp_out"
    if parts.attn_post is None:
        return base.site(site, patch.layer)[:, cols]
    inputs = base.site(patch.site, patch.layer)[:, cols]
    return projection(parts, patch.site)(inputs)


def _above(base: CleanRun, patch: Patch, cols: list[int], write: Tensor) -> Float[Tensor, "pair col d"]:
    """The edited cells of a site after which nothing else happens in its layer."""
    if patch.site == "resid_post":
        return write
    middle = base.resid_pre[patch.layer][:, cols] + base.site("attn_out", patch.layer)[:, cols]
    return middle + write


def _finish_layer(
    subject: Subject,
    base: CleanRun,
    layer: int,
    cols: Sequence[list[int]],
    writes: Sequence[Tensor],
    chosen: Sequence[int],
) -> list[Tensor]:
    """The layer's MLP half for edited attention outputs: the library's block, its attention replaced by a given output."""
    if not chosen:
        return []
    parts = subject.layers[layer]
    resid = torch.cat([base.resid_pre[layer][:, cols[i]] for i in chosen], dim=1)
    write = torch.cat([writes[i] for i in chosen], dim=1)
    with ExitStack() as stack:
        stack.enter_context(returning(parts.attn, (write, None)))
        if parts.attn_post is not None:
            stack.enter_context(returning(parts.attn_post, write))
        out = first(parts.block(resid, **base.calls[layer]))
    return list(out.split([len(cols[i]) for i in chosen], dim=1))


def returning(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """For a while the module computes nothing and returns `output`."""
    return _forward(module, lambda *args, **kwargs: output)


def only_tokens(mlp: nn.Module, wanted: Bool[Tensor, "token"]) -> AbstractContextManager[None]:
    """For a while the MLP computes the wanted tokens alone: above the last layer nobody looks at the others."""
    plain = mlp.forward

    def forward(hidden: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        tokens = wanted[: hidden.shape[1]].nonzero().flatten()
        out[:, tokens] = plain(hidden[:, tokens])
        return out

    return _forward(mlp, forward)


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def layer_edits(subject: Subject, base: CleanRun, source: CleanRun, joint: Sequence[tuple[Entering, int]]) -> ExitStack:
    """Hooks that set the patched cells of running stretches; each patch comes with its stretch's first token."""
    stack = ExitStack()
    sites: dict[str, list[_CellEdit]] = {}
    for entering, offset in joint:
        patch = entering.patch
        cols = [c for c in columns(patch) if c < entering.end]
        new = values_at(subject, base, source, patch, cols)[1]
        tokens = [c - entering.start + offset for c in cols]
        edit = _CellEdit(tokens, entries(subject, patch), patch.positions[:, cols, None], new)
        sites.setdefault(patch.site, []).append(edit)
    for site, edits in sites.items():
        stack.enter_context(_site_hook(subject, site, joint[0][0].patch.layer)(partial(_set_cells, edits)))
    return stack


def _site_hook(subject: Subject, site: str, layer: int) -> Any:
    parts = subject.layers[layer]
    if site in ("head", "neuron"):
        return partial(on_input, projection(parts, site))
    module = {"attn_out": parts.attn_write, "mlp_out": parts.mlp_write, "resid_post": parts.block}[site]
    return partial(on_output, module)


def _set_cells(edits: Sequence[_CellEdit], tensor: Tensor) -> Float[Tensor, "pair token width"]:
    tensor = tensor.clone()
    for edit in edits:
        cells = tensor[:, edit.tokens]
        cells[..., edit.entries] = torch.where(edit.mask, edit.new, cells[..., edit.entries])
        tensor[:, edit.tokens] = cells
    return tensor
