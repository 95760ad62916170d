"""The noise of half precision."""

import torch
from neuron_tools import clean_batch, neuron_patches, tiny_study

from companion.mediation.precision import precision_noise


def test_half_precision_has_a_noise_floor_and_float32_has_none() -> None:
    noise = {}
    for dtype in (torch.bfloat16, torch.float32):
        study = tiny_study(dtype=dtype, n=3)
        batch = clean_batch(study)
        control, treated = batch.control.tokens, batch.treated.tokens
        patches = neuron_patches(batch, [(1, neuron) for neuron in range(48)])
        noise[dtype] = precision_noise(
            study.subject,
            control,
            treated,
            patches,
            lambda subject, resid: subject.unembed(subject.final_norm(resid))[..., 5],
        )
    assert noise[torch.float32].rms == 0
    assert noise[torch.bfloat16].rms > 1e-3
    assert 0 < noise[torch.bfloat16].sign_changes < 0.5
    assert noise[torch.bfloat16].sign_changes + noise[torch.bfloat16].lost < 1
    assert noise[torch.float32].sign_changes == noise[torch.float32].lost == 0
