"""The closed form for last-layer neurons against the grid."""

import pytest
import torch
from families import FAMILIES, tiny_subject
from grid_tools import mask, runs
from true_float64 import true_float64

from companion.model import readout, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.neurons import closed_form

ROWS = torch.tensor([5, 9, 33])


def residuals(subject: Subject, pair: tuple[CleanRun, CleanRun]) -> torch.Tensor:
    patches = [Patch("neuron", 3, mask([8]), neuron) for neuron in range(subject.d_mlp)]
    return replay.interchange(subject, *pair, patches)[:, :, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_neuron_to_rounding(family: str) -> None:
    subject = tiny_subject(family, torch.float64)
    with true_float64(subject.model):
        pair = base, _ = runs(subject)
        patched = residuals(subject, pair)
        whole = readout.logits(subject, patched)
        effect = (whole - readout.logits(subject, base.resid_post[3][:, None, -1])).abs().max()
        assert float(effect) > 0.1

        def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * float(effect))

        same(closed_form.last_layer_neurons(subject, *pair, ROWS), whole[..., ROWS])
        frozen = readout.logits(subject, patched, ROWS, norm_like=base.resid_post[3][:, None, -1])
        same(closed_form.last_layer_neurons(subject, *pair, ROWS, freeze_norm=True), frozen)
        log_probs = whole.log_softmax(-1)
        same(closed_form.last_layer_log_probs(subject, *pair, ROWS), log_probs[..., ROWS])
        odds = log_probs[..., [5, 9]].logsumexp(-1) - log_probs[..., 33]
        same(closed_form.last_layer_log_odds(subject, *pair, [5, 9], [33]), odds)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_float32(family: str) -> None:
    subject = tiny_subject(family)
    pair = runs(subject)
    whole = readout.logits(subject, residuals(subject, pair))[..., ROWS]
    scale = float((whole - readout.logits(subject, pair[0].resid_post[3][:, None, -1])[..., ROWS]).abs().max())
    got = closed_form.last_layer_neurons(subject, *pair, ROWS)
    assert float((got - whole).abs().max()) < 1e-5 * max(scale, 1)


def test_blocks_and_large_logits_do_not_change_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("llama", torch.float64)
    with torch.no_grad():
        subject.unembed.weight.mul_(1000)  # logits far beyond what exp can take
    pair = runs(subject)
    wanted = readout.logits(subject, residuals(subject, pair)).log_softmax(-1)[..., ROWS]
    monkeypatch.setattr(closed_form, "BLOCK", 7 * 61)
    monkeypatch.setattr(closed_form, "CACHED", 2 * 61)
    got = closed_form.last_layer_log_probs(subject, *pair, ROWS)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-3)
