"""Answers that go on from prompts that were read: together, whatever lengths the prompts have.

Their keys and values stand in one cache, shorter prompts padded on the left and hidden by the mask. An answer that has
ended leaves the batch. Neither changes what is said, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from helpers.subject import Subject

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
    length: Int[Tensor, "row"]
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
    subject: Subject, begun: Begun, steps: int, ends: Int[Tensor, "end"], choose: Choice, *, shrink: bool
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
