"""Answers of a steered model: greedy, or sampled with numbers that are the same with and without steering.

The uniform numbers are drawn once for each prompt and step, so two runs differ only where their probabilities do, and the
batch a prompt is in changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helpers import outcomes
from helpers.defence_batches import Steer, buckets, read
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

    Prompts whose gate stays shut have the plain model's answer, taken from `unsteered` if that is given.
    """
    ends = torch.tensor(outcomes.end_tokens(subject), device=subject.device)
    ids = np.zeros((len(texts), steps), dtype=int)
    for places, prompt in buckets(subject, texts, system=system):
        chosen = None if draws is None else torch.tensor(draws[places, :steps], device=subject.device)
        known = None if unsteered is None else torch.tensor(unsteered.ids[places], device=subject.device)
        said = partial(_decode, subject, steps, ends, chosen)
        ids[places] = read(subject, prompt, steer, said, plain=known).cpu().numpy()
    is_end = np.isin(ids, ends.cpu().numpy())
    return Answers(ids, is_end.cumsum(-1) - is_end == 0)


def _decode(
    subject: Subject,
    steps: int,
    ends: Int[Tensor, "end"],
    draws: Float[Tensor, "prompt step"] | None,
    rows: Int[Tensor, "row"],
    logits: Float[Tensor, "row vocab"],
    cache: Any,
) -> Int[Tensor, "row step"]:
    draw = None if draws is None else draws[rows]
    text = _choose(logits, None if draw is None else draw[:, 0])
    while text.shape[1] < steps and not bool(torch.isin(text, ends).any(-1).all()):
        logits = subject.model(text[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        text = torch.cat([text, _choose(logits, None if draw is None else draw[:, text.shape[1]])], 1)
    # Where every answer of a batch ended early, the rest is what stands behind an end: never read.
    return torch.nn.functional.pad(text, (0, steps - text.shape[1]), value=int(ends[0]) if len(ends) else 0)


def _choose(logits: Float[Tensor, "prompt vocab"], draw: Float[Tensor, "prompt"] | None) -> Int[Tensor, "prompt 1"]:
    """The likeliest token, or the one in whose stretch of the cumulative distribution the number falls."""
    if draw is None:
        return logits.argmax(-1, keepdim=True)
    below = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(below / below[:, -1:], draw[:, None].contiguous(), right=True)


def repetition(made: Answers, n: int = 4) -> Float[np.ndarray, "prompt"]:
    """Share of an answer's n-grams that occurred in it before; 0 for answers of fewer than n tokens."""
    shares = []
    for ids, mask in zip(made.ids, made.mask, strict=True):
        text = ids[mask]
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.array(shares)
