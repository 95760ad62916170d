"""A chat template: how a prompt is rendered, and what the template does that a measurement must know of.

Rendered text holds the special tokens (BOS among them), so tokenizers are called with `add_special_tokens=False`. Every prompt
is rendered as on one fixed day, without thinking: a template that prints the date would give other effects tomorrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Literal, Self, TypeAlias
from unittest.mock import patch

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from companion.base.errors import InputError

DAY = datetime(2026, 1, 1)  # on which every prompt is rendered
STAND_IN = "@turn@"
Turns = Sequence[tuple[str, str]]  # role and text
SystemPlace: TypeAlias = Literal["system turn", "head of the user turn", "not possible"]


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template does: with a system turn, with the date, with thinking, and behind an answer."""

    system: SystemPlace
    date: str  # that its prompts name, "" where they name none
    thinking_off: bool
    ends: tuple[int, ...]  # the special token right behind an assistant's turn, if there is one


def render(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, *, generation_prompt: bool = True, day: datetime = DAY,
    thinking: bool = False,
) -> str:  # fmt: skip
    """Turns in the chat template, as the model reads them; whatever the template raises reaches the caller."""
    messages = [{"role": role, "content": text} for role, text in turns]
    options = {"tokenize": False, "add_generation_prompt": generation_prompt}
    options |= {} if thinking else {"enable_thinking": False}

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls(day.year, day.month, day.day)

    with patch.object(chat_template_utils, "datetime", Fixed):  # the library takes no other clock from its caller
        return str(tokenizer.apply_chat_template(messages, **options))


def render_prompt(tokenizer: PreTrainedTokenizerBase, text: str, system: str = "") -> str:
    """The prompt as the model reads it: the user turn in the chat template, with the generation prompt.

    `system` is a system turn before it, which many templates refuse and some leave out without a word (`system_place`).
    Raises InputError for no template, and for one that cannot render these turns.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the model's tokenizer has no chat template: the method compares chat prompts; use an instruction-tuned "
            "model, or put a chat_template.jinja into its folder"
        )
    try:
        return render(tokenizer, [*([("system", system)] if system else []), ("user", text)])
    except Exception as error:  # a template may refuse a turn, or be broken in any way; its words quote no prompt
        turns = "a system and a user turn" if system else "one user turn"
        raise InputError(
            f"the model's chat template cannot render {turns} ({type(error).__name__}: {error}): mend its "
            "chat_template.jinja, or take the one of the model that it was made from"
        ) from None


def system_place(tokenizer: PreTrainedTokenizerBase, sentence: str = "@sentence@") -> SystemPlace:
    """Where a sentence of one's own can be given to the model: as a system turn if the template shows it, else at the head
    of the user turn. What counts is the rendered prompt: a template may refuse a system turn, or drop it without a word.
    """
    tries: tuple[tuple[SystemPlace, str, str], ...] = (
        ("system turn", STAND_IN, sentence),
        ("head of the user turn", f"{sentence} {STAND_IN}", ""),
    )
    for place, text, system in tries:
        with suppress(InputError):
            rendered = render_prompt(tokenizer, text, system)
            if sentence in rendered and STAND_IN in rendered:
                return place
    return "not possible"


def template_facts(tokenizer: PreTrainedTokenizerBase) -> TemplateFacts | None:
    """What the tokenizer's chat template does, None where it has none; InputError if it cannot render a user turn."""
    if not tokenizer.chat_template:
        return None
    turn, plain = [("user", STAND_IN)], render_prompt(tokenizer, STAND_IN)
    return TemplateFacts(
        system=system_place(tokenizer),
        date="" if render(tokenizer, turn, day=DAY + timedelta(days=400)) == plain else f"{DAY:%Y-%m-%d}",
        thinking_off=render(tokenizer, turn, thinking=True) != plain,
        ends=end_of_turn(tokenizer, str(tokenizer.chat_template)),
    )


@lru_cache(maxsize=8)
def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[int, ...]:
    """The special token that the template writes behind an assistant's turn, if that is the first thing it writes."""
    if not template:
        return ()
    try:
        text = render(tokenizer, [("user", "@first@"), ("assistant", STAND_IN)], generation_prompt=False)
    except Exception:  # some templates render prompts only
        return ()
    behind = text.partition(STAND_IN)[2].lstrip()
    special = {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)}
    found = [token for token in special if token and behind.startswith(token)]
    return (int(tokenizer.convert_tokens_to_ids(max(found, key=len))),) if found else ()


def token_text(tokenizer: PreTrainedTokenizerBase, before: Int[np.ndarray, "pos"] | Sequence[int], token: int) -> str:
    """The text that a token adds behind others, its blank included, which SentencePiece drops from a token on its own."""
    ids = [int(i) for i in before]
    return str(tokenizer.decode([*ids, token]))[len(str(tokenizer.decode(ids))) :]
