"""Runs that set in above the plain model's give what full forward passes give; answers are the library's."""

import copy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import get_args
from unittest import mock

import numpy as np
import pytest
import torch
from models import FAMILIES, tiny_model, tiny_subject
from models import tokens as some_tokens
from steering_lab import following_last, half_open, shut, varied_steerings
from torch import Tensor
from transformers import DynamicCache

from companion.generation import decode, forward, hooks, outcomes
from companion.generation.hooks import PLAIN, Edit, Read, Steering, Where
from companion.model import activations
from companion.model.architecture import Subject, end_tokens
from companion.model.load import from_model
from companion.prompts import tokens
from companion.prompts.tokens import Openers

# ---- forward ----


GATE = {"gate": partial(half_open, 0), "reads": (Read("g", 1, back=1),)}
STEERINGS = {
    "late, all tokens": Steering("a", (Edit(2, "resid_post", following_last), Edit(3, "mlp_out", following_last))),
    "last token": Steering("b", (Edit(2, "mlp_out", lambda x, _: x.tanh(), "last"),), **GATE),
}
TOGETHER = [
    *([one] for one in STEERINGS.values()),
    *(varied_steerings("resid_post", where) for where in get_args(Where)),
]


def said(subject: Subject, answer: Tensor, rows: Tensor, logits: Tensor, cache: object) -> Tensor:
    """Logits before each of three given answer tokens."""
    rest = subject.model(answer[rows, :-1], past_key_values=cache, use_cache=True).logits
    return torch.cat([logits[:, None], rest], dim=1)


def full_pass(subject: Subject, ids: Tensor, steering: Steering, use: forward.Use) -> Tensor:
    """What `use` makes of one full pass under the steering's hooks."""
    with hooks.applied(subject, steering):
        out = subject.model(ids, use_cache=True)
        return use(torch.arange(len(ids)), out.logits[:, -1], out.past_key_values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("many", TOGETHER, ids=lambda many: f"{len(many)} at {many[0].edits[0].where}")
@torch.no_grad()
def test_resumed_runs_alone_and_together_are_the_full_ones(family: str, many: list[Steering]) -> None:
    subject, ids, answer = tiny_subject(family), some_tokens(4, 9), some_tokens(4, 3, seed=7)
    use = partial(said, subject, answer)
    found = forward.read_prompts(subject, ids, many, use)
    full, plain = (torch.stack([full_pass(subject, ids, one, use) for one in some]) for some in (many, [PLAIN]))
    torch.testing.assert_close(found, full, atol=2e-4, rtol=1e-4)
    moved = (full - plain).abs().amax((2, 3)) > 1e-3
    assert moved.any(1).tolist() == [one.strength > 0 and one.gate is not shut for one in many]
    assert len(many) > 1 or moved[0, 1:].all()
    plainly = forward.read_prompts(subject, ids, [replace(many[0], strength=0.0), PLAIN], use)
    assert torch.equal(*plainly) and all(torch.equal(*pair) for pair in pairwise(found[3:])), "not a bit is moved"


@torch.no_grad()
def test_after_an_exception_in_a_full_or_resumed_run_the_model_is_as_it_was() -> None:
    subject, ids = tiny_subject("llama"), some_tokens(4, 9)
    before, broken = subject.model(ids).logits, mock.Mock(side_effect=RuntimeError("in the middle of a block"))
    for first in (following_last, broken):  # in the block that is replaced by its known output, and above it
        steering = Steering("broken", (Edit(1, "resid_post", first), Edit(2, "mlp_out", broken)))
        for how in (full_pass, lambda subject, ids, one, use: forward.read_prompts(subject, ids, [one], use)):
            with pytest.raises(RuntimeError, match="middle"):
                how(subject, ids, steering, lambda rows, logits, cache: logits)
    modules = list(subject.model.modules())
    assert not [m for m in modules if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
    assert torch.equal(subject.model(ids).logits, before)


def test_the_plain_pass_is_made_once_and_forgotten_when_too_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, made = tiny_subject("llama"), []
    real = activations.clean_run
    monkeypatch.setattr(forward, "clean_run", lambda *a, **k: made.append(1) or real(*a, **k))
    first, second = some_tokens(2, 8, seed=1), some_tokens(2, 8, seed=2)
    kept = forward.plain_run(subject, first)
    one = sum(x.nbytes for layers in (kept.resid_post, kept.keys, kept.values) for x in layers)
    assert forward.plain_run(subject, first) is kept and len(made) == 1
    monkeypatch.setattr(forward, "KEPT_BYTES", one)
    assert forward.plain_run(subject, second) is not forward.plain_run(subject, first) and len(made) == 3
    other = tiny_subject("llama")
    forward.plain_run(other, first), forward.plain_run(subject, first)
    assert len(made) == 5, "all models share one memory"
    monkeypatch.setattr(forward, "KEPT_BYTES", 2 * one)
    forward.plain_run(other, first), forward.plain_run(subject, second), forward.plain_run(subject, first)
    assert len(made) == 7, "another model's runs go first"
    monkeypatch.setattr(forward, "BATCH_BYTES", one - 1)
    assert forward.plain_run(subject, first) is None


@pytest.mark.parametrize(("fitting", "sizes"), [(5, [5, 5, 1]), (3, [11]), (20, [11])])
def test_batches_are_as_large_as_their_plain_run_can_be_kept(monkeypatch, fitting, sizes):
    """Where fewer than four prompts fit, all are read from the bottom together."""
    subject = tiny_subject("llama")
    monkeypatch.setattr(forward, "encode", lambda *_: np.arange(3, 11))
    one = forward.plain_run(subject, torch.arange(3, 11)[None])
    size = sum(x.nbytes for layers in (one.resid_post, one.keys, one.values) for x in layers)
    monkeypatch.setattr(forward, "BATCH_BYTES", fitting * size)
    assert [len(ids) for _, ids in forward.buckets(subject, ["a"] * 11)] == sizes


@torch.no_grad()
def test_an_answer_that_is_known_is_copied_only_behind_a_shut_gate() -> None:
    subject, known, asked = tiny_subject("llama"), torch.full((4, 1), 77.0), []
    use = lambda rows, logits, cache: asked.append(rows.tolist()) or logits[:, :1]  # noqa: E731
    (found,) = forward.read_prompts(subject, some_tokens(4, 9), [STEERINGS["last token"]], use, plain=known)
    assert asked == [[1, 2, 3]]
    assert (found == 77).flatten().tolist() == [True, False, False, False]


def test_a_batch_is_bounded_and_holds_steerings_of_the_same_sites_only() -> None:
    same, other = varied_steerings("resid_post", "prompt")[:3], varied_steerings("mlp_out", "prompt")[0]
    assert list(map(len, forward.fitting([*same, other, same[0]], 5, 10))) == [2, 1, 1, 1]
    assert list(map(len, forward.fitting(same, 100, 10))) == [1, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("steering", "n_plain"), [(PLAIN, 4), *((one, 2) for one in STEERINGS.values())])
@torch.no_grad()
def test_a_prefix_read_once_below_the_steering_changes_nothing(family, steering, n_plain, monkeypatch):
    subject, ids, answer = from_model(tiny_model(family)), some_tokens(4, 12), some_tokens(4, 3, seed=7)
    ids[:, :9] = ids[0, :9]
    monkeypatch.setattr(forward, "BATCH_BYTES", 0)  # read from the bottom, as where no plain run can be kept
    plain = forward.read_prompts(subject, ids, [steering], partial(said, subject, answer))
    seen, real = [], activations._in_two
    monkeypatch.setattr(activations, "SMALLEST", 0)
    monkeypatch.setattr(activations, "PAYS", {"cpu": 1})
    monkeypatch.setattr(activations, "_in_two", lambda block, layer, n: seen.append(layer) or real(block, layer, n))
    once = forward.read_prompts(subject, ids, [steering], partial(said, subject, answer))
    assert len(seen) == n_plain
    torch.testing.assert_close(once, plain, atol=2e-4, rtol=1e-4)


# ---- decode ----


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
    draws, push = decode.uniforms(5, 12, seed=4), torch.randn(128, generator=torch.Generator().manual_seed(0))
    plain = decode.answers(embedded, texts, 12, draws=draws)
    for size in (0.0, 60.0):
        edits = (Edit(2, "resid_post", lambda x, _, size=size: size * push.expand(len(x), 1, -1)),)
        pushed = Steering("pushed", edits, gate=lambda prompt: (prompt.ids.sum(-1) % 3 > 0).float())
        made = decode.answers(embedded, texts, 12, pushed, draws)
        assert (made.ids[:, 0] != plain.ids[:, 0]).any() if size else np.array_equal(made.ids, plain.ids)
        for i, text in enumerate(texts):
            alone = decode.answers(embedded, [text], 12, pushed, draws[i : i + 1])
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
