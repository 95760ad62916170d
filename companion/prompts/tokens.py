"""From user turns to token ids: chat template, equal lengths, and the answer's first token.

A template's text already holds the special tokens (BOS among them), so the tokenizer is always called with
`add_special_tokens=False`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from companion.base.chat import STAND_IN, render_prompt, system_place
from companion.base.errors import InputError
from companion.prompts.pairs import MIN_PAIRS, Pair, PromptSet


@dataclass(frozen=True)
class Openers:
    """Token ids that may open an answer, in two camps; `notes` names strings that are more than one token.

    With `rest`, `comply` holds all ids of the vocabulary but those of `refuse`.
    """

    comply: tuple[int, ...]
    refuse: tuple[int, ...]
    notes: tuple[str, ...] = ()
    rest: bool = False


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids (equal length) with the character offsets of each token of the rendered prompt."""

    pair: Pair
    control: Int[np.ndarray, "pos"]
    treated: Int[np.ndarray, "pos"]
    control_offsets: Int[np.ndarray, "pos 2"]
    treated_offsets: Int[np.ndarray, "pos 2"]
    control_start: int
    treated_start: int


def encode_behind(tokenizer: PreTrainedTokenizerBase, sentence: str, text: str) -> Int[np.ndarray, "pos"]:
    """Token ids of a user turn behind a sentence, which stands where `system_place` says; `InputError` if nowhere."""
    place = system_place(tokenizer, sentence)
    if place == "not possible":
        raise InputError(
            "the model's chat template shows a sentence before the request neither as a system turn nor at the head of the "
            "user turn: mend its chat_template.jinja"
        )
    if place == "head of the user turn":
        return encode(tokenizer, f"{sentence} {text}")[0]
    return np.array(tokenizer(render_prompt(tokenizer, text, sentence), add_special_tokens=False)["input_ids"])


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Token ids [pos], character offsets [pos, 2] in the rendered prompt, and where the user turn starts in it."""
    if not tokenizer.is_fast:
        raise InputError("the tokenizer gives no character offsets: put its tokenizer.json into the model's folder")
    rendered = render_prompt(tokenizer, text)
    start = user_turn_start(tokenizer, str(tokenizer.chat_template))
    is_whole, is_stripped = (rendered.startswith(part, start) for part in (text.rstrip(), text.strip()))
    if start < 0 or not (is_whole or is_stripped):
        raise InputError("the chat template changes the user turn's text, so its tokens cannot be located")
    start -= 0 if is_whole else len(text) - len(text.lstrip())
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    return np.array(encoded["input_ids"]), np.array(encoded["offset_mapping"]), start


@lru_cache(maxsize=8)  # a template has one; it would be rendered again for every prompt
def user_turn_start(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """Where the user turn starts, found by a stand-in: the text itself may also occur in the template ("user")."""
    return render_prompt(tokenizer, STAND_IN).find(STAND_IN)


def token_pair(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenPair | None, str]:
    """The pair in tokens, or None and the reason why it cannot be used."""
    control, control_offsets, control_start = encode(tokenizer, pair.control)
    treated, treated_offsets, treated_start = encode(tokenizer, pair.treated)
    if len(control) != len(treated):
        return None, "unequal token length"
    if (control == treated).all():
        return None, "same tokens on both sides"
    return TokenPair(pair, control, treated, control_offsets, treated_offsets, control_start, treated_start), ""


def tokenize(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenPair], dict[str, int]]:
    """Pairs of equal token length, and a count of those dropped by reason; nothing is truncated or padded into shape."""
    made = [token_pair(pair, tokenizer) for pair in pairs]
    kept = [pair for pair, _ in made if pair is not None]
    dropped = Counter(reason for _, reason in made if reason)
    if len(kept) < MIN_PAIRS:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in sorted(dropped.items())) or "none dropped"
        raise InputError(f"{len(kept)} usable pairs of {len(pairs)} ({reasons}); at least {MIN_PAIRS} are needed")
    return kept, dict(dropped)


def openers(prompt_set: PromptSet, tokenizer: PreTrainedTokenizerBase, n_rows: int) -> dict[str, Openers]:
    """For each treatment the first answer tokens of its outcome strings, read behind a rendered prompt.

    `n_rows` is how many tokens the model can say: the rows of its unembedding, which may be more than the tokenizer knows.
    """
    context = render_prompt(tokenizer, prompt_set.pairs[0].control)
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    ids: dict[str, list[int]] = {}
    for string in sorted({s for sides in prompt_set.outcomes.values() for side in sides for s in side or ()}):
        whole = tokenizer(context + string, add_special_tokens=False)["input_ids"]
        ids[string] = whole[len(before) :]
        if not ids[string] or whole[: len(before)] != before:
            why = "is a leading space missing or too many?"
            raise InputError(f"outcome string {string!r} starts no token of its own behind the prompt: {why}")
        if ids[string][0] == tokenizer.unk_token_id:
            raise InputError(f"outcome string {string!r} starts with a word that the tokenizer does not know")
    found: dict[str, Openers] = {}
    for treatment, sides in prompt_set.outcomes.items():
        named, refuse = (tuple(sorted({ids[string][0] for string in side or ()})) for side in sides)
        rest = sides[0] is None
        comply = tuple(i for i in range(n_rows) if i not in refuse) if rest else named
        if both := set(comply) & set(refuse):
            shared = f"comply and refuse share the first token {both.pop()}"
            raise InputError(f"outcome of {treatment}: {shared}; it decides nothing")
        long = [string for side in sides for string in side or () if len(ids[string]) > 1]
        notes = tuple(f"outcome string {string!r} is {len(ids[string])} tokens; its first decides" for string in long)
        found[treatment] = Openers(comply, refuse, notes, rest)
    return found
