"""Exact interventions on a grid of cells (layer, position): total effects, direct effects, logits.

Replacing what one layer computes at one position changes only the cells above it and behind it. Everything else is
the clean run, which is kept. So an intervention costs the cells to its upper right and not a forward pass, and it
is exact.

>>> from companion.model.load import load
>>> subject = load("embedded")
>>> control, treated = torch.randint(9, 99, (2, 3, 12), generator=torch.Generator().manual_seed(0))
>>> base, source = clean_run(subject, control), clean_run(subject, treated)
>>> last = torch.arange(12).expand(3, -1) == 11
>>> patches = [Patch("mlp_out", layer, last) for layer in range(subject.n_layers)]
>>> logits(subject, interchange(subject, base, source, patches), rows=torch.tensor([5, 6])).shape
torch.Size([3, 6, 1, 2])

Both directions of an interchange at once: the control run patched from the treated one, and the other way round.

A small batch costs what calling the layers costs, not what they compute. Both runs one above the other are one batch of
twice the size, and the answers are the same.

Many single neurons of one layer at the last token: the grid's answer, without an intervention object for each.

Each neuron changes one cell. The edited states of a chunk are made by one multiplication and then climb the layers side
by side, as the stretches of `companion.model.propagation` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.base.errors import InputError
from companion.model import reference
from companion.model.activations import CleanRun
from companion.model.architecture import Subject, written_vectors
from companion.model.interventions import Patch, Variant, as_variants, changed_columns, columns, projection, written
from companion.model.memory import in_chunks, token_budget
from companion.model.propagation import Stretch, make_layout, replay, sweep
from companion.model.readout import read_positions

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


@torch.no_grad()
def each_neuron(
    subject: Subject,
    base: CleanRun,
    source: CleanRun,
    layer: int,
    chosen: Int[Tensor, neuron],
    readout: Callable[[Tensor], Tensor],
) -> Float[Tensor, "pair neuron ..."]:
    """What `replay.interchange` gives for each chosen neuron on its own at the last token, read there.

    `readout` turns final residual streams (pair, neuron, d) into what is wanted. A neuron that no pair changes gives the
    base's own.
    """
    if not subject.replayable:
        return interchange(subject, base, source, _patches(base, layer, chosen), readout=readout)[:, :, 0]
    change = (source.site("neuron", layer) - base.site("neuron", layer))[:, -1, chosen]
    clean = readout(base.resid_post[-1][:, None, -1])
    found = clean.expand(-1, len(chosen), *clean.shape[2:]).clone()
    end, slots = base.tokens.shape[1], (change != 0).any(0).nonzero().flatten().tolist()
    stretches = [Stretch((), slot, layer, end - 1) for slot in slots]

    def climb(chunk: Sequence[Stretch]) -> Tensor:
        at = torch.tensor([stretch.slot for stretch in chunk], device=change.device)
        layout = make_layout(chunk, end, change.device)
        resid = _edited(subject, base, layer, change[:, at], chosen[at])
        for above in range(layer + 1, subject.n_layers):
            resid = replay(subject, base, above, resid, layout)
        return resid

    for chunk, resid in in_chunks(stretches, end, token_budget(subject, end), climb):
        found[:, [stretch.slot for stretch in chunk]] = readout(resid)
    return found


def _patches(base: CleanRun, layer: int, chosen: Int[Tensor, neuron]) -> list[Patch]:
    last = torch.zeros_like(base.tokens, dtype=torch.bool)
    last[:, -1] = True
    return [Patch("neuron", layer, last, int(neuron)) for neuron in chosen.tolist()]


def _edited(
    subject: Subject, base: CleanRun, layer: int, change: Float[Tensor, "pair neuron"], chosen: Int[Tensor, neuron]
) -> Float[Tensor, "pair neuron d"]:
    """The residual stream above the layer at the last token, with each neuron's own write changed."""
    parts, down = subject.layers[layer], projection(subject.layers[layer], "neuron")
    write = change[..., None] * written_vectors(down)[chosen]
    middle = (base.resid_pre[layer] + base.site("attn_out", layer))[:, None, -1]
    if parts.mlp_post is None:
        return middle + (base.site("mlp_out", layer)[:, None, -1] + write)
    raw = down(base.site("neuron", layer)[:, None, -1])
    return middle + torch.as_tensor(parts.mlp_post(raw + write))
