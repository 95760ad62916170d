"""The closed form for last-layer neurons against the replay."""

import pytest
import torch
from effect_tools import log_odds, refusals_against_rest
from families import FAMILIES, VOCAB, tiny_subject
from neuron_tools import clean_batch, patched, tiny_study
from true_float64 import true_float64

from companion.mediation.study import Study
from companion.model import readout
from companion.model.architecture import written_vectors
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


@pytest.mark.parametrize("family", [one for one in FAMILIES if closed_form.is_closed(tiny_subject(one))])
def test_outputs_that_are_kept_and_logits_far_from_the_clean_runs(family: str) -> None:
    """A change a thousand times as large drives exponentials below the clean run's largest out of range."""
    study, refuse = tiny_study(family, n=3), refusals_against_rest(VOCAB)[0].refuse
    subject, last = study.subject, study.subject.layers[-1]
    with true_float64(subject.model):
        batch = clean_batch(study)
        runs = batch.control, batch.treated
        kept = closed_form.last_layer_both_ways(subject, *runs, refuse, closed_form.last_layer_outputs(subject))
        for one, other in zip(kept, closed_form.last_layer_both_ways(subject, *runs, refuse), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        resid, vectors = runs[0].resid_post[3][:, -1], written_vectors(last.down_proj)
        for size in (1.0, 1e5):
            change = size * (runs[1].neurons[3] - runs[0].neurons[3])[:, -1]
            frozen = torch.ones(len(change), dtype=torch.bool)
            found = closed_form.written_log_odds(subject, resid, change, vectors, refuse, frozen)
            moved = resid[:, None] + change[..., None] * vectors
            known = readout.log_odds_against_rest(subject, moved, refuse, norm_like=resid[:, None])
            torch.testing.assert_close(found, known, rtol=1e-10, atol=1e-10)
    assert known.abs().max() > 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_is_known_in_half_precision_too(family: str) -> None:
    half, whole = (tiny_subject(family, dtype).final_norm for dtype in (torch.bfloat16, torch.float32))
    assert torch.allclose(readout.norm_gain(half)[0].float(), readout.norm_gain(whole)[0], atol=0.01)
