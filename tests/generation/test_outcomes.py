"""What steering does to the first token and what it costs; outcome tokens found from the model itself."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import models
import pandas as pd
import pytest
import torch
from models import VOCAB, tiny_model, tiny_subject
from steering_lab import fitted, prompts, towards_no

from companion.base import chat
from companion.base.errors import InputError
from companion.generation import decode, forward, openers, outcomes
from companion.generation.hooks import PLAIN, Edit, Steering
from companion.model.activations import on_output
from companion.model.architecture import Subject, find_parts
from companion.prompts import invented, tokens
from companion.prompts.pairs import load_set

# ---- outcomes ----


def test_the_price_is_the_divergence_of_the_models_own_answer(embedded: Subject, texts: list[str]) -> None:
    """Held against one pass over prompt and answer, with the same constant added to the prompt's tokens by hand."""
    own, layer = decode.answers(embedded, texts, 12), 2
    push = 60 * torch.randn(128, generator=torch.Generator().manual_seed(0))
    pushed = Steering("pushed", (Edit(layer, "resid_post", lambda x, _: push.expand(len(x), 1, -1)),))
    free, found = (outcomes.price_each(embedded, texts, own, [one])[0] for one in (PLAIN, pushed))
    assert (free.kl == 0).all() and (free.plain == free.steered).all()
    assert free.n_tokens.tolist() == own.mask.sum(1).tolist()
    prompt = next(forward.buckets(embedded, texts[:1]))[1]
    answer = torch.tensor(own.ids[0][own.mask[0]])
    whole = torch.cat([prompt[0], answer])[None]
    is_prompt = torch.arange(whole.shape[1])[:, None] < prompt.shape[1]
    with torch.no_grad():
        logits = [embedded.model(whole).logits]
        with on_output(embedded.layers[layer].block, lambda x: x + is_prompt * push):
            logits.append(embedded.model(whole).logits)
    plain, steered = (some[0, prompt.shape[1] - 1 : -1].double().log_softmax(-1) for some in logits)
    expected = torch.nn.functional.kl_div(steered, plain, log_target=True, reduction="sum") / len(answer)
    assert found.kl[0] == pytest.approx(float(expected), rel=1e-4) and found.kl[0] > 1e-4
    assert found.steered[0] == pytest.approx(float(steered.gather(1, answer[:, None]).sum()), rel=1e-4)


def test_tables_of_several_steerings_are_those_of_each() -> None:
    fit, texts = fitted(), prompts().text
    many = [towards_no("weak", 0.5), towards_no("strong", 1.5)]
    own = decode.answers(fit.subject, list(texts), 3)
    odds = outcomes.log_odds_each(fit.subject, texts, fit.openers, many)
    prices = outcomes.price_each(fit.subject, list(texts), own, many)
    for i, one in enumerate(many):
        (alone,) = outcomes.log_odds_each(fit.subject, texts, fit.openers, [one])
        pd.testing.assert_frame_equal(odds[i], alone, rtol=1e-5)
        (alone,) = outcomes.price_each(fit.subject, list(texts), own, [one])
        pd.testing.assert_frame_equal(prices[i], alone, rtol=1e-4, atol=1e-6)
    assert (prices[1].kl > prices[0].kl).all() and (odds[1].p_refuse > odds[0].p_refuse).all()


@pytest.mark.parametrize(
    "template", [models.NO_SYSTEM.replace("> ", ">"), "{% for m in messages %}{{ m.content }} {% endfor %}"]
)
def test_prompts_of_one_length_may_differ_behind_a_sentence(template: str) -> None:
    """The space behind the sentence melts into a "d", in a user turn and between two turns."""
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=256)
    subject = find_parts(model, models.byte_tokenizer(template, (("Ġ", "d"),)), "tiny")
    texts = ["do off", "be off", "do not", "on"]
    assert len({len(forward.encode(subject, text, "be kind")) for text in texts[:2]}) == 2
    own = decode.answers(subject, texts, 4)
    said = [Steering("said", system="be kind")]
    (found,) = outcomes.price_each(subject, texts, own, said)
    for i, text in enumerate(texts):
        single = decode.Answers(own.ids[i : i + 1], own.mask[i : i + 1])
        (alone,) = outcomes.price_each(subject, [text], single, said)
        pd.testing.assert_frame_equal(found.iloc[[i]].reset_index(drop=True), alone, rtol=1e-4, atol=1e-6)
    assert (found.kl > 1e-3).all()


# ---- openers ----


def test_the_shipped_models_own_openers_are_found(embedded: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openers, "is_refusal", lambda text: text.strip().startswith(invented.REFUSAL_OPENER))
    content = load_set("embedded")
    pairs = [pair for pair in content.pairs if pair.treatment == "T1"][:20]
    found = openers.find_openers(embedded, [text for p in pairs for text in (p.control, p.treated)], Path("own"))
    known = tokens.openers(content, embedded.tokenizer, len(embedded.unembedding[0]))["T1"]
    context, ids = chat.render_prompt(embedded.tokenizer, "x"), partial(embedded.tokenizer, add_special_tokens=False)
    n = len(ids(context)["input_ids"])
    comply, refuse = ({ids(context + text)["input_ids"][n] for text in side} for side in (found.comply, found.refuse))
    assert refuse == set(known.refuse) and comply <= set(known.comply)
    assert found.joint > 0.8 and 5 <= found.n_refused <= 35
    assert "edit outcome.json" not in found.note


def test_a_model_that_refuses_nothing_is_not_guessed_at(embedded: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [pair.control for pair in load_set("embedded").pairs[:12]]
    for answer, what in ((False, "refused 0 of 12"), (True, "answered 0 of 12")):
        monkeypatch.setattr(openers, "is_refusal", lambda text, answer=answer: answer)
        with pytest.raises(InputError, match=f"{what} prompts.*of your own into here/outcome.json, then the same"):
            openers.find_openers(embedded, texts, Path("here/outcome.json"))


def test_openers_keep_their_blank_and_a_model_that_opens_alike_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a SentencePiece tokenizer that refuses every second prompt, with "no" or with "yes" as well."""
    tokenizer = models.sentencepiece(("▁yes", "▁no"), "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    subject = replace(tiny_subject("llama"), tokenizer=tokenizer)
    monkeypatch.setattr(decode, "answers", lambda subject, texts, steps: texts)
    monkeypatch.setattr(decode, "answer_texts", lambda subject, made: ["I am sorry", "fine"] * 6)
    yes, no = (tokenizer(f"x {word}")["input_ids"][-1] for word in ("yes", "no"))
    monkeypatch.setattr(openers, "first_token_probabilities", lambda subject, texts: torch.eye(VOCAB)[[no, yes] * 6])
    found = openers.find_openers(subject, ["x"] * 12, Path("own"))
    assert (found.comply, found.refuse) == ((" yes",), (" no",))
    monkeypatch.setattr(openers, "first_token_probabilities", lambda subject, texts: torch.eye(VOCAB)[[yes, yes] * 6])
    with pytest.raises(InputError, match=r"refuses and answers, but it opens every answer with ' yes' .*thinks"):
        openers.find_openers(subject, ["x"] * 12, Path("own"))


def test_a_token_belongs_to_the_side_on_which_it_is_likelier_and_a_low_joint_probability_is_said() -> None:
    answered = torch.tensor([0.60, 0.30, 0.07, 0.004, 0.026]).repeat(4, 1)
    refused = torch.tensor([0.05, 0.05, 0.80, 0.05, 0.05]).repeat(3, 1)
    both = torch.cat([answered, refused])
    assert openers.sort_openers(both, torch.arange(7) >= 4) == ([0, 1], [2, 3, 4])
    assert "below 0.8: edit outcome.json" in openers.FoundOpeners(("a",), ("b",), 0.79, 5, 10).note
    assert "below" not in openers.FoundOpeners(("a",), ("b",), 0.8, 5, 10).note


def test_first_tokens_of_one_prompt_do_not_depend_on_its_batch(embedded: Subject, texts: list[str]) -> None:
    together = openers.first_token_probabilities(embedded, texts)
    alone = torch.cat([openers.first_token_probabilities(embedded, [text]) for text in texts])
    torch.testing.assert_close(together, alone)
