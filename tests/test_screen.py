"""The gradient screen against exact effects, and the noise of half precision."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, tiny_subject
from grid_tools import mask, runs
from torch import Tensor
from true_float64 import true_float64

from companion.mediation.precision import precision_noise
from companion.model import replay
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.neurons.screening import attribution

ROWS = torch.tensor([5, 9])


def difference(subject: Subject, resid: Tensor) -> Tensor:
    """The logit difference of two rows, differentiable."""
    logits = subject.unembed(subject.final_norm(resid))
    return logits[..., 5] - logits[..., 9]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
def test_small_differences_are_estimated_to_first_order(family: str) -> None:
    """If the source differs from the base by a thousandth, gradient times difference is the exact effect nearly."""
    subject = tiny_subject(family, torch.float64)
    subject.model.requires_grad_(False)
    with true_float64(subject.model):
        base, source = runs(subject)
        near = tuple(b + 1e-3 * (s - b) for b, s in zip(base.neurons, source.neurons, strict=True))
        source = replace(source, neurons=near)
        estimate = attribution(subject, base, source, lambda resid: difference(subject, resid))
        patches = [Patch("neuron", layer, mask([8]), neuron) for layer in (0, 2, 3) for neuron in range(0, 48, 5)]
        exact = difference(subject, replay.interchange(subject, base, source, patches)[:, :, 0])
        exact = exact - difference(subject, base.resid_post[3][:, None, -1])
        wanted = torch.stack([estimate[:, p.layer, p.index] for p in patches], dim=1)
        assert float((exact - wanted).abs().max()) < 2e-2 * float(exact.abs().max())
        assert float(exact.abs().max()) > 1e-6


def test_half_precision_has_a_noise_floor_and_float32_has_none() -> None:
    patches = [Patch("neuron", 1, mask([8]), neuron) for neuron in range(48)]
    noise = {}
    for dtype in (torch.bfloat16, torch.float32):
        subject = tiny_subject("llama", dtype)
        control, treated = (run.tokens for run in runs(subject))
        noise[dtype] = precision_noise(subject, control, treated, patches, difference)
    assert noise[torch.float32].rms == 0
    assert noise[torch.bfloat16].rms > 1e-3
    assert 0 < noise[torch.bfloat16].sign_changes < 0.5
    assert noise[torch.bfloat16].sign_changes + noise[torch.bfloat16].lost < 1
    assert noise[torch.float32].sign_changes == noise[torch.float32].lost == 0
