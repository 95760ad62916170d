"""Many single neurons of one layer at the last token: the grid's answer, without an intervention object for each.

Each neuron changes one cell. The edited states of a chunk are made by one multiplication and then climb the layers side
by side, as the stretches of `helpers.grid_sweep` do.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers import grid
from helpers.grid_chunks import in_chunks, token_budget
from helpers.grid_patch import Patch, projection
from helpers.grid_run import CleanRun
from helpers.grid_sweep import Stretch, make_layout, replay
from helpers.subject_parts import Subject, written_vectors


@torch.no_grad()
def each_neuron(
    subject: Subject,
    base: CleanRun,
    source: CleanRun,
    layer: int,
    chosen: Int[Tensor, "neuron"],
    readout: Callable[[Tensor], Tensor],
) -> Float[Tensor, "pair neuron ..."]:
    """What `grid.interchange` gives for each chosen neuron on its own at the last token, read there.

    `readout` turns final residual streams (pair, neuron, d) into what is wanted. A neuron that no pair changes gives the
    base's own.
    """
    if not subject.replayable:
        return grid.interchange(subject, base, source, _patches(base, layer, chosen), readout=readout)[:, :, 0]
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


def _patches(base: CleanRun, layer: int, chosen: Int[Tensor, "neuron"]) -> list[Patch]:
    last = torch.zeros_like(base.tokens, dtype=torch.bool)
    last[:, -1] = True
    return [Patch("neuron", layer, last, int(neuron)) for neuron in chosen.tolist()]


def _edited(
    subject: Subject, base: CleanRun, layer: int, change: Float[Tensor, "pair neuron"], chosen: Int[Tensor, "neuron"]
) -> Float[Tensor, "pair neuron d"]:
    """The residual stream above the layer at the last token, with each neuron's own write changed."""
    parts, down = subject.layers[layer], projection(subject.layers[layer], "neuron")
    write = change[..., None] * written_vectors(down)[chosen]
    middle = (base.resid_pre[layer] + base.site("attn_out", layer))[:, None, -1]
    if parts.mlp_post is None:
        return middle + (base.site("mlp_out", layer)[:, None, -1] + write)
    raw = down(base.site("neuron", layer)[:, None, -1])
    return middle + torch.as_tensor(parts.mlp_post(raw + write))
