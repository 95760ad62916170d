"""Outcome tokens found from the model itself: on a shipped model they are those that its prompt set names."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import handmade
import pytest
import torch
from families import VOCAB, tiny_subject

from companion.base import chat
from companion.base.errors import InputError
from companion.generation import decode, openers
from companion.model.architecture import Subject
from companion.prompts import invented, tokens
from companion.prompts.pairs import load_set


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
    tokenizer = handmade.sentencepiece(("▁yes", "▁no"), "{% for m in messages %}[{{ m.content }}]{% endfor %}")
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
    assert openers.describe_openers(None, ("b",), 1.0) == "comply everything else; refuse 'b' (joint probability 1.00)"


def test_first_tokens_of_one_prompt_do_not_depend_on_its_batch(embedded: Subject, texts: list[str]) -> None:
    together = openers.first_token_probabilities(embedded, texts)
    alone = torch.cat([openers.first_token_probabilities(embedded, [text]) for text in texts])
    torch.testing.assert_close(together, alone)
