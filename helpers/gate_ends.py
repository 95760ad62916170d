"""What the last layer needs of clean runs: its own sites at the last token, of pairs of any lengths together.

Nothing above the last layer reads another token, so an intervention there on the last token needs no more than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from helpers.grid_run import CleanRun, Layers
from helpers.mediation import Batch

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "neurons")


def last_column(batch: Batch) -> Batch:
    """The last layer's sites at the last token, as runs of a single token; what lies below is empty."""
    return replace(batch, control=_last_column(batch.control), treated=_last_column(batch.treated))


def _last_column(run: CleanRun) -> CleanRun:
    def top(layers: Layers) -> Layers:
        # A copy, or the slice would keep the whole run alive.
        return tuple(
            tensor[:, -1:].clone() if i == len(layers) - 1 else tensor[:0].clone() for i, tensor in enumerate(layers)
        )

    kept = {name: top(getattr(run, name)) for name in SITES}
    return replace(run, tokens=run.tokens[:, -1:], mask=None, keys=(), values=(), calls=(), **kept)


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches of `last_column` as one."""
    pairs = tuple(pair for batch in batches for pair in batch.pairs)
    return Batch(pairs, *(_joined([getattr(batch, side) for batch in batches]) for side in ("control", "treated")))


def _joined(runs: Sequence[CleanRun]) -> CleanRun:
    kept = {name: tuple(map(_cat, zip(*(getattr(run, name) for run in runs), strict=True))) for name in SITES}
    return replace(runs[0], tokens=_cat([run.tokens for run in runs]), **kept)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors[0]) else tensors[0]


def only(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some pairs of a batch of `last_column`."""
    at = list(rows)

    def chosen(run: CleanRun) -> CleanRun:
        kept = {name: tuple(t[at] if len(t) else t for t in getattr(run, name)) for name in SITES}
        return replace(run, tokens=run.tokens[at], **kept)

    return Batch(tuple(batch.pairs[i] for i in at), chosen(batch.control), chosen(batch.treated))
