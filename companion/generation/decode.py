"""Answers of a model, plain or steered: greedy, or sampled with numbers that are the same with and without steering.

Answers that no longer hang on the steering go on together, whatever lengths their prompts have: keys and values stand in one
cache, shorter prompts padded on the left and hidden by the mask, and an answer that has ended leaves the batch. Neither changes
what is said, up to rounding. Uniform numbers are drawn once for each prompt and step, so two runs differ only where their
probabilities do, and the batch a prompt is in changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from companion.base.device import running_sum, to_host
from companion.generation.forward import BATCH, buckets, read_prompts
from companion.generation.hooks import PLAIN, Steering
from companion.model.activations import prefix_once, shared_prefix
from companion.model.architecture import Subject, end_tokens

DROP: Final = 0.75  # share of answers that go on, below which the ended ones are taken out of the batch
# The chosen token of each row [row], from logits [row, vocab], the places of the rows in the list of prompts, and the step.
Choice = Callable[[Float[Tensor, "row vocab"], np.ndarray, int], Int[Tensor, "row"]]


@dataclass(frozen=True)
class Answers:
    """Token ids of answers, filled with `mask` False behind the end token; rows follow the prompts."""

    ids: Int[np.ndarray, "prompt step"]
    mask: Bool[np.ndarray, "prompt step"]


@dataclass(frozen=True)
class Begun:
    """Prompts that were read: their places in a list, and what answers go on from. `real` is False on the cache's padding."""

    places: np.ndarray
    logits: Float[Tensor, "row vocab"]
    cache: DynamicCache
    length: Int[Tensor, "row"]
    real: Bool[Tensor, "row pos"] | None = None


def together(begun: Sequence[Begun]) -> Begun:
    """All of them as one batch, padded on the left to the longest."""
    if len(begun) == 1:
        return begun[0]
    n_pos, cache = max(int(one.length.max()) for one in begun), DynamicCache()

    def padded(parts: Sequence[Float[Tensor, "row head pos width"]]) -> Float[Tensor, "all head n_pos width"]:
        return torch.cat([torch.nn.functional.pad(x, (0, 0, n_pos - x.shape[-2], 0)) for x in parts])

    for layer in range(len(begun[0].cache.layers)):
        held = [one.cache.layers[layer] for one in begun]
        cache.update(padded([x.keys for x in held]), padded([x.values for x in held]), layer)
    length, logits = (torch.cat([getattr(one, name) for one in begun]) for name in ("length", "logits"))
    real = torch.arange(n_pos, device=length.device) >= n_pos - length[:, None]
    return Begun(np.concatenate([one.places for one in begun]), logits, cache, length, real)


@torch.no_grad()
def decode(
    subject: Subject, begun: Begun, steps: int, ends: Int[Tensor, "end"], choose: Choice, *, shrink: bool
) -> Int[np.ndarray, "row step"]:
    """Answers of at most `steps` tokens; behind an end stands anything. The cache is used up.

    Without `shrink` every row stays to the end: hooks may hold one value a prompt.
    """
    said = np.full((len(begun.places), steps), int(ends[0]) if len(ends) else 0)
    alive, token = np.arange(len(said)), choose(begun.logits, begun.places, 0)
    said[:, 0] = to_host(token)
    real, length = begun.real, begun.length
    for step in range(1, steps):
        goes_on = ~torch.isin(torch.tensor(said[alive, :step], device=token.device), ends).any(-1)
        if not bool(goes_on.any()):
            break
        if shrink and float(goes_on.float().mean()) < DROP:
            rows = goes_on.nonzero().flatten()
            begun.cache.batch_select_indices(rows)
            alive, token, length = alive[to_host(rows)], token[rows], length[rows]
            real = None if real is None else real[rows]
        call = {}
        if real is not None:
            real = torch.nn.functional.pad(real, (0, 1), value=True)
            call = {"attention_mask": real.long(), "position_ids": (length + step - 1)[:, None]}
        logits = subject.model(token[:, None], past_key_values=begun.cache, use_cache=True, **call).logits[:, -1]
        token = choose(logits, begun.places[alive], step)
        said[alive, step] = to_host(token)
    return said


def uniforms(n_prompts: int, steps: int, seed: int) -> Float[np.ndarray, "prompt step"]:
    """The random numbers that decide the samples of each prompt."""
    return np.random.default_rng(seed).random((n_prompts, steps))


@torch.no_grad()
def answers(
    subject: Subject,
    texts: Sequence[str],
    steps: int,
    steering: Steering = PLAIN,
    draws: Float[np.ndarray, "prompt step"] | None = None,
    *,
    unsteered: Answers | None = None,
) -> Answers:
    """Answers of at most `steps` tokens: greedy, or sampled at temperature 1 by `draws` in [0, 1).

    Prompts whose gate stays shut have the plain model's answer, taken from `unsteered` if that is given.
    """
    ends = subject.tensor([*end_tokens(subject)])
    said = partial(decode, subject, steps=steps, ends=ends, choose=partial(_choose, draws))
    ids, waiting = np.zeros((len(texts), steps), dtype=int), list[Begun]()

    def go_on(places: np.ndarray, rows: Int[Tensor, "row"], logits: Float[Tensor, "row vocab"], cache: Any) -> Tensor:
        """Zeros, since no answer token is steered: they wait for prompts of other lengths. A cache of windows cannot."""
        length = torch.full((len(rows),), cache.get_seq_length(), device=rows.device)
        begun = Begun(places[to_host(rows)], logits, cache, length)
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            return torch.tensor(said(begun, shrink=False), device=rows.device)
        waiting.append(begun)
        return rows.new_zeros(len(rows), steps)

    def finish() -> None:
        if waiting:
            begun = together(waiting)
            waiting.clear()
            ids[begun.places] = said(begun, shrink=True)

    for places, prompt in buckets(subject, texts, system=steering.system):
        if sum(len(one.places) for one in waiting) + len(places) > BATCH:
            finish()
        known = None if unsteered is None else subject.tensor(unsteered.ids[places])
        ids[places] = to_host(read_prompts(subject, prompt, [steering], partial(go_on, places), plain=known)[0])
    finish()
    return _until_end(ends, ids)


@torch.no_grad()
def greedy_answers(
    subject: Subject, ids: Int[Tensor, "row pos"], steps: int, cache: DynamicCache | None = None
) -> Answers:
    """Greedy answers to prompts of one length, given as token ids; read on from a cache if one is given.

    Hooks of the caller act in every call: the first reads the prompts, each later one a token of every row.
    """
    ends = torch.tensor([*end_tokens(subject)], device=ids.device)
    n = shared_prefix(subject, ids) if cache is None else 0
    with prefix_once(subject, n):
        out = subject.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    length = torch.full((len(ids),), out.past_key_values.get_seq_length(), device=ids.device)
    begun = Begun(np.arange(len(ids)), out.logits[:, -1], out.past_key_values, length)
    return _until_end(ends, decode(subject, begun, steps, ends, partial(_choose, None), shrink=False))


def _until_end(ends: Int[Tensor, "end"], ids: Int[np.ndarray, "prompt step"]) -> Answers:
    is_end = np.isin(ids, to_host(ends))
    return Answers(ids, is_end.cumsum(-1) - is_end == 0)


def _choose(
    draws: Float[np.ndarray, "prompt step"] | None, logits: Float[Tensor, "row vocab"], places: np.ndarray, step: int
) -> Int[Tensor, "row"]:
    """The likeliest token, or the one in whose stretch of the cumulative distribution the number falls."""
    if draws is None:
        return logits.argmax(-1)
    draw = torch.tensor(draws[places, step], device=logits.device)
    below = running_sum(logits.double().softmax(-1), -1)
    return torch.searchsorted(below / below[:, -1:], draw[:, None].contiguous(), right=True)[:, 0]


def answer_texts(subject: Subject, made: Answers) -> list[str]:
    """The answers as text, without special tokens."""
    assert subject.tokenizer is not None
    kept = [row[mask] for row, mask in zip(made.ids, made.mask, strict=True)]
    return list(subject.tokenizer.batch_decode(kept, skip_special_tokens=True))


def repetition(made: Answers) -> Float[np.ndarray, "prompt"]:
    """Share of an answer's runs of four tokens that occurred in it before; 0 for answers of fewer than four."""
    shares = []
    for ids, mask in zip(made.ids, made.mask, strict=True):
        text = ids[mask]
        grams = [tuple(text[i : i + 4]) for i in range(len(text) - 3)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.array(shares)
