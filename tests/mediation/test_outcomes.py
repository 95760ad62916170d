"""Outcomes against the library's own logits, losses and greedy generation."""

import numpy as np
import pytest
import torch
from effect_tools import log_odds, refusals_against_rest
from families import VOCAB, tiny_model, tiny_subject, tokens
from torch import Tensor
from true_float64 import true_float64

from companion.generation import decode
from companion.mediation import outcomes
from companion.model import activations, readout
from companion.model.architecture import Subject
from companion.model.load import from_model
from companion.prompts.tokens import Openers

OPENERS = Openers((10, 12, 13), (20, 21))
EQUAL = (torch.full((3,), 1 / 3), torch.full((2,), 1 / 2))  # every opener counts the same


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject("llama")


def final(subject: Subject, ids: Tensor) -> Tensor:
    return activations.clean_run(subject, ids).resid_post[-1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_log_odds_are_those_of_the_library(family: str) -> None:
    subject, ids = tiny_subject(family), tokens()
    p = subject.model(ids).logits.detach().double().softmax(-1)
    wanted = [p[..., list(camp)].sum(-1) for camp in (OPENERS.comply, OPENERS.refuse)]
    found = outcomes.log_odds(subject, final(subject, ids), OPENERS)
    np.testing.assert_allclose(found, wanted[0].log() - wanted[1].log(), atol=1e-5)
    camps = outcomes.opener_probabilities(subject, final(subject, ids)[:, -1], OPENERS)
    np.testing.assert_allclose(torch.stack(camps), torch.stack(wanted)[..., -1], rtol=1e-5)  # over the whole vocabulary
    assert found.dtype == torch.float64 and (sum(wanted) < 0.9).all()


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2"])
def test_contrast_with_a_frozen_norm_is_linear(family: str) -> None:
    subject = tiny_subject(family)
    a, b, like = final(subject, tokens())[:, :3].unbind(1)
    mixed = (a, b, 0.3 * a + 0.7 * b)
    value, free = ([outcomes.contrast(subject, x, OPENERS, norm, EQUAL) for x in mixed] for norm in (like, None))
    np.testing.assert_allclose(value[2], 0.3 * value[0] + 0.7 * value[1], atol=1e-5)
    assert (free[2] - 0.3 * free[0] - 0.7 * free[1]).abs().max() > 1e-3
    own = outcomes.log_odds(subject, a, OPENERS, a)
    np.testing.assert_allclose(own, outcomes.log_odds(subject, a, OPENERS), atol=1e-5)
    logits = subject.model(tokens()).logits.detach()[:, 0]
    wanted = logits[:, list(OPENERS.comply)].mean(-1) - logits[:, list(OPENERS.refuse)].mean(-1)
    np.testing.assert_allclose(free[0], wanted, atol=1e-5)


def test_camp_weights_make_the_contrast_follow_y1(subject: Subject) -> None:
    """Y1's own weights at both ends: an opener that the model never says must not count as much as the one it says."""
    control, treated = final(subject, tokens())[:, -1], final(subject, tokens(seed=4))[:, -1]
    both = outcomes.opener_weights(subject, control, treated, OPENERS)
    for weights in both:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    for resid in (control, treated):  # a small step from either end moves both alike, up to the other end's weights
        same = outcomes.opener_weights(subject, resid, resid, OPENERS)
        step = 1e-3 * torch.randn(resid.shape, generator=torch.Generator().manual_seed(0))
        moved = [outcomes.log_odds(subject, at, OPENERS, resid) for at in (resid, resid + step)]
        linear = [outcomes.contrast(subject, at, OPENERS, resid, same) for at in (resid, resid + step)]
        torch.testing.assert_close(moved[1] - moved[0], linear[1] - linear[0], atol=2e-5, rtol=0.02)
    te = outcomes.log_odds(subject, treated, OPENERS) - outcomes.log_odds(subject, control, OPENERS)
    errors = []
    for weights in (both, EQUAL):
        ends = [outcomes.contrast(subject, resid, OPENERS, None, weights) for resid in (control, treated)]
        errors.append(float((ends[1] - ends[0] - te).abs().mean()))
    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_refusals_against_everything_else(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read block by block it is what the lists say, of which one block holds refusals alone."""
    monkeypatch.setattr(readout, "VOCABULARY_BLOCK", 7)
    subject, ids = tiny_subject(family, torch.float64), tokens()
    rest, lists = refusals_against_rest(VOCAB, (*range(14, 21), 33))
    with true_float64(subject.model):
        control, treated = final(subject, ids)[:, -1:], final(subject, tokens(seed=4))[:, -1:]
        found = outcomes.log_odds(subject, control, rest)
        wanted = log_odds(subject.model(ids).logits[:, -1:], lists)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        weights = outcomes.opener_weights(subject, control, treated, rest)
        for name in ("Y1.frozen", "contrast.frozen"):
            cells = torch.cat([control, treated, 0.3 * control + 0.7 * treated], 1)
            both = [outcomes.named_outcome(subject, cells, control, treated, one, name) for one in (rest, lists)]
            torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-12)
            if name == "contrast.frozen" and subject.soft_cap is None:  # components' direct effects add up
                torch.testing.assert_close(both[0][:, 2], 0.3 * both[0][:, 0] + 0.7 * both[0][:, 1], rtol=0, atol=1e-12)
        for one, other in zip(weights, outcomes.opener_weights(subject, control, treated, lists), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
        camps = [outcomes.opener_probabilities(subject, control[:, 0], one) for one in (rest, lists)]
        torch.testing.assert_close(camps[0], camps[1], rtol=0, atol=1e-14)
    texts = [outcomes.continuations(subject, ids, tokens(seed=4), [one] * 3, steps=4) for one in (rest, lists)]
    assert texts[0][0][0].equal(texts[1][0][0]) and not set(texts[0][0][0][:, 0].tolist()) & set(rest.refuse)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_rest_is_exact_in_float32_where_one_side_has_everything(scale: float) -> None:
    """Sums of exponentials neither overflow nor lose the side that is hardly ever said."""
    logits = scale * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    refuse = logits[0].topk(3).indices.tolist()
    parts = ((start, logits[:, start : start + 8].clone()) for start in range(0, 40, 8))
    wanted = log_odds(logits, refusals_against_rest(40, tuple(refuse))[1])
    torch.testing.assert_close(readout.rest_against(parts, refuse), wanted, rtol=1e-6, atol=1e-6)


def test_sequence_log_prob_is_the_library_s_loss_for_each_variant(subject: Subject) -> None:
    ids = tokens(4, 12)
    resid = final(subject, ids)[:, 5:-1]
    keep = torch.arange(6) < torch.tensor([6, 1, 3, 4])[:, None]
    variants = torch.stack([resid, resid.roll(1, 0)], dim=1)
    found = outcomes.sequence_log_prob(subject, variants, (ids[:, 6:], keep))
    assert found.shape == (4, 2)
    alone = outcomes.sequence_log_prob(subject, variants[:, 1], (ids[:, 6:], keep))
    np.testing.assert_allclose(found[:, 1], alone, atol=1e-6)
    for row, n, value in zip(ids, keep.sum(1).tolist(), found[:, 0].tolist(), strict=True):
        labels = row.clone()
        labels[:6], labels[6 + n :] = -100, -100
        loss = subject.model(row[None], labels=labels[None]).loss.item()
        assert value == pytest.approx(-n * loss, abs=1e-4)


def greedy(subject: Subject, prompt: Tensor, camp: tuple[int, ...], steps: int, ends: tuple[int, ...]) -> list[int]:
    """One token at a time, no cache: the likeliest of the camp first, then the likeliest of all."""
    text: list[int] = []
    while len(text) < steps and not (text and text[-1] in ends):
        logits = subject.model(torch.cat([prompt, torch.tensor(text, dtype=torch.long)])[None]).logits[0, -1]
        text.append(int(logits.argmax()) if text else camp[int(logits[list(camp)].argmax())])
    return text


SAMPLED = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "do_sample": True, "top_k": 1}


@pytest.mark.parametrize("settings", [{}, SAMPLED])
def test_continuations_are_greedy_behind_the_forced_opener(settings: dict) -> None:
    subject = tiny_subject("llama")
    control, treated = tokens(5, 7, seed=1), tokens(5, 7, seed=2)
    plain = [greedy(subject, prompt, OPENERS.comply, 9, ()) for prompt in treated]
    ends = (plain[0][3], plain[1][5])  # so that two texts stop early
    for name, value in {"eos_token_id": list(ends), **settings}.items():
        setattr(subject.model.generation_config, name, value)
    found = outcomes.continuations(subject, control, treated, [OPENERS] * 5, steps=9)
    for prompts, camp, (text, mask) in zip((treated, control), (OPENERS.comply, OPENERS.refuse), found, strict=True):
        wanted = [greedy(subject, prompt, camp, 9, ends) for prompt in prompts]
        assert [row[keep].tolist() for row, keep in zip(text, mask, strict=True)] == wanted
    assert len(set(found[0][1].sum(1).tolist())) > 1


def test_each_pair_may_have_openers_of_its_own(subject: Subject) -> None:
    control, treated = tokens(3, 7, seed=1), tokens(3, 7, seed=2)
    own = [OPENERS, Openers((21, 8), (44,)), OPENERS]
    found = outcomes.continuations(subject, control, treated, own, steps=5)
    for i, openers in enumerate(own):
        alone = outcomes.continuations(subject, control[i : i + 1], treated[i : i + 1], [openers], steps=5)
        for (together, _), (text, mask) in zip(found, alone, strict=True):
            assert together[i, : text.shape[1]][mask[0]].tolist() == text[mask].tolist()
    assert found[0][0][1, 0] in (21, 8) and found[1][0][1, 0] == 44


def test_texts_behind_a_shared_opening_are_those_behind_each_prompt_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, prompts = from_model(tiny_model("llama")), (tokens(5, 12, seed=1), tokens(5, 12, seed=2))
    for ids in prompts:
        ids[:, :9] = prompts[0][0, :9]

    def made() -> tuple:
        texts = outcomes.continuations(subject, *prompts, [OPENERS] * 5, steps=6)
        run = outcomes.forced_run(subject, prompts[0], texts[0], beside=prompts)
        said = decode.greedy_answers(subject, prompts[0], 6)
        return texts, run.resid_post, torch.tensor(said.ids)

    plain = made()
    monkeypatch.setattr(activations, "SMALLEST", 0)
    monkeypatch.setattr(activations, "PAYS", {"cpu": 1})
    seen, real = [], activations._in_two
    monkeypatch.setattr(activations, "_in_two", lambda block, layer, n: seen.append(n) or real(block, layer, n))
    torch.testing.assert_close(made(), plain, atol=1e-4, rtol=1e-4)
    assert seen == [9] * 3 * subject.n_layers
