"""Directions between classes of prompts, from class means of activations.

A class is what the model itself did: harmful prompts that it refused or complied with, and other prompts that it answered.
Directions come from the topics of `discover`; what is calibrated (gates, slopes, clips) comes from `validate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from companion.base import chat
from companion.base.device import to_host
from companion.base.errors import InputError
from companion.generation import forward
from companion.model.activations import on_output, prefix_once, shared_prefix
from companion.model.architecture import Subject
from companion.prompts import tokens
from companion.prompts.tokens import Openers

# Each class, and what is said where no prompt of discover belongs to it.
CLASSES: Final = {
    "refused": "the model refused no harmful prompt: add plainer ones, or use a model with safety training",
    "complied": "the model complied with no harmful prompt: add stronger jailbreak wrappers (T2)",
    "benign": "the model answered no harmless prompt: add harmless ones (T1, T2b or B)",
}
# mean of the first class - mean of the second: adding it moves towards refusing, or towards what is answered as harmless.
ENDS: Final = {"rejection": ("refused", "complied"), "harmfulness": ("benign", "complied")}
FITTED: Final = ("resid_post", "mlp_out")  # the parts on which directions are fitted


@dataclass(frozen=True, eq=False)
class Fit:
    """Prompts of discover and validate with their unsteered activations at the last token.

    `prompts` has the columns id, text, kind, split, refused and `class` (one of `CLASSES`, or "" for a refused harmless prompt);
    `last` each of `FITTED`. `instruction` is the residual stream at the instruction's last token, `tail` before the last one.
    """

    subject: Subject
    openers: Openers
    prompts: pd.DataFrame
    last: dict[str, Float[np.ndarray, "prompt layer width"]]
    instruction: Float[np.ndarray, "prompt layer d"]
    tail: int
    memo: dict[object, Any] = field(default_factory=dict, init=False, repr=False)  # what is worked out once for a fit

    @property
    def harmful(self) -> Bool[np.ndarray, "prompt"]:
        """Which prompts are harmful requests, whatever the model did with them."""
        return (self.prompts.kind == "harmful").to_numpy()

    def mask(self, split: str, *classes: str) -> Bool[np.ndarray, "prompt"]:
        """Which prompts belong to a split and, if any are named, to one of these classes."""
        mask = (self.prompts.split == split).to_numpy()
        return mask & self.prompts["class"].isin(classes).to_numpy() if classes else mask

    @property
    def missing(self) -> str:
        """Which class has no prompt in discover, and what to supply; "" where directions can be fitted."""
        return next((said for name, said in CLASSES.items() if not self.mask("discover", name).any()), "")

    def need(self, *classes: str) -> None:
        """`InputError` that says what to supply, if one of these classes has no prompt in discover."""
        for name in classes:
            if not self.mask("discover", name).any():
                raise InputError(CLASSES[name])

    def means(self, part: str = "resid_post") -> dict[str, Float[np.ndarray, "layer width"]]:
        """The mean of each class that has prompts in discover."""
        if part not in self.memo:  # every arm asks for them
            masks = {name: self.mask("discover", name) for name in CLASSES}
            self.memo[part] = {n: self.last[part][mask].mean(0, dtype=float) for n, mask in masks.items() if mask.any()}
        return self.memo[part]

    def direction(self, role: str, part: str = "resid_post") -> Float[np.ndarray, "layer width"]:
        """The direction of a role at every layer; `InputError` where a class is missing or both have the same activations."""
        one, other = ENDS[role]
        self.need(one, other)
        means = self.means(part)
        made = means[one] - means[other]
        if not made.any():
            raise InputError(f"{one} and {other} harmful prompts have the same activations: are the labels right?")
        return made

    def subset(self, places: np.ndarray) -> Fit:
        """The fit on some of its prompts (a mask, or indices with repeats), without reading them anew."""
        table = self.prompts.iloc[np.flatnonzero(places) if places.dtype == bool else places].reset_index(drop=True)
        last = {name: values[places] for name, values in self.last.items()}
        return replace(self, prompts=table, last=last, instruction=self.instruction[places])


def fit_classes(subject: Subject, openers: Openers, prompts: pd.DataFrame) -> Fit:
    """Reads the activations of the prompts of discover and validate, one forward pass each.

    A missing class is no error here; a method that needs it says so.
    """
    kept = prompts[prompts.split.isin(["discover", "validate"])].reset_index(drop=True)
    if kept.empty:
        raise InputError("no prompt of the splits discover and validate: nothing to fit directions on")
    tail = _instruction_tail(subject)
    last = _activations(subject, list(kept.text), tail)
    instruction = last.pop("instruction")
    return Fit(subject, openers, kept.assign(**{"class": classes(kept)}), last, instruction, tail)


def classes(prompts: pd.DataFrame) -> list[str]:
    """The class of each prompt, by what the model itself did ("" for a harmless prompt that it refused).

    >>> classes(pd.DataFrame({"kind": ["harmful", "harmful", "harmless"], "refused": [True, False, False]}))
    ['refused', 'complied', 'benign']
    """
    harmful, refused = prompts.kind == "harmful", prompts.refused.astype(bool)
    return [str(name) for name in np.select([harmful & refused, harmful, ~refused], [*CLASSES], "")]


def _instruction_tail(subject: Subject) -> int:
    """Tokens from the instruction's last one to the prompt's last one: what the template writes behind a user turn."""
    assert subject.tokenizer is not None
    _, offsets, start = tokens.encode(subject.tokenizer, chat.STAND_IN)
    inside = offsets[:, 0] < start + len(chat.STAND_IN)
    return int((~inside[int(np.argmax(offsets[:, 1] > start)) :]).sum())


@torch.no_grad()
def _activations(subject: Subject, texts: Sequence[str], tail: int) -> dict[str, np.ndarray]:
    """Every part at the last token, and as "instruction" the residual stream at the instruction's: [prompt, layer, width]."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (*FITTED, "instruction")}
    order = []
    for places, ids in forward.buckets(subject, texts):
        order.append(places)
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in FITTED}
        n = shared_prefix(subject, ids)
        with prefix_once(subject, n), ExitStack() as hooks:
            for parts in subject.layers:
                hooks.enter_context(on_output(parts.block, seen["resid_post"].append))
                hooks.enter_context(on_output(parts.mlp_write, seen["mlp_out"].append))
            subject.model.base_model(ids, use_cache=False)
        if n:  # parts of layers were called for the prefix first
            seen["mlp_out"] = seen["mlp_out"][1::2]
        found = [(name, layers, -1) for name, layers in seen.items()]
        for name, layers, place in (*found, ("instruction", seen["resid_post"], -1 - tail)):
            rows[name].append(to_host(torch.stack([x[:, place] for x in layers], dim=1).float()))
    back = np.argsort(np.concatenate(order))
    return {name: np.concatenate(parts)[back] for name, parts in rows.items()}
