"""Prompts of one length together, read under a switch that steers the model or leaves it alone.

Nothing is padded; steerings of the same sites can share a batch (`helpers.steering_stack`). Where the plain model's run
over a batch is kept, a steered run sets in above it (`helpers.steering_resume`); any other switch reads the batch from the
bottom.
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
from helpers import steering_stack, tokens
from helpers.grid_run import CleanRun
from helpers.readout import logits as logits_of
from helpers.steering import Steering, applied
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
    return _resumed(subject, [begun[0]], begun[1], use, cached, plain)[0]


def read_each(
    subject: Subject,
    ids: Int[Tensor, "prompt pos"],
    steerings: Sequence[Steering],
    use: Use,
    *,
    cached: bool = True,
    plain: Tensor | None = None,
    rows: int = steering_stack.ROWS,
) -> Float[Tensor, "steering prompt ..."] | Int[Tensor, "steering prompt ..."]:
    """`read` under each of the steerings; those of the same sites share the model's calls, in batches of `rows`."""
    run = resume.plain_run(subject, ids)
    if run is None:
        switches = [resume.Switch(subject, one) for one in steerings]
        return torch.stack([read(subject, ids, switch, use, cached=cached, plain=plain) for switch in switches])
    groups = steering_stack.fitting(steerings, len(ids), rows)
    return torch.cat([_resumed(subject, group, run, use, cached, plain) for group in groups])


def _resumed(
    subject: Subject, steerings: Sequence[Steering], run: CleanRun, use: Use, cached: bool, plain: Tensor | None
) -> Float[Tensor, "steering prompt ..."] | Int[Tensor, "steering prompt ..."]:
    """Steerings of the same sites in one climb. What none of them touches in a prompt is the plain model's."""
    parts = {i: part for i, one in enumerate(steerings) if (part := resume.steered_part(one, run)) is not None}
    touched = torch.zeros(len(steerings), len(run.tokens), dtype=torch.bool, device=run.tokens.device)
    for i, part in parts.items():
        touched[i, part.rows] = True
    left = (~touched).any(0).nonzero().flatten()
    if len(left) and plain is None:
        cache = resume.cache_of(resume.untouched(run, left)) if cached else None
        made = use(left, logits_of(subject, run.resid_post[-1][left, -1]), cache)
        plain = made.new_empty(len(run.tokens), *made.shape[1:])
        plain[left] = made
    if not parts:
        assert plain is not None  # nothing is touched, so all of it was left
        return plain.expand(len(steerings), *plain.shape)
    steering, whole, places = steering_stack.stacked([steerings[i] for i in parts], list(parts.values()))
    with applied(subject, steering, whole.prompt):
        last, cache = resume.climb(subject, steering, whole, cached=cached)
        made = use(whole.rows, logits_of(subject, last), cache)
    found = made.new_empty(*touched.shape, *made.shape[1:])
    if plain is not None:
        found[:] = plain
    for (i, part), at in zip(parts.items(), places, strict=True):
        found[i, part.rows] = made[at]
    return found
