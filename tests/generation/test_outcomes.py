"""What steering does to the first token, and what it costs: known by hand, and the same alone and together."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import handmade
import pandas as pd
import pytest
import torch
from families import tiny_model
from steering_lab import fitted, prompts, towards_no

from companion.generation import decode, forward, outcomes
from companion.model.activations import on_output
from companion.model.architecture import Subject, find_parts


@contextmanager
def shifted(model: Subject) -> Iterator[None]:
    """A constant added to the final norm's output: a steering whose every consequence is known."""
    with on_output(model.final_norm, lambda out: out + 0.5):
        yield


def test_the_price_is_the_divergence_of_the_models_own_answer(embedded: Subject, texts: list[str]) -> None:
    own = decode.answers(embedded, texts, 12)
    free = outcomes.price(embedded, texts, own, nullcontext)
    assert (free.kl == 0).all() and (free.plain == free.steered).all()
    assert free.n_tokens.tolist() == own.mask.sum(1).tolist()
    found = outcomes.price(embedded, texts, own, lambda: shifted(embedded)).iloc[0]
    prompt = next(forward.buckets(embedded, texts[:1]))[1]
    answer = torch.tensor(own.ids[0][own.mask[0]])
    whole = torch.cat([prompt[0], answer])[None]
    logits = [embedded.model(whole).logits]
    with shifted(embedded):
        logits.append(embedded.model(whole).logits)
    plain, steered = (some[0, prompt.shape[1] - 1 : -1].double().log_softmax(-1) for some in logits)
    expected = torch.nn.functional.kl_div(steered, plain, log_target=True, reduction="sum") / len(answer)
    assert found.kl == pytest.approx(float(expected), rel=1e-4) and found.kl > 1e-4
    assert found.steered == pytest.approx(float(steered.gather(1, answer[:, None]).sum()), rel=1e-4)


def test_tables_of_several_steerings_are_those_of_each() -> None:
    fit, texts = fitted(), prompts().text
    many = [towards_no("weak", 0.5), towards_no("strong", 1.5)]
    own = decode.answers(fit.subject, list(texts), 3)
    odds = outcomes.log_odds_each(fit.subject, texts, fit.openers, many)
    prices = outcomes.price_each(fit.subject, list(texts), own, many)
    for i, one in enumerate(many):
        switch = forward.Switch(fit.subject, one)
        pd.testing.assert_frame_equal(odds[i], outcomes.log_odds(fit.subject, texts, fit.openers, switch), rtol=1e-5)
        alone = outcomes.price(fit.subject, list(texts), own, switch)
        pd.testing.assert_frame_equal(prices[i], alone, rtol=1e-4, atol=1e-6)
    again = outcomes.price_each(fit.subject, list(texts), own, many)  # the plain model's part comes from memory
    assert all(one.equals(two) for one, two in zip(prices, again, strict=True))
    assert (prices[1].kl > prices[0].kl).all() and (odds[1].p_refuse > odds[0].p_refuse).all()


@pytest.mark.parametrize(
    "template", [handmade.NO_SYSTEM.replace("> ", ">"), "{% for m in messages %}{{ m.content }} {% endfor %}"]
)
def test_prompts_of_one_length_may_differ_behind_a_sentence(template: str) -> None:
    """The space behind the sentence melts into a "d", in a user turn and between two turns."""
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=256)
    subject = find_parts(model, handmade.byte_tokenizer(template, (("Ġ", "d"),)), "tiny")
    texts = ["do off", "be off", "do not", "on"]
    assert len({len(forward.encode(subject, text, "be kind")) for text in texts[:2]}) == 2
    own = decode.answers(subject, texts, 4)
    found = outcomes.price(subject, texts, own, nullcontext, system="be kind")
    for i, text in enumerate(texts):
        single = decode.Answers(own.ids[i : i + 1], own.mask[i : i + 1])
        alone = outcomes.price(subject, [text], single, nullcontext, system="be kind")
        pd.testing.assert_frame_equal(found.iloc[[i]].reset_index(drop=True), alone, rtol=1e-4, atol=1e-6)
    assert (found.kl > 1e-3).all()
