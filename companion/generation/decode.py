"""Answers that go on from prompts that were read: together, whatever lengths the prompts have.

Their keys and values stand in one cache, shorter prompts padded on the left and hidden by the mask. An answer that has
ended leaves the batch. Neither changes what is said, up to rounding.

Answers of a steered model: greedy, or sampled with numbers that are the same with and without steering.

The uniform numbers are drawn once for each prompt and step, so two runs differ only where their probabilities do, and the
batch a prompt is in changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from companion.generation.forward import BATCH, Steer, Switch, buckets, encode, read_prompts
from companion.model import load
from companion.model.activations import model_inputs
from companion.model.architecture import Subject

DROP: Final = 0.75  # share of answers that go on, below which the ended ones are taken out of the batch
# The chosen token of each row [row], from logits [row, vocab], the places of the rows in the list of prompts, and the step.
Choice = Callable[[Float[Tensor, "row vocab"], np.ndarray, int], Int[Tensor, "row"]]


@dataclass(frozen=True)
class Begun:
    """Prompts that were read: their places in a list, the logits behind them, their cache, and their length.

    `real` is False on the cache's padding; None where it has none.
    """

    places: np.ndarray
    logits: Float[Tensor, "row vocab"]
    cache: DynamicCache
    length: Int[Tensor, row]
    real: Bool[Tensor, "row pos"] | None = None


def is_whole(begun: Begun) -> bool:
    """Whether its cache holds the keys and values of all tokens of all layers: one of windows cannot be padded."""
    return all(type(layer) is DynamicLayer for layer in begun.cache.layers)


def together(begun: Sequence[Begun]) -> Begun:
    """All of them as one batch, padded on the left to the longest."""
    if len(begun) == 1:
        return begun[0]
    width = max(int(one.length.max()) for one in begun)
    cache = DynamicCache()
    for layer in range(len(begun[0].cache.layers)):
        held = [one.cache.layers[layer] for one in begun]
        cache.update(_padded([x.keys for x in held], width), _padded([x.values for x in held], width), layer)
    length = torch.cat([one.length for one in begun])
    real = torch.arange(width, device=length.device) >= width - length[:, None]
    return Begun(
        np.concatenate([one.places for one in begun]), torch.cat([x.logits for x in begun]), cache, length, real
    )


def _padded(parts: Sequence[Float[Tensor, "row head pos width"]], n_pos: int) -> Float[Tensor, "all head n_pos width"]:
    return torch.cat([torch.nn.functional.pad(x, (0, 0, n_pos - x.shape[-2], 0)) for x in parts])


@torch.no_grad()
def decode(
    subject: Subject, begun: Begun, steps: int, ends: Int[Tensor, end], choose: Choice, *, shrink: bool
) -> Int[np.ndarray, "row step"]:
    """Answers of at most `steps` tokens; behind an end stands anything. The cache is used up.

    Without `shrink` every row stays to the end: hooks may hold one value a prompt.
    """
    said = np.full((len(begun.places), steps), int(ends[0]) if len(ends) else 0)
    alive, token = np.arange(len(said)), choose(begun.logits, begun.places, 0)
    said[:, 0] = token.cpu().numpy()
    real, length = begun.real, begun.length
    for step in range(1, steps):
        goes_on = ~torch.isin(torch.tensor(said[alive, :step], device=token.device), ends).any(-1)
        if not bool(goes_on.any()):
            break
        if shrink and float(goes_on.float().mean()) < DROP:
            rows = goes_on.nonzero().flatten()
            begun.cache.batch_select_indices(rows)
            alive, token, length = alive[rows.cpu().numpy()], token[rows], length[rows]
            real = None if real is None else real[rows]
        call = {}
        if real is not None:
            real = torch.nn.functional.pad(real, (0, 1), value=True)
            call = {"attention_mask": real.long(), "position_ids": (length + step - 1)[:, None]}
        logits = subject.model(token[:, None], past_key_values=begun.cache, use_cache=True, **call).logits[:, -1]
        token = choose(logits, begun.places[alive], step)
        said[alive, step] = token.cpu().numpy()
    return said


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
    ends = torch.tensor(load.end_tokens(subject), device=subject.device)
    said = partial(decode, subject, steps=steps, ends=ends, choose=partial(_choose, draws))
    ids, waiting = np.zeros((len(texts), steps), dtype=int), list[Begun]()
    for places, prompt in buckets(subject, texts, system=system):
        if sum(len(one.places) for one in waiting) + len(places) > BATCH:
            _finish(waiting, said, ids)
        use = partial(_go_on, said, waiting if _answers_plainly(steer) else None, places, steps)
        known = None if unsteered is None else torch.tensor(unsteered.ids[places], device=subject.device)
        ids[places] = read_prompts(subject, prompt, steer, use, plain=known).cpu().numpy()
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
    ends = torch.tensor(load.end_tokens(subject), device=subject.device)
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


def _until(ends: Int[Tensor, end], ids: Int[np.ndarray, "prompt step"]) -> Answers:
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
    rows: Int[Tensor, row],
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
) -> Int[Tensor, row]:
    """The likeliest token, or the one in whose stretch of the cumulative distribution the number falls."""
    if draws is None:
        return logits.argmax(-1)
    draw = torch.tensor(draws[places, step], device=logits.device)
    below = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(below / below[:, -1:], draw[:, None].contiguous(), right=True)[:, 0]


def repetition(made: Answers, n: int = 4) -> Float[np.ndarray, prompt]:
    """Share of an answer's n-grams that occurred in it before; 0 for answers of fewer than n tokens."""
    shares = []
    for ids, mask in zip(made.ids, made.mask, strict=True):
        text = ids[mask]
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.array(shares)
