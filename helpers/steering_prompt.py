"""The batch under steering: what an edit or a gate may look at, all of it or some rows or the last tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helpers.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """The batch under steering. `real` is False on padding, on either side.

    `last` is the index of each prompt's last real token; `read` holds the activations that the steering's reads name, and
    `opened` the gate once it was asked.
    """

    ids: Int[Tensor, "prompt pos"]
    real: Bool[Tensor, "prompt pos"]
    last: Int[Tensor, "prompt"]
    read: dict[str, Tensor] = field(default_factory=dict)
    opened: list[Float[Tensor, "prompt"]] = field(default_factory=list)


def of_call(ids: Any, mask: Any) -> Prompt:
    """The prompt of a call of the model with these token ids and, if padded, this mask."""
    if ids is None or (mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape)):
        raise InputError("a steered call needs input_ids and, if padded, an attention_mask of the same shape")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not bool(real.any(-1).all()):
        raise InputError("a prompt of the batch has no real token: every row of attention_mask needs a 1")
    place = torch.arange(ids.shape[1], device=ids.device)
    return Prompt(ids, real, (place * real).argmax(-1))


def some(prompt: Prompt, rows: Int[Tensor, "row"] | slice) -> Prompt:
    """Some of the prompts, with what was read of them and their gates."""
    read = {name: x[rows] for name, x in prompt.read.items()}
    return Prompt(prompt.ids[rows], prompt.real[rows], prompt.last[rows], read, [x[rows] for x in prompt.opened])


def joined(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts of one length below each other; what was read under one name may stand for another layer in each."""
    read = {name: torch.cat([one.read[name] for one in prompts]) for name in prompts[0].read}
    opened = [torch.cat(gates) for gates in zip(*(one.opened for one in prompts), strict=True)]
    ids, real, last = (torch.cat([getattr(one, name) for one in prompts]) for name in ("ids", "real", "last"))
    return Prompt(ids, real, last, read, opened)


def tail(prompt: Prompt, n: int) -> Prompt:
    """The last `n` positions, where nothing else is computed."""
    cut = prompt.ids.shape[1] - n
    return prompt if not cut else Prompt(
        prompt.ids[:, cut:], prompt.real[:, cut:], prompt.last - cut, prompt.read, prompt.opened
    )  # fmt: skip
