"""Answers: as the library decodes them, and samples that depend on nothing else."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny_subject
from families import tokens as some_tokens
from transformers import DynamicCache

from companion.generation import decode, outcomes
from companion.generation.forward import Switch
from companion.generation.hooks import Edit, Steering
from companion.model.architecture import Subject, end_tokens
from companion.prompts import tokens
from companion.prompts.tokens import Openers


def test_greedy_answers_are_those_of_the_library(embedded: Subject, texts: list[str]) -> None:
    made = decode.answers(embedded, texts, 12)
    for text, ids, mask in zip(texts, made.ids, made.mask, strict=True):
        prompt = torch.tensor(tokens.encode(embedded.tokenizer, text)[0])[None]
        whole = embedded.model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        assert ids[mask].tolist() == whole[prompt.shape[1] :].tolist()
        alone = decode.greedy_answers(embedded, prompt, 12)
        assert alone.ids[0][alone.mask[0]].tolist() == ids[mask].tolist()


def test_an_answer_ends_as_a_turn_does(embedded: Subject, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In many chat models the generation config names the end of a text and not that of a turn."""
    wanted, end = decode.answers(embedded, texts, 16), embedded.model.generation_config.eos_token_id
    monkeypatch.setattr(embedded.model.generation_config, "eos_token_id", 3)
    subject = replace(embedded, tokenizer=copy.deepcopy(embedded.tokenizer))
    subject.tokenizer.eos_token = "<|pad|>"
    named = end_tokens(subject)
    assert named[end] == ("chat template",) and named[3] == ("generation config",)
    made = decode.answers(subject, texts, 16)
    assert np.array_equal(made.mask, wanted.mask) and (made.mask.sum(-1) < 16).all()


def test_answers_are_the_same_alone_and_together(embedded: Subject, texts: list[str]) -> None:
    """Together and one by one: plain, and steered below the last layer, so that caches differ."""
    draws, push = decode.uniforms(5, 12, seed=4), torch.randn(128, generator=torch.Generator().manual_seed(0))
    plain = decode.answers(embedded, texts, 12, draws=draws)
    for size in (0.0, 60.0):
        edits = (Edit(2, "resid_post", lambda x, _, size=size: size * push.expand(len(x), 1, -1)),)
        switch = Switch(embedded, Steering("pushed", edits, gate=lambda prompt: (prompt.ids.sum(-1) % 3 > 0).float()))
        made = decode.answers(embedded, texts, 12, switch, draws)
        assert (made.ids[:, 0] != plain.ids[:, 0]).any() if size else np.array_equal(made.ids, plain.ids)
        for i, text in enumerate(texts):
            alone = decode.answers(embedded, [text], 12, switch, draws[i : i + 1])
            wanted = alone.ids[0][alone.mask[0]].tolist()
            assert made.ids[i][made.mask[i]].tolist() == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_cache_goes_on_like_the_ones_it_was_made_of(family: str) -> None:
    model, ends = tiny_subject(family), torch.tensor([7])
    scores: dict[int, list[torch.Tensor]] = {}

    def choose(logits: torch.Tensor, places: np.ndarray, step: int) -> torch.Tensor:
        scores.setdefault(step, []).append(logits)
        return (logits.argmax(-1) + torch.tensor(places)) % 40

    def begun() -> list[decode.Begun]:
        made = []
        for place, n in ((0, 9), (2, 6)):
            cache = DynamicCache()
            logits = model.model(some_tokens(2, n, seed=n), past_key_values=cache).logits[:, -1]
            made.append(decode.Begun(np.arange(2) + place, logits, cache, torch.full((2,), n)))
        return made

    with torch.no_grad():
        alone = [decode.decode(model, one, 4, ends, choose, shrink=False) for one in begun()]
        apart, scores = {step: torch.cat(found) for step, found in scores.items()}, {}
        joined = decode.decode(model, decode.together(begun()), 4, ends, choose, shrink=False)
    assert np.array_equal(np.concatenate(alone), joined)
    for step, found in scores.items():
        torch.testing.assert_close(found[0], apart[step], atol=2e-4, rtol=1e-4)


def test_samples_have_the_models_probabilities(embedded: Subject, first_words: Openers, texts: list[str]) -> None:
    many = [texts[3]] * 2000
    first = decode.answers(embedded, many, 1, draws=decode.uniforms(2000, 1, seed=0)).ids[:, 0]
    refused = outcomes.log_odds(embedded, texts[3:4], first_words).p_refuse[0]
    assert 0.1 < refused < 0.9
    spread = np.sqrt(refused * (1 - refused) / 2000)
    assert np.isin(first, first_words.refuse).mean() == pytest.approx(refused, abs=4 * spread)


def test_repetition_counts_four_grams() -> None:
    ids = np.array([[1, 2, 3, 4, 1, 2, 3, 4, 9], [1, 2, 3, 0, 0, 0, 0, 0, 0]])
    mask = np.array([[True] * 8 + [False], [True] * 3 + [False] * 6])
    assert decode.repetition(decode.Answers(ids, mask)).tolist() == pytest.approx([0.2, 0.0])
