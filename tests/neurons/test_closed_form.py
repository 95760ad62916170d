"""The closed form for last-layer neurons against the replay."""

import pytest
import torch
from effect_tools import log_odds, refusals_against_rest
from families import FAMILIES, VOCAB, tiny_subject
from neuron_tools import clean_batch, patched, tiny_study
from true_float64 import true_float64

from companion.mediation.study import Study
from companion.model import readout
from companion.neurons import closed_form

ROWS = torch.tensor([5, 9, 33])
EVERY = [(3, neuron) for neuron in range(48)]


def logits_and_effect(study: Study) -> tuple[torch.Tensor, float]:
    """Replayed logits of every neuron, and the largest change of a logit."""
    batch = clean_batch(study)
    whole = readout.logits(study.subject, patched(study, batch, EVERY))
    return whole, float((whole - readout.logits(study.subject, batch.control.resid_post[3][:, None, -1])).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_neuron_to_rounding(family: str) -> None:
    study = tiny_study(family, n=3)
    with true_float64(study.subject.model):
        batch = clean_batch(study)
        pair = (study.subject, batch.control, batch.treated)
        whole, effect = logits_and_effect(study)
        assert effect > 0.1
        log_probs = whole.log_softmax(-1)
        odds = log_probs[..., [5, 9]].logsumexp(-1) - log_probs[..., 33]
        for got, wanted in (
            (closed_form.last_layer_neurons(*pair, ROWS), whole[..., ROWS]),
            (closed_form.last_layer_log_odds(*pair, [5, 9], [33]), odds),
        ):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * effect)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_neuron_against_the_whole_vocabulary(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of the vocabulary and of neurons, of which the last are smaller."""
    monkeypatch.setattr(readout, "VOCABULARY_BLOCK", 7)
    monkeypatch.setattr(closed_form, "BLOCK_LOGITS", 11 * VOCAB)
    study, (rest, lists) = tiny_study(family, n=3), refusals_against_rest(VOCAB)
    with true_float64(study.subject.model):
        batch = clean_batch(study)
        whole, _ = logits_and_effect(study)
        for one in (rest, lists):  # a caller with nothing but the two lists gets the same
            camps = (one.comply, one.refuse)
            found = closed_form.last_layer_log_odds(study.subject, batch.control, batch.treated, *camps)
            torch.testing.assert_close(found, log_odds(whole, lists), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_is_known_in_half_precision_too(family: str) -> None:
    half, whole = (tiny_subject(family, dtype).final_norm for dtype in (torch.bfloat16, torch.float32))
    assert torch.allclose(readout.norm_gain(half)[0].float(), readout.norm_gain(whole)[0], atol=0.01)
