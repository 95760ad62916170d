"""Answers of a steered model: greedy, or sampled with numbers that are the same with and without steering.

The uniform numbers are drawn once for each prompt and step, so two runs differ only where their probabilities do, and the
batch a prompt is in changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from helpers import outcomes
from helpers.defence_batches import BATCH, Steer, buckets, encode, read
from helpers.defence_decoding import Begun, decode, is_whole, together
from helpers.grid_run import model_inputs
from helpers.steering_resume import Switch
from helpers.subject import Subject


@dataclass(frozen=True)
class Answers:
    """Token ids of answers, filled with `mask` False behind the end token; rows follow the prompts."""

    ids: Int[np.ndarray, "prompt step"]
    mask: Bool[np.ndarray, "prompt step"]


def uniforms(n_prompts: int, steps: int, seed: int) -> Float[np.ndarray, "prompt step"]:
    """The random numbers that decide the samples of each prompt."""
    return np.random.default_rng(seed).random((n_prompts, steps))


@torch.no_grad()
def answers(
    subject: Subject,
    texts: Sequence[str],
    steps: int,
    steer: Steer = nullcontext,
    draws: Float[np.ndarray, "prompt step"] | None = None,
    *,
    system: str = "",
    unsteered: Answers | None = None,
) -> Answers:
    """Answers of at most `steps` tokens: greedy, or sampled at temperature 1 by `draws` in [0, 1).

    Prompts whose gate stays shut have the plain model's answer, taken from `unsteered` if that is given. Where no answer
    token is steered, prompts of several lengths are answered together.
    """
    ends = torch.tensor(outcomes.end_tokens(subject), device=subject.device)
    said = partial(decode, subject, steps=steps, ends=ends, choose=partial(_choose, draws))
    ids, waiting = np.zeros((len(texts), steps), dtype=int), list[Begun]()
    for places, prompt in buckets(subject, texts, system=system):
        if sum(len(one.places) for one in waiting) + len(places) > BATCH:
            _finish(waiting, said, ids)
        use = partial(_go_on, said, waiting if _answers_plainly(steer) else None, places, steps)
        known = None if unsteered is None else torch.tensor(unsteered.ids[places], device=subject.device)
        ids[places] = read(subject, prompt, steer, use, plain=known).cpu().numpy()
    _finish(waiting, said, ids)
    return _until(ends, ids)


@torch.no_grad()
def answers_at_once(
    subject: Subject,
    texts: Sequence[str],
    steps: int,
    steer: Steer = nullcontext,
    draws: Float[np.ndarray, "prompt step"] | None = None,
    *,
    system: str = "",
) -> Answers:
    """`answers` with all prompts in one padded batch that is read from the bottom: as a server would, to be timed."""
    ends = torch.tensor(outcomes.end_tokens(subject), device=subject.device)
    rows = [torch.tensor(encode(subject, text, system)) for text in texts]
    length = torch.tensor([len(row) for row in rows], device=subject.device)
    real = torch.arange(int(length.max()), device=subject.device) >= length.max() - length[:, None]
    ids = torch.zeros_like(real, dtype=torch.long)
    ids[real] = torch.cat(rows).to(subject.device)
    cache = DynamicCache()
    with steer():
        logits = subject.model(**model_inputs(ids, real), past_key_values=cache, logits_to_keep=1).logits[:, -1]
        begun = Begun(np.arange(len(rows)), logits, cache, length, real)
        said = decode(subject, begun, steps, ends, partial(_choose, draws), shrink=False)
    return _until(ends, said)


def _until(ends: Int[Tensor, "end"], ids: Int[np.ndarray, "prompt step"]) -> Answers:
    is_end = np.isin(ids, ends.cpu().numpy())
    return Answers(ids, is_end.cumsum(-1) - is_end == 0)


def _answers_plainly(steer: Steer) -> bool:
    """Whether answer tokens are the plain model's, so that they can be computed when the switch is off again."""
    return steer is nullcontext or (
        isinstance(steer, Switch) and all(edit.where != "every" for edit in steer.steering.edits)
    )


def _go_on(
    said: Callable[..., np.ndarray],
    waiting: list[Begun] | None,
    places: np.ndarray,
    steps: int,
    rows: Int[Tensor, "row"],
    logits: Float[Tensor, "row vocab"],
    cache: Any,
) -> Int[Tensor, "row step"]:
    """The answers, or zeros for those that are put off (`waiting`)."""
    length = torch.full((len(rows),), cache.get_seq_length(), device=rows.device)
    begun = Begun(places[rows.cpu().numpy()], logits, cache, length)
    if waiting is None or not is_whole(begun):
        return torch.tensor(said(begun, shrink=False), device=rows.device)
    waiting.append(begun)
    return rows.new_zeros(len(rows), steps)


def _finish(waiting: list[Begun], said: Callable[..., np.ndarray], ids: Int[np.ndarray, "prompt step"]) -> None:
    if waiting:
        begun = together(waiting)
        waiting.clear()
        ids[begun.places] = said(begun, shrink=True)


def _choose(
    draws: Float[np.ndarray, "prompt step"] | None, logits: Float[Tensor, "row vocab"], places: np.ndarray, step: int
) -> Int[Tensor, "row"]:
    """The likeliest token, or the one in whose stretch of the cumulative distribution the number falls."""
    if draws is None:
        return logits.argmax(-1)
    draw = torch.tensor(draws[places, step], device=logits.device)
    below = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(below / below[:, -1:], draw[:, None].contiguous(), right=True)[:, 0]


def repetition(made: Answers, n: int = 4) -> Float[np.ndarray, "prompt"]:
    """Share of an answer's n-grams that occurred in it before; 0 for answers of fewer than n tokens."""
    shares = []
    for ids, mask in zip(made.ids, made.mask, strict=True):
        text = ids[mask]
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.array(shares)
