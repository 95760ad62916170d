"""Cheap screening before exact work: a gradient estimate for every neuron, and what half precision does to effects."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers import grid
from helpers.grid import Patch
from helpers.grid_patch import projection
from helpers.grid_run import CleanRun, clean_run, model_inputs, on_input, on_output
from helpers.subject_parts import Subject, find_parts


def attribution(
    subject: Subject, base: CleanRun, source: CleanRun, contrast: Callable[[Tensor], Tensor]
) -> Float[Tensor, "pair layer neuron"]:
    """First-order estimate of every last-token neuron's total effect: gradient at the base run times the difference.

    `contrast` turns final residuals at the last token, (pair, d), into one number a pair, differentiably. The estimate is
    good where effects are small and nearly linear, and wrong where they are not: always recheck the top exactly, and a
    random sample with it. Source: attribution patching (Nanda 2023; Syed et al. 2023, arXiv 2310.10348).
    """
    neurons: list[Tensor] = []
    final: list[Tensor] = []

    def keep(tensor: Tensor) -> None:
        tensor.retain_grad()
        neurons.append(tensor)

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        embedding = subject.model.get_input_embeddings()
        stack.enter_context(on_output(embedding, lambda out: out.detach().requires_grad_()))
        for parts in subject.layers:
            stack.enter_context(on_input(projection(parts, "neuron"), keep))
        stack.enter_context(on_input(subject.final_norm, final.append))
        subject.model.base_model(**model_inputs(base.tokens, base.mask), use_cache=False)
        contrast(final[0][:, -1]).sum().backward()
    estimates = []
    for layer, tensor in enumerate(neurons):
        assert tensor.grad is not None
        change = source.site("neuron", layer)[:, -1] - base.site("neuron", layer)[:, -1]
        estimates.append(tensor.grad[:, -1] * change)
    return torch.stack(estimates, dim=1)


@dataclass(frozen=True)
class PrecisionNoise:
    """How far effects in the subject's own precision are from those in float32.

    `sign_changes` and `lost` are the shares, among effects that are not 0 in float32, that come out with the other sign
    and as 0.
    """

    rms: float
    sign_changes: float
    lost: float


@torch.no_grad()
def precision_noise(
    subject: Subject,
    control: Int[Tensor, "pair pos"],
    treated: Int[Tensor, "pair pos"],
    patches: Sequence[Patch],
    outcome: Callable[[Subject, Tensor], Tensor],
) -> PrecisionNoise:
    """The noise floor of a screening run in half precision, to be printed beside its effects, in the outcome's unit.

    `outcome` maps a subject and final residuals to numbers. A float32 copy of the model is made for the comparison.
    """
    exact = find_parts(copy.deepcopy(subject.model).float(), None, f"{subject.name} in float32", subject.sha256)
    half, full = (_effects(one, control, treated, patches, outcome) for one in (subject, exact))
    exists = full != 0
    shares = [float(which[exists].double().mean()) if exists.any() else 0.0 for which in (half * full < 0, half == 0)]
    return PrecisionNoise(float((half - full).pow(2).mean().sqrt()), *shares)


def _effects(
    subject: Subject,
    control: Int[Tensor, "pair pos"],
    treated: Int[Tensor, "pair pos"],
    patches: Sequence[Patch],
    outcome: Callable[[Subject, Tensor], Tensor],
) -> Tensor:
    base, source = clean_run(subject, control), clean_run(subject, treated)
    patched = outcome(subject, grid.interchange(subject, base, source, patches)).double()
    return patched - outcome(subject, base.resid_post[-1][:, None, -1:]).double()
