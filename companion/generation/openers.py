"""Which tokens open a model's refusals and its answers: those that the model itself says first.

Short greedy answers are labelled by a match of refusal phrases; the first-token distributions of refused and of answered prompts
then give the openers of either kind, and their joint probability says how much of the model's behaviour Y1 sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from companion.base import chat
from companion.base.errors import InputError
from companion.base.files import write_json
from companion.generation import decode, forward
from companion.generation.labels import is_refusal
from companion.model.architecture import Subject
from companion.model.load import load
from companion.prompts import public, tokens
from companion.prompts.pairs import REST, Pair

STEPS = 24
MAX_PAIRS = 64  # of a treatment
MIN_SIDE = 5
COVERED = 0.95  # of the probability of the openers of one kind
FLOOR = 0.005
MOST = 20
ALWAYS = 0.95  # the mean share of one first token, from which it opens answers and refusals alike
JOINT = 0.8  # below it Y1 sees too little of the model's behaviour


@dataclass(frozen=True)
class FoundOpeners:
    """Strings that open answers and refusals, the mean joint probability over all prompts, and how many were refused."""

    comply: tuple[str, ...]
    refuse: tuple[str, ...]
    joint: float
    n_refused: int
    n_prompts: int

    @property
    def note(self) -> str:
        """One line for the user, with what to do where the openers hold little of the first token's probability."""
        comply, refuse = (", ".join(map(repr, side)) for side in (self.comply, self.refuse))
        rest = f'edit outcome.json, where "comply": "{REST}" stands for everything else'
        low = f", below {JOINT}: {rest}" if self.joint < JOINT else ""
        seen = f"{self.n_refused} of {self.n_prompts} prompts refused; joint probability {self.joint:.2f}{low}"
        return f"answers open with: comply {comply}; refuse {refuse} ({seen})"


def find_openers(subject: Subject, texts: Sequence[str], own: Path) -> FoundOpeners:
    """The openers of one model on these user turns, at least some of which it refuses and some of which it answers.

    Raises InputError where fewer than five are refused, or answered; `own` is the file in which the user may name them instead.
    """
    remedy = f'write {{"comply": [...], "refuse": [...]}} of your own into {own}, then the same command'
    probabilities = first_token_probabilities(subject, texts)
    share, token = probabilities.mean(0).max(0)
    alike = (
        f"it opens every answer with {_text_behind_a_prompt(subject, int(token))!r} (share {float(share):.2f}), so its first "
        "token decides nothing. If it thinks before it answers, take its version without thinking, or change "
        "chat_template.jinja so that the prompt ends behind the thought (<think></think>)"
    )
    made = decode.answers(subject, texts, STEPS)
    refused = np.array([is_refusal(text) for text in decode.answer_texts(subject, made)])
    for count, what in ((refused.sum(), "refused"), ((~refused).sum(), "answered")):
        if count < MIN_SIDE:
            raise InputError(
                f"the model {what} {count} of {len(texts)} prompts, so its first words then are not known: {remedy}, or "
                f"use another set{'; ' + alike if share > ALWAYS else ''}"
            )
    if share > ALWAYS:
        raise InputError(f"the model refuses and answers, but {alike}")
    strings = [_strings(subject, ids) for ids in sort_openers(probabilities, torch.tensor(refused))]
    if not all(strings):
        raise InputError(
            "no text behind the prompt is read as one of the first tokens of its answers, since the tokenizer joins them with "
            f"what stands before: {remedy}"
        )
    ids = [token for side in strings for token in side]
    held = float(probabilities[:, ids].sum(-1).mean())
    return FoundOpeners(tuple(strings[0].values()), tuple(strings[1].values()), held, int(refused.sum()), len(texts))


@torch.no_grad()
def first_token_probabilities(subject: Subject, texts: Sequence[str]) -> Float[Tensor, "prompt vocab"]:
    """The distribution of each answer's first token."""
    found = torch.empty(len(texts), subject.unembedding[0].shape[0])
    for places, ids in forward.buckets(subject, texts, 16):
        found[torch.as_tensor(places)] = forward.first_logits(subject, ids).float().softmax(-1).cpu()
    return found


def sort_openers(
    probabilities: Float[Tensor, "prompt vocab"], refused: Bool[Tensor, "prompt"]
) -> tuple[list[int], list[int]]:
    """Token ids that open answers and refusals, likeliest first: a token belongs to the side on which it is likelier.

    Each side has the fewest tokens that cover 0.95 of its own probability, at most 20, each with at least 0.005.

    >>> sort_openers(torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.0, 0.8]]), torch.tensor([False, True]))
    ([0, 1], [2])
    """
    answered, declined = probabilities[~refused].mean(0), probabilities[refused].mean(0)
    return _likely_openers(answered, declined), _likely_openers(declined, answered)


def _likely_openers(own: Float[Tensor, "vocab"], other: Float[Tensor, "vocab"]) -> list[int]:
    mass = torch.where(own > other, own, 0.0)
    share, order = mass.sort(descending=True, stable=True)
    before = share.cumsum(0) - share
    chosen = (share >= FLOOR) & (before < COVERED * share.sum())
    return [int(i) for i in order[:MOST][chosen[:MOST]]]


def _strings(subject: Subject, ids: Sequence[int]) -> dict[int, str]:
    """Each token's text, where that text behind a prompt is read as this very token."""
    assert subject.tokenizer is not None
    context = chat.render_prompt(subject.tokenizer, "x")
    before = subject.tokenizer(context, add_special_tokens=False)["input_ids"]
    found: dict[int, str] = {}
    for token in ids:
        text = _text_behind_a_prompt(subject, token)
        whole = subject.tokenizer(context + text, add_special_tokens=False)["input_ids"]
        if text and whole[: len(before)] == before and whole[len(before) :][:1] == [token]:
            found[token] = text
    return found


def _text_behind_a_prompt(subject: Subject, token: int) -> str:
    """What the token adds to a prompt; on its own, SentencePiece would drop its blank."""
    assert subject.tokenizer is not None
    return chat.token_text(subject.tokenizer, tokens.encode(subject.tokenizer, "x")[0], token)


def ensure_openers(folder: Path, pairs: Sequence[Pair], *, model: str, device: str, dtype: str) -> None:
    """Put outcome.json into the folder unless one is there; `InputError` where nothing is found from the model."""
    file = folder / public.OUTCOME
    if file.is_file():
        return
    texts: list[str] = []
    for treatment in ("T1", "T2"):  # of T1 both sides
        chosen = [pair for pair in pairs if pair.treatment == treatment][:MAX_PAIRS]
        texts += [text for one in chosen for text in ([one.control] * (treatment == "T1") + [one.treated])]
    found = find_openers(load(model, device=device, dtype=dtype), texts, file)
    print(found.note)
    write_json({"comply": list(found.comply), "refuse": list(found.refuse)}, file)
