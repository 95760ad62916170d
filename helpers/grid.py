"""Exact interventions on a grid of cells (layer, position): total effects, direct effects, logits.

Replacing what one layer computes at one position changes only the cells above it and behind it. Everything else is
the clean run, which is kept. So an intervention costs the cells to its upper right and not a forward pass, and it
is exact.

>>> from helpers.subject import load
>>> subject = load("embedded")
>>> control, treated = torch.randint(9, 99, (2, 3, 12), generator=torch.Generator().manual_seed(0))
>>> base, source = clean_run(subject, control), clean_run(subject, treated)
>>> last = torch.arange(12).expand(3, -1) == 11
>>> patches = [Patch("mlp_out", layer, last) for layer in range(subject.n_layers)]
>>> logits(subject, interchange(subject, base, source, patches), rows=torch.tensor([5, 6])).shape
torch.Size([3, 6, 1, 2])
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers import reference
from helpers.errors import InputError
from helpers.grid_chunks import in_chunks, token_budget
from helpers.grid_edit import written
from helpers.grid_patch import Patch, Variant, as_variants, changed_columns, columns
from helpers.grid_run import CleanRun, clean_run
from helpers.grid_sweep import Stretch, sweep
from helpers.readout import log_probs, logits, read_positions
from helpers.subject_parts import Subject

__all__ = ["CleanRun", "Patch", "clean_run", "direct", "interchange", "log_probs", "logits"]

Read = Sequence[int] | Int[Tensor, "pair read"]


@torch.no_grad()
def interchange(
    subject: Subject,
    base: CleanRun,
    source: CleanRun,
    patches: Sequence[Patch | Sequence[Patch]],
    read: Read = (-1,),
    readout: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "pair patch read ..."]:
    """Final residual stream (before the final norm) after each intervention on its own: total effects.

    An entry of `patches` that is itself a sequence is one joint intervention. A patch that changes nothing, bit for
    bit, returns the base's own residual. `readout` turns the residual of some patches, (pair, patch, read, d), into
    what is wanted, so that no more than that is kept.

    Raises:
        InputError: a patch or read position does not exist, or the two runs have different shapes.
    """
    variants = as_variants(subject, base, patches)
    positions = read_positions(base, read)
    _check_runs(base, source)
    if not subject.replayable:
        reference.warn_slow(subject, base, len(variants))
        return _read(readout, reference.interchange(subject, base, source, patches, read))
    end = int(positions.max()) + 1
    stretches = [s for slot, v in enumerate(variants) if (s := _stretch(subject, base, source, v, slot, end))]
    clean = base.resid_post[-1].gather(1, positions[..., None].expand(-1, -1, subject.d_model))
    unchanged = _read(readout, clean[:, None])
    result = unchanged.expand(-1, len(variants), *unchanged.shape[2:]).clone()
    budget = token_budget(subject, base.tokens.shape[1])
    for chunk, resid in in_chunks(stretches, end, budget, lambda c: sweep(subject, base, source, c, positions)):
        result[:, [stretch.slot for stretch in chunk]] = _read(readout, resid)
    return result


@torch.no_grad()
def direct(
    subject: Subject,
    base: CleanRun,
    source: CleanRun,
    patches: Sequence[Patch],
    read: Read = (-1,),
) -> Float[Tensor, "pair patch read d"]:
    """Final residual stream if only the site's own write into it is swapped: direct effects.

    No later layer sees the change. For `resid_post` this is the skip path alone. A patch has no direct effect at a
    read position that it does not touch.
    """
    positions = read_positions(base, read)
    _check_runs(base, source)
    clean = base.resid_post[-1].gather(1, positions[..., None].expand(-1, -1, subject.d_model))
    results = []
    for (patch,) in as_variants(subject, base, patches):
        cols = columns(patch)
        old, new = written(subject, base, source, patch, cols)
        change = torch.zeros_like(base.resid_post[-1])
        change[:, cols] = new - old
        results.append(clean + change.gather(1, positions[..., None].expand(-1, -1, subject.d_model)))
    return torch.stack(results, dim=1)


def _stretch(
    subject: Subject, base: CleanRun, source: CleanRun, variant: Variant, slot: int, end: int
) -> Stretch | None:
    """The cells to recompute for one variant, or None if it changes nothing that is read."""
    if len(variant) == 1:
        cols = [c for c in changed_columns(subject, base, source, variant[0]) if c < end]
        return Stretch(variant, slot, variant[0].layer, cols[0]) if cols else None
    cols = [c for patch in variant for c in columns(patch) if c < end]
    return Stretch(variant, slot, min(p.layer for p in variant) - 1, min(cols)) if cols else None


def _read(readout: Callable[[Tensor], Tensor] | None, resid: Tensor) -> Tensor:
    return resid if readout is None else readout(resid)


def _check_runs(base: CleanRun, source: CleanRun) -> None:
    if base.tokens.shape != source.tokens.shape:
        raise InputError(
            f"base tokens have shape {tuple(base.tokens.shape)}, source tokens {tuple(source.tokens.shape)}; "
            "interchange needs pairs of equal length: pad both or drop the pair"
        )
