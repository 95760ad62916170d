"""The readable slow path: one full forward pass per intervention, by forward hooks.

It makes no use of the grid's shortcuts, so it is what the grid is tested against, and it serves models that the
grid refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from companion.base.device import synchronize
from companion.base.display import progress
from companion.model.activations import CleanRun, Hook, on_input
from companion.model.architecture import Subject
from companion.model.interventions import Patch, as_variants, entries, on_site
from companion.model.readout import read_positions


@torch.no_grad()
def interchange_full_forward(
    subject: Subject,
    base: CleanRun,
    source: CleanRun,
    patches: Sequence[Patch | Sequence[Patch]],
    read: Sequence[int] = (-1,),
) -> Float[Tensor, "pair patch read d"]:
    """`companion.model.replay.interchange`, computed the plain way."""
    variants = as_variants(subject, base, patches)
    positions = read_positions(base, read)
    results = []
    for variant in progress(variants, desc="full forward passes", total=len(variants)):
        with ExitStack() as stack:
            for patch in variant:
                stack.enter_context(_hook(subject, source, patch))
            results.append(final_residual(subject, base)[:, positions])
        synchronize(subject.device)  # so that the bar's estimate is of work done, not of work told
    return torch.stack(results, dim=1)


def final_residual(subject: Subject, run: CleanRun) -> Float[Tensor, "pair pos d"]:
    """The residual stream before the final norm in one forward pass over a run's tokens, under whatever hooks are set."""
    seen: list[Tensor] = []
    with torch.no_grad(), on_input(subject.final_norm, seen.append):
        subject.model.base_model(input_ids=run.tokens, use_cache=False)
    return seen[-1]  # hooks that look at the prompt in a pass of their own make that one first


def _hook(subject: Subject, source: CleanRun, patch: Patch) -> Hook:
    chosen = entries(subject, patch)
    value = source.site(patch.site, patch.layer)[..., chosen] if patch.value is None else patch.value

    def replace(tensor: Tensor) -> Tensor:
        new = tensor.clone()
        new[..., chosen] = torch.where(patch.positions[..., None], value.to(new), new[..., chosen])
        return new

    return on_site(subject.layers[patch.layer], patch.site, replace)
