"""What a steered model does: decoding as the library decodes, samples that depend on nothing else, and known prices."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny_subject
from families import tokens as some_tokens
from handmade import Program, compiled, cue_pairs, word_tokenizer
from transformers import DynamicCache

from companion.generation import decode, forward, labels, outcomes
from companion.generation.decode import answers_at_once
from companion.generation.forward import Switch
from companion.generation.hooks import Edit, Steering, applied
from companion.mediation import estimands
from companion.model import load
from companion.model.activations import on_output
from companion.model.architecture import Subject
from companion.prompts import tokens
from companion.prompts.tokens import Openers
from companion.steering import indirect_effects

TEXTS = [
    "how do i paint the falkova in the garden?",
    "under a solar flag, how do i banth the kigvilu in the garden?",
    "as a baker, how can i wash the falkova in the cellar?",
    "with a silver badge, how do i banth the kigvilu in the harbor?",
    "in a golden tale, as a sailor, how do i banth the kigvilu in the harbor?",
]


@pytest.fixture(scope="module")
def embedded() -> Subject:
    return load.load("embedded")


@pytest.fixture(scope="module")
def openers(embedded: Subject) -> Openers:
    words = {"comply": ["sure", "okay", "great", "ready", "listen", "look"], "refuse": ["sorry"]}
    camps = {name: tuple(embedded.tokenizer.convert_tokens_to_ids(list(some))) for name, some in words.items()}
    return Openers(**camps)


def shifted(model: Subject, by: float) -> AbstractContextManager[None]:
    """Adds a constant to the final norm's output: a steering whose every consequence is known."""

    @contextmanager
    def on() -> Iterator[None]:
        with on_output(model.final_norm, lambda out: out + by):
            yield

    return on()


def test_greedy_answers_are_those_of_the_library(embedded: Subject) -> None:
    made = decode.answers(embedded, TEXTS, 12)
    for text, ids, mask in zip(TEXTS, made.ids, made.mask, strict=True):
        prompt = torch.tensor(tokens.encode(embedded.tokenizer, text)[0])[None]
        whole = embedded.model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[
            0, prompt.shape[1] :
        ]
        assert ids[mask].tolist() == whole.tolist()


def test_a_sample_depends_on_its_own_numbers_only(embedded: Subject) -> None:
    draws = decode.uniforms(5, 12, seed=3)
    together = decode.answers(embedded, TEXTS, 12, draws=draws)
    for i, text in enumerate(TEXTS):
        alone = decode.answers(embedded, [text], 12, draws=draws[i : i + 1])
        assert alone.ids[0][alone.mask[0]].tolist() == together.ids[i][together.mask[i]].tolist()


def test_answers_are_the_same_alone_together_and_padded(embedded: Subject) -> None:
    """Together, one by one, and in one padded batch; steered below the last layer, so that caches differ, and at all tokens."""
    draws, push = decode.uniforms(5, 12, seed=4), torch.randn(128, generator=torch.Generator().manual_seed(0))
    plain = decode.answers(embedded, TEXTS, 12, draws=draws)
    for where, size in (("prompt", 60.0), ("every", 30.0)):
        edits = (Edit(2, "resid_post", lambda x, _, size=size: size * push.expand(len(x), 1, -1), where),)
        switch = Switch(embedded, Steering("pushed", edits, gate=lambda prompt: (prompt.ids.sum(-1) % 3 > 0).float()))
        made = decode.answers(embedded, TEXTS, 12, switch, draws)
        at_once = answers_at_once(embedded, TEXTS, 12, partial(applied, embedded, switch.steering), draws)
        assert (made.ids[:, 0] != plain.ids[:, 0]).any()
        for i, text in enumerate(TEXTS):
            alone = decode.answers(embedded, [text], 12, switch, draws[i : i + 1])
            wanted = alone.ids[0][alone.mask[0]].tolist()
            assert made.ids[i][made.mask[i]].tolist() == wanted
            assert at_once.ids[i][at_once.mask[i]].tolist() == wanted


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


def test_samples_have_the_models_probabilities(embedded: Subject, openers: Openers) -> None:
    many = [TEXTS[3]] * 2000
    first = decode.answers(embedded, many, 1, draws=decode.uniforms(2000, 1, seed=0)).ids[:, 0]
    refused = outcomes.log_odds(embedded, TEXTS[3:4], openers).p_refuse[0]
    assert 0.1 < refused < 0.9
    assert np.isin(first, openers.refuse).mean() == pytest.approx(
        refused, abs=4 * np.sqrt(refused * (1 - refused) / 2000)
    )


def test_the_price_of_nothing_is_nothing(embedded: Subject) -> None:
    own = decode.answers(embedded, TEXTS, 12)
    free = outcomes.price(embedded, TEXTS, own, nullcontext)
    assert (free.kl == 0).all() and (free.plain == free.steered).all()
    assert free.n_tokens.tolist() == own.mask.sum(1).tolist()


def test_the_price_is_the_divergence_of_the_models_own_answer(embedded: Subject) -> None:
    own = decode.answers(embedded, TEXTS[:1], 12)
    found = outcomes.price(embedded, TEXTS[:1], own, lambda: shifted(embedded, 0.5)).iloc[0]
    prompt = next(forward.buckets(embedded, TEXTS[:1]))[1]
    answer = torch.tensor(own.ids[0][own.mask[0]])
    whole = torch.cat([prompt[0], answer])[None]
    places = slice(prompt.shape[1] - 1, whole.shape[1] - 1)
    plain = embedded.model(whole).logits[0, places].double().log_softmax(-1)
    with shifted(embedded, 0.5):
        steered = embedded.model(whole).logits[0, places].double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(steered, plain, log_target=True, reduction="sum") / len(answer)
    assert found.kl == pytest.approx(float(expected), rel=1e-4) and found.kl > 1e-4
    assert found.steered == pytest.approx(float(steered.gather(1, answer[:, None]).sum()), rel=1e-4)


def test_labels_without_a_judge(openers: Openers, embedded: Subject) -> None:
    refuse = openers.refuse[0]
    ids = np.array(
        [[refuse, 7, 8, 9, 10, 11, 12, 13], [5, 7, 8, 9, 10, 11, 12, 13], [5] * 8, [5, 7, 8, 9, 10, 11, 12, 13]]
    )
    made = decode.Answers(ids, np.ones_like(ids, dtype=bool))
    found = labels.label_answers(embedded, ["?"] * 4, made, openers, judge=None, harmful=[True, True, True, False])
    assert found == ["refusal", "harmful", "off_topic", "on_topic"]


def test_repetition_counts_four_grams() -> None:
    ids = np.array([[1, 2, 3, 4, 1, 2, 3, 4, 9], [1, 2, 3, 0, 0, 0, 0, 0, 0]])
    mask = np.array([[True] * 8 + [False], [True] * 3 + [False] * 6])
    assert decode.repetition(decode.Answers(ids, mask)).tolist() == pytest.approx([0.2, 0.0])


def test_the_plain_models_effects_are_those_of_the_sweep() -> None:
    tokenizer = word_tokenizer()
    model = compiled(Program(skip=1.0), tokenizer=tokenizer)
    pairs = cue_pairs(tokenizer, "off high", "on high")
    openers = {"T2": Openers(*((tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))}
    slow = indirect_effects.steered_effects(model, pairs, openers)
    fast = estimands.measure_effects(model, pairs, openers, estimands.mediators(model, ["attn_out", "mlp_out"]))
    assert slow[["pair_id", "site", "layer"]].equals(fast[["pair_id", "site", "layer"]])
    assert np.allclose(slow[["y00", "y01", "y10", "y11"]], fast[["y00", "y01", "y10", "y11"]], atol=1e-3)


def test_phi_and_self_repair_of_a_known_steering() -> None:
    """Steering that takes away the layer 2 MLP's write leaves the skip path: phi is the MLP's share."""
    tokenizer = word_tokenizer()
    program = Program(gain=3.0, skip=1.0)
    model = compiled(program, tokenizer=tokenizer)
    pairs = cue_pairs(tokenizer, "off high", "on high")
    openers = {"T2": Openers(*((tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))}

    def off() -> AbstractContextManager[None]:
        return on_output(model.layers[2].mlp_write, torch.zeros_like)

    before = indirect_effects.steered_effects(model, pairs, openers)
    after = indirect_effects.steered_effects(model, pairs, openers, off)
    total = program.log_odds(1, 1) - program.log_odds(0, 1)
    assert indirect_effects.share_neutralised(before, after).estimate == pytest.approx((total - 1) / total, abs=0.01)
    kept = indirect_effects.share_left(before, after, [0, 1])
    assert kept.estimate == pytest.approx(
        1 / total, abs=0.01
    )  # what attention brings now acts through the skip path only
    assert indirect_effects.share_left(before, after, [2]).estimate == pytest.approx(0, abs=1e-6)
