"""What steering directions are fitted from: activations of prompts, in classes by what the model itself did with them.

Directions come from the topics of `discover`; what is calibrated (gates, slopes, clips) comes from `validate`. The classes
are harmful prompts that were refused, harmful ones that were complied with, and other prompts that were answered.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from helpers import defence_outcomes, tokens
from helpers.errors import InputError
from helpers.grid_run import on_input, on_output
from helpers.steering import PARTS
from helpers.subject import Subject
from helpers.tokens import Openers

CLASSES: Final = ("refused", "complied", "benign")
COLUMNS: Final = ("id", "text", "kind", "split", "refused")
SUPPLY: Final = {
    "refused": "no harmful prompt of discover was refused: add plainer ones, or use a model with safety training",
    "complied": "no harmful prompt of discover was complied with: add stronger jailbreak wrappers (T2)",
    "benign": "no harmless prompt of discover was answered: add harmless ones (T1, T2b or B)",
}


@dataclass(frozen=True, eq=False)
class Fit:
    """Prompts of discover and validate with their unsteered activations at the last token.

    `prompts` has the columns of `COLUMNS` and `class` (one of `CLASSES`, or "" for a refused harmless prompt). `last` maps
    each part to an array [prompt, layer, width] (`neurons` only of `neuron_layers`); `instruction` is the residual stream at
    the last token of the instruction, `tail` tokens before the last one.
    """

    subject: Subject
    openers: Openers
    prompts: pd.DataFrame
    last: dict[str, Float[np.ndarray, "prompt layer width"]]
    instruction: Float[np.ndarray, "prompt layer d"]
    tail: int
    neuron_layers: tuple[int, ...]


@dataclass(frozen=True)
class Directions:
    """Class means [layer, width] of one part and the two directions between them, in the paper's signs.

    `rejection` points from complied to refused harmful prompts, `harmfulness` from complied harmful to answered benign
    ones (so it leads *away* from harm). What needs a class without prompts is None.
    """

    part: str
    refused: Float[np.ndarray, "layer width"] | None
    complied: Float[np.ndarray, "layer width"] | None
    benign: Float[np.ndarray, "layer width"] | None
    counts: dict[str, int]

    @property
    def rejection(self) -> Float[np.ndarray, "layer width"] | None:
        """v_R = mean(refused) - mean(complied): adding it moves towards refusing."""
        return None if self.refused is None or self.complied is None else self.refused - self.complied

    @property
    def harmfulness(self) -> Float[np.ndarray, "layer width"] | None:
        """v_H = mean(benign) - mean(complied): adding it moves towards what is answered because it is harmless."""
        return None if self.benign is None or self.complied is None else self.benign - self.complied


_made: WeakKeyDictionary[Fit, dict[str, Directions]] = WeakKeyDictionary()  # every arm of a fit asks for the same ones


def fit(
    subject: Subject, openers: Openers, prompts: pd.DataFrame, *, neuron_layers: Collection[int] | None = None
) -> Fit:
    """Reads the activations of the prompts of discover and validate, one forward pass each.

    `neuron_layers` (default: the last) bounds what is kept of neurons. A missing class is no error here; a method that
    needs it says so.
    """
    if lacking := [name for name in COLUMNS if name not in prompts.columns]:
        raise InputError(f"the prompts have no column {lacking[0]!r}; expected {', '.join(COLUMNS)}")
    kept = prompts[prompts.split.isin(["discover", "validate"])].reset_index(drop=True)
    if kept.empty:
        raise InputError("no prompt of the splits discover and validate: nothing to fit directions on")
    table = kept.assign(**{"class": classes(kept)})
    wanted = (subject.n_layers - 1,) if neuron_layers is None else tuple(sorted(set(neuron_layers)))
    wanted = wanted if subject.layers[0].down_proj is not None else ()
    tail = instruction_tail(subject)
    last, instruction = activations(subject, list(table.text), tail, wanted)
    return Fit(subject, openers, table, last, instruction, tail, wanted)


def classes(prompts: pd.DataFrame) -> list[str]:
    """The class of each prompt, by what the model itself did ("" for a harmless prompt that it refused)."""
    harmful, refused = prompts.kind == "harmful", prompts.refused.astype(bool)
    return [str(name) for name in np.select([harmful & refused, harmful, ~refused], CLASSES, "")]


def instruction_tail(subject: Subject) -> int:
    """Tokens from the instruction's last one to the prompt's last one: what the template writes behind a user turn."""
    if subject.tokenizer is None:
        return 0
    _, offsets, start = tokens.encode(subject.tokenizer, tokens.STAND_IN)
    inside = offsets[:, 0] < start + len(tokens.STAND_IN)
    return int((~inside[int(np.argmax(offsets[:, 1] > start)) :]).sum())


@torch.no_grad()
def activations(
    subject: Subject, texts: Sequence[str], tail: int, neuron_layers: Sequence[int]
) -> tuple[dict[str, Float[np.ndarray, "prompt layer width"]], Float[np.ndarray, "prompt layer d"]]:
    """Activations of every part at the last token, and of the residual stream at the instruction's last token."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (*PARTS, "instruction")}
    order = []
    for places, ids in defence_outcomes.buckets(subject, texts):
        order.append(places)
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in PARTS}
        with ExitStack() as hooks:
            for number, parts in enumerate(subject.layers):
                hooks.enter_context(on_output(parts.block, seen["resid_post"].append))
                hooks.enter_context(on_output(parts.mlp_write, seen["mlp_out"].append))
                if number in neuron_layers and parts.down_proj is not None:
                    hooks.enter_context(on_input(parts.down_proj, seen["neurons"].append))
            subject.model.base_model(ids, use_cache=False)
        for name, found in seen.items():
            if found:
                rows[name].append(_at(found, -1))
        rows["instruction"].append(_at(seen["resid_post"], -1 - tail))
    back = np.argsort(np.concatenate(order))
    made = {name: np.concatenate(parts)[back] for name, parts in rows.items() if parts}
    instruction = made.pop("instruction")
    return made, instruction


def _at(layers: Sequence[torch.Tensor], place: int) -> Float[np.ndarray, "prompt layer width"]:
    return torch.stack([x[:, place] for x in layers], dim=1).float().cpu().numpy()


def rows(found: Fit, split: str, *names: str) -> Bool[np.ndarray, "prompt"]:
    """Which prompts belong to a split and, if any are named, to one of these classes."""
    mask = (found.prompts.split == split).to_numpy()
    return mask & found.prompts["class"].isin(names).to_numpy() if names else mask


def directions(found: Fit, part: str = "resid_post") -> Directions:
    """Class means on discover and the directions between them.

    >>> classes(pd.DataFrame({"kind": ["harmful", "harmful", "harmless"], "refused": [True, False, False]}))
    ['refused', 'complied', 'benign']
    """
    if part not in found.last:
        raise InputError(f"no activations of {part!r}; fitted were {', '.join(found.last)}")
    made = _made.setdefault(found, {})
    if part not in made:
        made[part] = _directions(found, part)
    return made[part]


def _directions(found: Fit, part: str) -> Directions:
    masks = {name: rows(found, "discover", name) for name in CLASSES}
    means = {name: found.last[part][mask].mean(0, dtype=float) if mask.any() else None for name, mask in masks.items()}
    return Directions(part, **means, counts={name: int(mask.sum()) for name, mask in masks.items()})


def need(found: Fit, *names: str) -> None:
    """`InputError` that says what to supply, if one of these classes has no prompt in discover."""
    for name in names:
        if not rows(found, "discover", name).any():
            raise InputError(SUPPLY[name])


def rejection(found: Fit, part: str = "resid_post") -> Float[np.ndarray, "layer width"]:
    """v_R of every layer, its role and sign checked: refused prompts lie further along it than complied ones."""
    need(found, "refused", "complied")
    made = directions(found, part)
    assert made.rejection is not None and made.refused is not None and made.complied is not None
    gap = (made.rejection * (made.refused - made.complied)).sum(-1)
    assert (gap >= 0).all()
    if not gap.any():
        raise InputError("refused and complied harmful prompts have the same activations: are the labels right?")
    return made.rejection


def harmfulness(found: Fit, part: str = "resid_post") -> Float[np.ndarray, "layer width"]:
    """v_H of every layer, its role and sign checked: benign prompts lie further along it than complied harmful ones."""
    need(found, "benign", "complied")
    made = directions(found, part)
    assert made.harmfulness is not None and made.benign is not None and made.complied is not None
    gap = (made.harmfulness * (made.benign - made.complied)).sum(-1)
    assert (gap >= 0).all()
    if not gap.any():
        raise InputError("benign and complied harmful prompts have the same activations: are the labels right?")
    return made.harmfulness


def fit_of(found: Fit, places: np.ndarray) -> Fit:
    """The fit on some of its prompts (a mask, or indices with repeats), without reading them anew."""
    table = found.prompts.iloc[np.flatnonzero(places) if places.dtype == bool else places].reset_index(drop=True)
    last = {name: values[places] for name, values in found.last.items()}
    return replace(found, prompts=table, last=last, instruction=found.instruction[places])
