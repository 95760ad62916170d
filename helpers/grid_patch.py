"""What an intervention is: a site, a layer, positions, and the value written there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.grid_run import CleanRun
from helpers.subject_parts import LayerParts, Subject

SITES = ("resid_post", "attn_out", "mlp_out", "head", "neuron")


@dataclass(frozen=True)
class Patch:
    """Set one site of one layer at some positions.

    `positions` may differ between pairs. `index` names the head or neuron (several: set together) and is None for
    the other sites. `value`, broadcastable to (pair, pos, width), is what is written; None takes the source run's
    own activation.
    """

    site: str
    layer: int
    positions: Bool[Tensor, "pair pos"]
    index: int | tuple[int, ...] | None = None
    value: Tensor | None = None


Variant = tuple[Patch, ...]  # set together; most variants are a single patch


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
    if module is None:
        raise InputError("this model's MLP has no down projection (a mixture of experts?); use the site mlp_out")
    return module


def entries(subject: Subject, patch: Patch) -> slice | list[int]:
    """Which entries of the site's tensor a patch sets: all of a vector, a head's slice, one neuron."""
    if patch.index is None:
        return slice(None)
    index = _indices(patch)
    if patch.site == "neuron":
        return list(index)
    width = head_width(subject, patch.layer)
    return [i for head in index for i in range(head * width, (head + 1) * width)]


def head_width(subject: Subject, layer: int) -> int:
    """Entries of one head in the output projection's input."""
    weight = subject.layers[layer].o_proj.weight
    assert isinstance(weight, Tensor)
    return weight.numel() // subject.d_model // subject.n_heads


def columns(patch: Patch) -> list[int]:
    """The positions that a patch touches in at least one pair."""
    return patch.positions.any(0).nonzero().flatten().tolist()


def values_at(
    subject: Subject, base: CleanRun, source: CleanRun, patch: Patch, cols: list[int]
) -> tuple[Float[Tensor, "pair col width"], Float[Tensor, "pair col width"]]:
    """The base's own value of a patch's entries at some positions, and the value after the patch."""
    chosen = entries(subject, patch)
    old = base.site(patch.site, patch.layer)[:, cols][..., chosen]
    if patch.value is None:
        new = source.site(patch.site, patch.layer)[:, cols][..., chosen]
    else:
        n_pairs, n_pos = base.tokens.shape
        new = patch.value.to(old).expand(n_pairs, n_pos, old.shape[-1])[:, cols]
    return old, torch.where(patch.positions[:, cols, None], new, old)


def changed_columns(subject: Subject, base: CleanRun, source: CleanRun, patch: Patch) -> list[int]:
    """The positions at which a patch changes anything in any pair, bit for bit.

    Before the first token in which two prompts differ every activation is the same, so patches there change nothing
    and nothing needs to be computed.
    """
    cols = columns(patch)
    old, new = values_at(subject, base, source, patch, cols)
    changed = (old != new).any(-1).any(0).tolist()  # NaN differs from itself, so it is never skipped
    return [col for col, is_changed in zip(cols, changed, strict=True) if is_changed]


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
    _check_index(subject, patch)


def _check_index(subject: Subject, patch: Patch) -> None:
    size = {"head": subject.n_heads, "neuron": subject.d_mlp}.get(patch.site)
    if size is None:
        if patch.index is not None:
            raise InputError(f"{patch.site} takes no index; index is for head and neuron")
        return
    projection(subject.layers[patch.layer], patch.site)
    index = _indices(patch)
    if not index or len(set(index)) < len(index) or not all(0 <= i < size for i in index):
        raise InputError(
            f"index {patch.index} of {patch.site}: expected one or several different ones of 0 to {size - 1}"
        )


def _indices(patch: Patch) -> tuple[int, ...]:
    if patch.index is None:
        return ()
    return patch.index if isinstance(patch.index, tuple) else (int(patch.index),)
