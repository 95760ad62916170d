"""Interventions: a site, a layer, positions, and the value written there; and what they do inside their own layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from companion.base.errors import InputError
from companion.model.activations import CleanRun, Hook, first, on_input, on_output, replaced
from companion.model.architecture import LayerParts, Subject, written_vectors

SITES = ("resid_post", "attn_out", "mlp_out", "head", "neuron")


@dataclass(frozen=True)
class Patch:
    """Set one site of one layer at some positions, which may differ between pairs.

    `index` names the head or neuron (several: set together) and is None for the other sites. `value`, broadcastable to
    (pair, pos, width), is what is written; None takes the source run's own activation.
    """

    site: str
    layer: int
    positions: Bool[Tensor, "pair pos"]
    index: int | tuple[int, ...] | None = None
    value: Tensor | None = None


Variant = tuple[Patch, ...]  # set together; most variants are a single patch
Values = Float[Tensor, "pair col width"]


@dataclass(frozen=True)
class RunPair:
    """A model, the run that is patched (`base`), and one of its shape that patches take their values from (`source`)."""

    subject: Subject
    base: CleanRun
    source: CleanRun

    def __post_init__(self) -> None:
        if self.base.tokens.shape != self.source.tokens.shape:
            raise InputError(
                f"base tokens have shape {tuple(self.base.tokens.shape)}, source tokens {tuple(self.source.tokens.shape)}; "
                "interchange needs pairs of equal length: pad both or drop the pair"
            )


@dataclass(frozen=True)
class Stretch:
    """One variant on the grid: it exists above layer `entry` (-1: above the embedding), at positions from `start` on."""

    variant: Variant
    slot: int
    entry: int
    start: int


def as_variants(subject: Subject, base: CleanRun, patches: Sequence[Patch | Sequence[Patch]]) -> list[Variant]:
    """Every entry as a tuple of patches, checked; `InputError` names the first that cannot be applied."""
    variants = [(entry,) if isinstance(entry, Patch) else tuple(entry) for entry in patches]
    for variant in variants:
        if not variant:
            raise InputError("a joint intervention has no patches; give at least one")
        for patch in variant:
            _check(subject, base, patch)
    return variants


def projection(parts: LayerParts, site: str) -> nn.Module:
    """The output projection that reads heads, or the down projection that reads neurons."""
    module = parts.o_proj if site == "head" else parts.down_proj
    assert module is not None, "the load check refuses a model without a down projection"
    return module


def on_site(parts: LayerParts, site: str, see: Callable[[Tensor], Tensor | None]) -> Hook:
    """Hands a site's activations in one layer to `see`; a tensor that `see` returns takes their place."""
    if site in ("head", "neuron"):
        return on_input(projection(parts, site), see)
    modules = {"attn_out": parts.attn_write, "mlp_out": parts.mlp_write, "resid_post": parts.block}
    return on_output(modules[site], see)


def position_mask(tokens: Tensor, position: int | list[int]) -> Bool[Tensor, "pair pos"]:
    """True at one position, or several, of every pair; negative positions count from the end."""
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, position] = True
    return mask


def entries(subject: Subject, patch: Patch) -> slice | list[int]:
    """Which entries of the site's tensor a patch sets: all of a vector, a head's slice, one neuron."""
    if patch.index is None:
        return slice(None)
    width = head_width(subject, patch.layer) if patch.site == "head" else 1
    return [i for index in _indices(patch) for i in range(index * width, (index + 1) * width)]


def head_width(subject: Subject, layer: int) -> int:
    """Entries of one head in the output projection's input."""
    return subject.layers[layer].o_proj.get_parameter("weight").numel() // subject.d_model // subject.n_heads


def columns(patch: Patch) -> list[int]:
    """The positions that a patch touches in at least one pair."""
    return patch.positions.any(0).nonzero().flatten().tolist()


def values_at(runs: RunPair, patch: Patch, cols: list[int]) -> tuple[Values, Values]:
    """The base's own value of a patch's entries at some positions, and the value after the patch."""
    chosen = entries(runs.subject, patch)
    old = runs.base.site(patch.site, patch.layer)[:, cols][..., chosen]
    if patch.value is None:
        new = runs.source.site(patch.site, patch.layer)[:, cols][..., chosen]
    else:
        new = patch.value.to(old).expand(*runs.base.tokens.shape, old.shape[-1])[:, cols]
    return old, torch.where(patch.positions[:, cols, None], new, old)


def _check(subject: Subject, base: CleanRun, patch: Patch) -> None:
    if patch.site not in SITES:
        raise InputError(f"unknown site {patch.site!r}; expected one of {', '.join(SITES)}")
    if not 0 <= patch.layer < subject.n_layers:
        raise InputError(f"layer {patch.layer} of {patch.site} does not exist; layers are 0 to {subject.n_layers - 1}")
    if patch.positions.dtype != torch.bool or patch.positions.shape != base.tokens.shape:
        raise InputError(
            f"positions of {patch.site} must be a mask of shape {tuple(base.tokens.shape)} (pair, pos), "
            f"not {patch.positions.dtype} {tuple(patch.positions.shape)}"
        )
    if patch.site not in ("head", "neuron"):
        if patch.index is None:
            return
        raise InputError(f"{patch.site} takes no index; index is for head and neuron")
    size, index = subject.n_heads if patch.site == "head" else subject.d_mlp, _indices(patch)
    if not index or len(set(index)) < len(index) or not all(0 <= i < size for i in index):
        allowed = f"expected one or several different ones of 0 to {size - 1}"
        raise InputError(f"index {patch.index} of {patch.site}: {allowed}")


def _indices(patch: Patch) -> tuple[int, ...]:
    if patch.index is None:
        return ()
    return patch.index if isinstance(patch.index, tuple) else (int(patch.index),)


def enter(runs: RunPair, entering: Sequence[Stretch], layer: int, end: int) -> list[Float[Tensor, "pair pos d"]]:
    """The residual stream above `layer` on each stretch of one patch: the clean one, with the patched cells recomputed."""
    base, patches = runs.base, [stretch.variant[0] for stretch in entering]
    cols = [[c for c in columns(s.variant[0]) if s.start <= c < end] for s in entering]
    writes = [written(runs, patch, c)[1] for patch, c in zip(patches, cols, strict=True)]
    edited, states = dict[int, Tensor](), []
    if through_mlp := [i for i, patch in enumerate(patches) if patch.site in ("attn_out", "head")]:
        parts = runs.subject.layers[layer]
        resid = torch.cat([base.resid_pre[layer][:, cols[i]] for i in through_mlp], dim=1)
        with _attention_writes(parts, torch.cat([writes[i] for i in through_mlp], dim=1)):
            out = first(parts.block(resid, **base.calls[layer]))
        edited |= zip(through_mlp, out.split([len(cols[i]) for i in through_mlp], dim=1), strict=True)
    for i, stretch in enumerate(entering):
        if patches[i].site in ("mlp_out", "neuron"):  # the last write in a layer
            edited[i] = base.resid_pre[layer][:, cols[i]] + base.site("attn_out", layer)[:, cols[i]] + writes[i]
        state = clean_stretch(base, layer, stretch.start, end).clone()
        state[:, [c - stretch.start for c in cols[i]]] = edited.get(i, writes[i])
        states.append(state)
    return states


def clean_stretch(base: CleanRun, layer: int, start: int, end: int) -> Float[Tensor, "pair pos d"]:
    """The clean residual stream above a layer; layer -1 is the embedding."""
    return (base.resid_pre[0] if layer < 0 else base.resid_post[layer])[:, start:end]


def written(runs: RunPair, patch: Patch, cols: list[int]) -> tuple[Values, Values]:
    """What attention or MLP writes into the residual stream at some positions: in the base, and after the patch."""
    old, new = values_at(runs, patch, cols)
    if patch.site not in ("head", "neuron"):
        return old, new
    parts = runs.subject.layers[patch.layer]
    module = projection(parts, patch.site)
    out, post = ("attn_out", parts.attn_post) if patch.site == "head" else ("mlp_out", parts.mlp_post)
    change = (new - old) @ written_vectors(module)[entries(runs.subject, patch)]  # linear: only these entries matter
    if post is None:
        raw = runs.base.site(out, patch.layer)[:, cols]
        return raw, raw + change
    raw = module(runs.base.site(patch.site, patch.layer)[:, cols])
    return post(raw), post(raw + change)


def _attention_writes(parts: LayerParts, write: Tensor) -> ExitStack:
    """For a while the library's block computes its MLP half alone, behind a given output of attention."""
    stack = ExitStack()
    stack.enter_context(returning(parts.attn, (write, None)))
    if parts.attn_post is not None:
        stack.enter_context(returning(parts.attn_post, write))
    return stack


@torch.no_grad()
def component_output(
    subject: Subject, run: CleanRun, site: str, layer: int, hidden: Float[Tensor, "pair pos d"]
) -> Float[Tensor, "pair pos d"]:
    """What attention (`attn_out`) or MLP (`mlp_out`) writes if it reads the residual stream `hidden`.

    The library's own block is called, with the run's mask and positions.
    """
    parts, seen = subject.layers[layer], list[Tensor]()
    # What the MLP reads is handed in: attention adds nothing to it.
    attention = nullcontext() if site == "attn_out" else _attention_writes(parts, torch.zeros_like(hidden))
    with on_site(parts, site, seen.append), attention:
        parts.block(hidden, **run.calls[layer])
    return seen[0]


def returning(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """For a while the module computes nothing and returns `output`."""
    return replaced(module, lambda *args, **kwargs: output)


def only_tokens(mlp: nn.Module, wanted: Bool[Tensor, "token"]) -> AbstractContextManager[None]:
    """For a while the MLP computes the wanted tokens alone: above the last layer nobody looks at the others."""
    plain = mlp.forward

    def forward(hidden: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        tokens = wanted[: hidden.shape[1]].nonzero().flatten()
        out[:, tokens] = plain(hidden[:, tokens])
        return out

    return replaced(mlp, forward)
