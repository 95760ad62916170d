"""The closed form for last-layer neurons against the replay."""

import pytest
import torch
from families import FAMILIES, tiny_subject
from neuron_tools import clean_batch, patched, tiny_study
from true_float64 import true_float64

from companion.model import readout
from companion.neurons import closed_form

ROWS = torch.tensor([5, 9, 33])
EVERY = [(3, neuron) for neuron in range(48)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_neuron_to_rounding(family: str) -> None:
    study = tiny_study(family, n=3)
    with true_float64(study.subject.model):
        batch = clean_batch(study)
        pair = (study.subject, batch.control, batch.treated)
        whole = readout.logits(study.subject, patched(study, batch, EVERY))
        clean = readout.logits(study.subject, batch.control.resid_post[3][:, None, -1])
        effect = float((whole - clean).abs().max())
        assert effect > 0.1
        log_probs = whole.log_softmax(-1)
        odds = log_probs[..., [5, 9]].logsumexp(-1) - log_probs[..., 33]
        rows = {closed_form.last_layer_neurons: whole, closed_form.last_layer_log_probs: log_probs}
        found = [(made(*pair, ROWS), wanted[..., ROWS]) for made, wanted in rows.items()]
        for got, wanted in (*found, (closed_form.last_layer_log_odds(*pair, [5, 9], [33]), odds)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * effect)


def test_blocks_and_large_logits_do_not_change_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study(n=3)
    with torch.no_grad():
        study.subject.unembed.weight.mul_(1000)  # logits far beyond what exp can take
    batch = clean_batch(study)
    wanted = readout.logits(study.subject, patched(study, batch, EVERY)).log_softmax(-1)[..., ROWS]
    monkeypatch.setattr(closed_form, "BLOCK", 7 * 61)
    monkeypatch.setattr(closed_form, "CACHED", 2 * 61)
    got = closed_form.last_layer_log_probs(study.subject, batch.control, batch.treated, ROWS)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_is_known_in_half_precision_too(family: str) -> None:
    half, whole = (tiny_subject(family, dtype).final_norm for dtype in (torch.bfloat16, torch.float32))
    assert torch.allclose(readout.norm_gain(half)[0].float(), readout.norm_gain(whole)[0], atol=0.01)
