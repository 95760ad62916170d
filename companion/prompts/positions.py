"""Position groups: which tokens are system, header, wrapper, verb, object, template, last, ...

Groups come from three sources that every chat model has or may have: the template (what stands before and after the
user turn), the pair itself (which tokens differ), and the named spans of `pairs.jsonl`. A missing group is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

import numpy as np
from jaxtyping import Bool, Int
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from companion.base import chat
from companion.prompts.pairs import SPAN_NAMES
from companion.prompts.tokens import TokenPair

OVERLAPPING = ("request", "differ", "shared", "others", "all")


def user_header(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes before every user turn: the common end of what stands before the first and second one.

    Empty where it takes or shows no second turn; the system group then reaches up to the instruction.
    """
    turns = [("user", "@first@"), ("assistant", "@answer@"), ("user", "@second@")]
    try:
        text = chat.render(tokenizer, turns, generation_prompt=False)
        before_first = text[: text.index("@first@")]
        between = text[text.index("@answer@") + len("@answer@") : text.index("@second@")]
    except (TemplateError, ValueError):
        return ""
    ends = zip(reversed(before_first), reversed(between), strict=False)
    length = len(list(takewhile(lambda pair: pair[0] == pair[1], ends)))
    return before_first[len(before_first) - length :]


def groups(pair: TokenPair, header: str) -> dict[str, Bool[np.ndarray, "pos"]]:
    """Masks over token positions for one pair, by group name.

    The groups of the template and the spans (of either prompt) partition the prompt together with `rest`, the remaining
    instruction. `request` is verb and object, `shared` the equal tokens behind the first difference, `others` all but the last.
    """
    text = pair.pair.treated
    # Spaces around the instruction, which many templates strip, belong to no group of its own.
    start = len(text) - len(text.lstrip())
    inside = _overlaps(pair, "treated", start, len(text.rstrip()))
    is_template = pair.treated_offsets[:, 1] <= pair.treated_start + start - len(header)
    position = np.arange(len(inside))
    first, last = int(np.argmax(inside)), len(inside) - 1 - int(np.argmax(inside[::-1]))
    others, differ = position < len(inside) - 1, pair.control != pair.treated
    masks = {
        "system": (position < first) & is_template,
        "header": (position < first) & ~is_template,
        "last_instruction": (position == last) & others,
        "template": (position > last) & others,
        "last": ~others,
    }
    taken = masks["last_instruction"] | ~others | ~inside
    for name in SPAN_NAMES:
        touched = [_overlaps(pair, side, *spans[name]) for side, spans in pair.pair.spans.items() if name in spans]
        masks[name] = np.any([np.zeros_like(taken), *touched], axis=0) & ~taken
        taken = taken | masks[name]
    return {
        **masks,
        "rest": ~taken,
        "request": masks["verb"] | masks["object"],
        "differ": differ,
        "shared": ~differ & (position > int(np.argmax(differ))),
        "others": others,
        "all": position >= 0,
    }


def _overlaps(pair: TokenPair, side: str, first: int, end: int) -> Bool[np.ndarray, "pos"]:
    """Tokens of a side that overlap these characters of its user turn."""
    offsets, start = getattr(pair, f"{side}_offsets"), getattr(pair, f"{side}_start")
    return np.asarray((offsets[:, 1] > start + first) & (offsets[:, 0] < start + end))


def stack(pairs: Sequence[TokenPair], header: str, name: str) -> Bool[np.ndarray, "pair pos"]:
    """One group's masks for a batch of pairs of equal length."""
    return np.stack([groups(pair, header)[name] for pair in pairs])


def distance(pair: TokenPair) -> int:
    """Tokens from the last differing token to the last token: how far the treatment must be carried."""
    return len(pair.control) - 1 - int(np.flatnonzero(pair.control != pair.treated)[-1])


def labels(ids: Int[np.ndarray, "pos"], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One printable label a token, for axes: newlines and spaces made visible."""
    texts = [tokenizer.decode([int(i)]) for i in ids]
    # SentencePiece writes the blank before a word as ▁, and decodes a token on its own without it.
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens([int(i) for i in ids])]
    texts = [f" {t}" if p[:1] == "▁" and t[:1] != " " else t for t, p in zip(texts, pieces, strict=True)]
    return [text.replace("\n", "\\n").replace(" ", "·") for text in texts]


def token_labels(pair: TokenPair, side: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """`labels` of one side of a pair, "control" or "treated"; of a sensitive set's user turn only the places are shown."""
    names = labels(getattr(pair, side), tokenizer)
    if not pair.pair.sensitive:
        return names
    inside = _overlaps(pair, side, 0, len(getattr(pair.pair, side)))
    return ["(hidden)" if is_inside else name for name, is_inside in zip(names, inside, strict=True)]


def present(masks: Mapping[str, Bool[np.ndarray, "pos"]]) -> list[str]:
    """Names of the groups that hold at least one token, in reading order of their first token."""
    held = [name for name in masks if masks[name].any() and name not in OVERLAPPING]
    return sorted(held, key=lambda name: int(np.argmax(masks[name])))
