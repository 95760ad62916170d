"""From user turns to token ids: chat template, equal lengths, and the answer's first token.

The template is applied here and nowhere else. Its text already holds the special tokens (BOS among them), so the
tokenizer is always called with `add_special_tokens=False`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from helpers.errors import InputError
from helpers.prompts import MIN_PAIRS, Pair, PromptSet


@dataclass(frozen=True)
class Openers:
    """Token ids that may open an answer, in two camps; `notes` names strings that are more than one token."""

    comply: tuple[int, ...]
    refuse: tuple[int, ...]
    notes: tuple[str, ...] = ()


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


def render(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The prompt as the model reads it: the user turn in the chat template, with the generation prompt."""
    if not tokenizer.chat_template:
        raise InputError(
            "the model's tokenizer has no chat template: the method compares chat prompts; use an instruction-tuned "
            "model, or put a chat_template.jinja into its folder"
        )
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Token ids [pos], character offsets [pos, 2] in the rendered prompt, and where the user turn starts in it."""
    rendered = render(tokenizer, text)
    start = rendered.rfind(text.strip())
    if start < 0:
        raise InputError("the chat template changes the user turn's text, so its tokens cannot be located")
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    leading = len(text) - len(text.lstrip())
    return np.array(encoded["input_ids"]), np.array(encoded["offset_mapping"]), start - leading


def tokenize(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> tuple[list[TokenPair], dict[str, int]]:
    """Pairs of equal token length, and a count of those dropped by reason.

    An interchange needs one position of the control for each of the treated prompt, so pairs of unequal length are
    dropped, never truncated or padded into shape.
    """
    kept: list[TokenPair] = []
    dropped: Counter[str] = Counter()
    for pair in pairs:
        control, control_offsets, control_start = encode(tokenizer, pair.control)
        treated, treated_offsets, treated_start = encode(tokenizer, pair.treated)
        if len(control) != len(treated):
            dropped["unequal token length"] += 1
        elif (control == treated).all():
            dropped["same tokens on both sides"] += 1
        else:
            kept.append(
                TokenPair(pair, control, treated, control_offsets, treated_offsets, control_start, treated_start)
            )
    if len(kept) < MIN_PAIRS:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in sorted(dropped.items())) or "none dropped"
        raise InputError(f"{len(kept)} usable pairs of {len(pairs)} ({reasons}); at least {MIN_PAIRS} are needed")
    return kept, dict(dropped)


def openers(prompt_set: PromptSet, tokenizer: PreTrainedTokenizerBase) -> dict[str, Openers]:
    """For each treatment the first answer tokens of its outcome strings, read behind a rendered prompt."""
    context = render(tokenizer, prompt_set.pairs[0].control)
    n_context = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    first: dict[str, int] = {}
    notes: dict[str, str] = {}
    for string in sorted({s for sides in prompt_set.outcomes.values() for side in sides for s in side}):
        ids = tokenizer(context + string, add_special_tokens=False)["input_ids"][n_context:]
        if not ids:
            raise InputError(f"outcome string {string!r} gives no token of its own behind the prompt")
        first[string] = ids[0]
        if len(ids) > 1:
            notes[string] = f"outcome string {string!r} is {len(ids)} tokens; its first decides"
    return {name: _openers(name, sides, first, notes) for name, sides in prompt_set.outcomes.items()}


def _openers(
    treatment: str,
    sides: tuple[tuple[str, ...], tuple[str, ...]],
    first: Mapping[str, int],
    notes: Mapping[str, str],
) -> Openers:
    comply, refuse = (tuple(sorted({first[string] for string in side})) for side in sides)
    both = set(comply) & set(refuse)
    if both:
        raise InputError(
            f"outcome of {treatment}: comply and refuse share the first token {both.pop()}; it decides nothing"
        )
    used = tuple(notes[string] for side in sides for string in side if string in notes)
    return Openers(comply, refuse, used)
