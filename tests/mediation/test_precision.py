"""What a notebook says about the precision of its effects."""

import pytest
import torch
from families import FAMILIES, tiny_subject

from companion.mediation import precision, study
from companion.model.readout import norm_gain


@pytest.fixture(scope="module")
def half() -> study.Study:
    return study.begin("embedded", "embedded", "half", dtype="bfloat16", pairs=10)


def test_float32_effects_are_just_named_and_half_precision_is_held_to_a_wider_tolerance(half: study.Study) -> None:
    whole = study.begin("embedded", "embedded", "whole", pairs=10)
    assert precision.describe_precision(whole) == "effects are computed in float32"
    assert precision.tolerance(whole) == 1e-4 < precision.tolerance(half)


def test_a_screening_run_prints_its_noise_floor(half: study.Study) -> None:
    shown = precision.describe_precision(half)
    assert shown.startswith("SCREENING in bfloat16") and "neuron" in shown and "mlp_out" in shown


def test_the_noise_is_that_of_half_precision(half: study.Study) -> None:
    modules, neurons = (precision.noise_floor(half, site) for site in ("mlp_out", "neuron"))
    assert 1e-3 < modules.rms < 1
    assert 0 < neurons.sign_changes + neurons.lost < 1
    assert half.subject.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_is_known_in_half_precision_too(family: str) -> None:
    half, whole = (norm_gain(tiny_subject(family, dtype).final_norm)[0] for dtype in (torch.bfloat16, torch.float32))
    assert torch.allclose(half.float(), whole, atol=0.01)
