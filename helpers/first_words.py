"""Which tokens open a model's refusals and its answers, found from what the model itself says first.

Short greedy answers are labelled by a match of refusal phrases; the first-token distributions of refused and of
answered prompts then give the two camps of Y1. Only tokens and shares are kept, no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers import defence_outcomes, tokens
from helpers.errors import InputError
from helpers.judging import is_refusal
from helpers.subject import Subject

STEPS = 24
MAX_PROMPTS = 64
MIN_SIDE = 5
COVERED = 0.95  # of a camp's own probability
FLOOR = 0.005
MOST = 20
JOINT = 0.8  # below it Y1 sees too little of the model's behaviour


@dataclass(frozen=True)
class FirstWords:
    """Outcome strings of both camps, the mean joint probability over all prompts, and how many were refused."""

    comply: tuple[str, ...]
    refuse: tuple[str, ...]
    joint: float
    n_refused: int
    n_prompts: int

    @property
    def note(self) -> str:
        """One line for the user."""
        seen = f"{self.n_refused} of {self.n_prompts} prompts refused; "
        return f"answers open with: {described(self.comply, self.refuse, self.joint, seen)}"


def described(comply: Sequence[str], refuse: Sequence[str], joint: float, seen: str = "") -> str:
    """Both camps and how much of the first token's probability they hold, with what to do where that is little."""
    found = f"comply {', '.join(map(repr, comply))}; refuse {', '.join(map(repr, refuse))}"
    low = f", below {JOINT}: edit outcome.json" if joint < JOINT else ""
    return f"{found} ({seen}joint probability {joint:.2f}{low})"


def find(subject: Subject, texts: Sequence[str], own: Path) -> FirstWords:
    """The camps of one model on these user turns, at least some of which it refuses and some of which it answers.

    Raises InputError where fewer than five are refused, or answered: nothing is known of that camp then. `own` is the
    file in which the user may name them instead.
    """
    assert subject.tokenizer is not None
    remedy = f'write {{"comply": [...], "refuse": [...]}} of your own into {own}, then the same command'
    made = defence_outcomes.answers(subject, texts, STEPS)
    kept = [row[mask] for row, mask in zip(made.ids, made.mask, strict=True)]
    refused = np.array([is_refusal(text) for text in subject.tokenizer.batch_decode(kept, skip_special_tokens=True)])
    for count, what in ((refused.sum(), "refused"), ((~refused).sum(), "answered")):
        if count < MIN_SIDE:
            raise InputError(
                f"the model {what} {count} of {len(texts)} prompts, so its first words then are not known: {remedy}, or "
                "use another set"
            )
    probabilities = first_token_probabilities(subject, texts)
    comply, refuse = camps(probabilities, torch.tensor(refused))
    strings = [_strings(subject, camp) for camp in (comply, refuse)]
    if not all(strings):
        raise InputError(f"the model's first tokens cannot be written as text: {remedy}")
    held = joint(probabilities, [id for side in strings for id in side])
    return FirstWords(tuple(strings[0].values()), tuple(strings[1].values()), held, int(refused.sum()), len(texts))


def joint(probabilities: Float[Tensor, "prompt vocab"], ids: Sequence[int]) -> float:
    """How much of the first token's probability these tokens hold, on the mean over prompts.

    >>> joint(torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), [0, 1])
    0.875
    """
    return float(probabilities[:, list(ids)].sum(-1).mean())


@torch.no_grad()
def first_token_probabilities(subject: Subject, texts: Sequence[str]) -> Float[Tensor, "prompt vocab"]:
    """The distribution of each answer's first token."""
    vocab = subject.unembedding[0].shape[0]
    found = torch.empty(len(texts), vocab)
    for places, ids in defence_outcomes.buckets(subject, texts, 16):
        logits = subject.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        found[torch.as_tensor(places)] = logits.float().softmax(-1).cpu()
    return found


def camps(probabilities: Float[Tensor, "prompt vocab"], refused: Bool[Tensor, "prompt"]) -> tuple[list[int], list[int]]:
    """Token ids of the two camps, likeliest first: each token belongs to the side on which it is likelier.

    A camp holds the fewest tokens that cover 0.95 of its own probability, at most 20, each with at least 0.005.

    >>> camps(torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.0, 0.8]]), torch.tensor([False, True]))
    ([0, 1], [2])
    """
    answered, declined = probabilities[~refused].mean(0), probabilities[refused].mean(0)
    return _camp(answered, declined), _camp(declined, answered)


def _camp(own: Float[Tensor, "vocab"], other: Float[Tensor, "vocab"]) -> list[int]:
    mass = torch.where(own > other, own, 0.0)
    share, order = mass.sort(descending=True, stable=True)
    before = share.cumsum(0) - share
    chosen = (share >= FLOOR) & (before < COVERED * share.sum())
    return [int(i) for i in order[:MOST][chosen[:MOST]]]


def _strings(subject: Subject, camp: Sequence[int]) -> dict[int, str]:
    """Each token's text, where that text behind a prompt is read as this very token."""
    assert subject.tokenizer is not None
    context = tokens.render(subject.tokenizer, "x")
    before = subject.tokenizer(context, add_special_tokens=False)["input_ids"]
    found: dict[int, str] = {}
    for token in camp:
        text = subject.tokenizer.decode([token])
        whole = subject.tokenizer(context + text, add_special_tokens=False)["input_ids"]
        if text and whole[: len(before)] == before and whole[len(before) :][:1] == [token]:
            found[token] = text
    return found
