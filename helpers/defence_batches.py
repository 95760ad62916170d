"""Prompts of one length together, read under a switch that steers the model or leaves it alone.

Nothing is padded. Where the plain model's run over a batch is kept, a steered run sets in above it
(`helpers.steering_resume`); any other switch reads the batch from the bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from helpers import steering_resume as resume
from helpers import tokens
from helpers.readout import logits as logits_of
from helpers.subject import Subject

# Switches steering on for the calls inside it; `nullcontext` is no steering.
Steer = Callable[[], AbstractContextManager[object]]
# What is made of a group of prompts: their rows in the batch, the first token's logits, and the cache that was filled.
Use = Callable[[Int[Tensor, "row"], Float[Tensor, "row vocab"], Any], Tensor]
BATCH = 128


def buckets(
    subject: Subject, texts: Sequence[str], size: int = BATCH, *, system: str = ""
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Prompts of one token length together: their places in the list, and their ids [prompt, pos]."""
    encoded = [encode(subject, text, system) for text in texts]
    lengths = np.array([len(ids) for ids in encoded])
    for length in np.unique(lengths):
        places = np.flatnonzero(lengths == length)
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            yield chosen, torch.tensor(np.stack([encoded[i] for i in chosen]), device=subject.device)


def encode(subject: Subject, text: str, system: str = "") -> Int[np.ndarray, "pos"]:
    """Token ids of a user turn in the chat template, behind a system turn of one's own if one is given.

    A template that takes no system turn gets the sentence at the head of the user turn.
    """
    assert subject.tokenizer is not None
    return _encoded(subject.tokenizer, text, system)


@lru_cache(maxsize=1 << 15)  # the same few thousand prompts are read under every arm
def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, system: str) -> Int[np.ndarray, "pos"]:
    if not system:
        return tokens.encode(tokenizer, text)[0]
    turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return tokens.encode(tokenizer, f"{system} {text}")[0]
    return np.array(tokenizer(str(rendered), add_special_tokens=False)["input_ids"])


def read(
    subject: Subject,
    ids: Int[Tensor, "prompt pos"],
    steer: Steer,
    use: Use,
    *,
    cached: bool = True,
    plain: Tensor | None = None,
) -> Float[Tensor, "prompt ..."] | Int[Tensor, "prompt ..."]:
    """What `use` makes of the batch, called while the switch is on, once or for each group of prompts.

    Prompts that a steering does not touch (its gate stays shut) are a group of their own; their rows are taken from `plain`
    where that is known. `cached` asks for a cache from which answers can go on.
    """
    begun = resume.begun(subject, steer, ids)
    if begun is None:
        with steer():
            out = subject.model(ids, use_cache=cached, logits_to_keep=1)
            return use(torch.arange(len(ids), device=ids.device), out.logits[:, -1], out.past_key_values)
    steering, run = begun
    part = resume.steered_part(steering, run)
    left, groups = resume.untouched(run, part), []
    if len(left) and plain is not None:
        groups.append((left, plain[left]))
    elif len(left):
        cache = resume.cache_of(resume.rows_of(run, left)) if cached else None
        groups.append((left, use(left, logits_of(subject, run.resid_post[-1][left, -1]), cache)))
    if part is not None:
        with resume.within(subject, steering, part):
            last, cache = resume.climb(subject, steering, part, cached=cached)
            groups.append((part.rows, use(part.rows, logits_of(subject, last), cache)))
    made = groups[0][1].new_empty(len(ids), *groups[0][1].shape[1:])
    for rows, found in groups:
        made[rows] = found
    return made
