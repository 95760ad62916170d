"""Both directions of an interchange at once: the control run patched from the treated one, and the other way round.

A small batch costs what calling the layers costs, not what they compute. Both runs one above the other are one batch of
twice the size, and the answers are the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.grid import interchange
from helpers.grid_patch import Patch
from helpers.grid_run import CleanRun
from helpers.subject_parts import Subject

LAYERS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "neurons", "keys", "values")
Patches = Sequence[Patch | Sequence[Patch]]


def both_ways(
    subject: Subject,
    control: CleanRun,
    treated: CleanRun,
    into_control: Patches,
    into_treated: Patches,
    *,
    at_once: int,
) -> tuple[Float[Tensor, "pair patch d"], Float[Tensor, "pair patch d"]]:
    """Final residual stream at the last token of `interchange` into the control run, and of the same into the treated.

    The two lists hold the same interventions; only the values that they write may differ. `at_once` is how many pairs may
    run together: with copies of both runs in both orders, a third of it is joined. A pure function of shapes.
    """
    n_pairs = len(control.tokens)
    if 3 * n_pairs > at_once or control.mask is not None or treated.mask is not None or not subject.replayable:
        return (
            interchange(subject, control, treated, into_control)[:, :, 0],
            interchange(subject, treated, control, into_treated)[:, :, 0],
        )
    patches = [_joined(*two) for two in zip(into_control, into_treated, strict=True)]
    found = interchange(subject, stacked(control, treated), stacked(treated, control), patches)[:, :, 0]
    return found[:n_pairs], found[n_pairs:]


def stacked(upper: CleanRun, lower: CleanRun) -> CleanRun:
    """Two runs of as many pairs of one length as a single run."""
    n_pairs = len(upper.tokens)
    kept = {name: tuple(map(_cat, getattr(upper, name), getattr(lower, name))) for name in LAYERS}
    calls = tuple(
        {name: _stacked_argument(value, theirs[name], n_pairs) for name, value in own.items()}
        for own, theirs in zip(upper.calls, lower.calls, strict=True)
    )
    return CleanRun(_cat(upper.tokens, lower.tokens), None, calls=calls, **kept)


def _cat(upper: Tensor, lower: Tensor) -> Tensor:
    return torch.cat([upper, lower])


def _stacked_argument(upper: Any, lower: Any, n_pairs: int) -> Any:
    """An argument of a layer's call: what has a row for each pair is stacked, what all pairs share stays."""
    if isinstance(upper, tuple):
        return tuple(_stacked_argument(a, b, n_pairs) for a, b in zip(upper, lower, strict=True))
    has_rows = isinstance(upper, Tensor) and upper.ndim > 1 and upper.shape[0] == n_pairs
    return _cat(upper, lower) if has_rows else upper


def _joined(upper: Patch | Sequence[Patch], lower: Patch | Sequence[Patch]) -> Patch | tuple[Patch, ...]:
    if isinstance(upper, Patch) and isinstance(lower, Patch):
        n_pairs = len(upper.positions)
        values = [None if patch.value is None else patch.value.expand(n_pairs, -1, -1) for patch in (upper, lower)]
        value = None if values[0] is None or values[1] is None else _cat(values[0], values[1])
        return Patch(upper.site, upper.layer, _cat(upper.positions, lower.positions), upper.index, value)
    return tuple(_one(_joined(a, b)) for a, b in zip(_each(upper), _each(lower), strict=True))


def _each(entry: Patch | Sequence[Patch]) -> tuple[Patch, ...]:
    return (entry,) if isinstance(entry, Patch) else tuple(entry)


def _one(entry: Patch | tuple[Patch, ...]) -> Patch:
    assert isinstance(entry, Patch)
    return entry
