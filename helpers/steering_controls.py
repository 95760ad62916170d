"""Controls of a steering: what a defence must beat before its direction, its layers or its gate get the credit."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from helpers import defence_outcomes, steering_budget
from helpers import steering_fit as sf
from helpers import steering_methods as sm
from helpers.errors import InputError
from helpers.steering import Edit, Part, Read, Steering
from helpers.steering_fit import Fit
from helpers.steering_prompt import Prompt


def random_isotropic(fit: Fit, strength: float = 1.0, *, like: Steering, seed: int = 0) -> Steering:
    """A direction drawn uniformly from the sphere at every site of `like`, with its gate, layers and tokens.

    Each vector has the length of the site's rejection vector; `to_budget` makes the budgets equal.
    """
    return _random(fit, strength, like, seed, "isotropic")


def random_covariance(fit: Fit, strength: float = 1.0, *, like: Steering, seed: int = 0) -> Steering:
    """The same, drawn from the covariance of benign activations at the site: a direction in which activations do vary."""
    sf.need(fit, "benign")
    return _random(fit, strength, like, seed, "covariance")


def _random(
    fit: Fit, strength: float, like: Steering, seed: int, family: Literal["isotropic", "covariance"]
) -> Steering:
    if not like.edits:
        raise InputError(
            f"{like.name} edits nothing, so it has no site for a random direction; pass a method that edits"
        )
    rng = np.random.default_rng(seed)
    edits = []
    for edit in like.edits:
        layer = fit.neuron_layers.index(edit.layer) if edit.part == "neurons" else edit.layer
        drawn: np.ndarray
        if family == "isotropic":
            drawn = np.asarray(rng.standard_normal(fit.last[edit.part].shape[-1]))
        else:
            centred = _centred(fit, edit.part, layer)
            drawn = rng.standard_normal(len(centred)) @ centred
        size = np.linalg.norm(sf.rejection(fit, edit.part)[layer])
        edits.append(Edit(edit.layer, edit.part, sm.constant(sm.unit(drawn) * size), edit.where, blind=True))
    return replace(like, name=f"random {family} {seed}", edits=tuple(edits), strength=strength)


@lru_cache(maxsize=32)  # a hundred directions are drawn at the same few sites
def _centred(fit: Fit, part: Part, layer: int) -> Float[np.ndarray, "prompt width"]:
    benign = fit.last[part][sf.rows(fit, "discover", "benign"), layer].astype(float)
    made: np.ndarray = benign - benign.mean(0)
    return made


def elsewhere(fit: Fit, strength: float = 1.0, *, layers: Collection[int], like: Steering | None = None) -> Steering:
    """A steering at layers of the caller's choice: those that mediate nothing, or early or middle ones.

    Without `like` it is the fixed rejection vector that was fitted at those layers. With it, what `like` adds is added there
    instead, lowest layer to lowest: the same vectors, coefficients and gate, so that nothing differs but the place.
    What it reads of a prompt it reads from an unsteered pass, which no edit can change.

    Raises:
        InputError: `like` steers another number of layers.
    """
    at = sorted(set(layers))
    name = " at layers " + ", ".join(map(str, at))
    if like is None:
        return replace(sm.fixed(fit, strength, layers=at), name=f"fixed{name}")
    own = sorted({edit.layer for edit in like.edits})
    if len(own) != len(at):
        raise InputError(f"{like.name} steers {len(own)} layers; expected as many to move it to, not {len(at)}")
    to = dict(zip(own, at, strict=True))
    edits = tuple(replace(edit, layer=to[edit.layer]) for edit in like.edits)
    reads = tuple(replace(read, plain=True) for read in like.reads)
    return replace(like, name=f"{like.name}{name}", edits=edits, reads=reads, strength=strength)


def shuffled_gate(fit: Fit, strength: float = 1.0, *, steering: Steering, seed: int = 0) -> Steering:
    """The steering with a gate that opens as far and as often as its own on validate, but for the wrong prompts.

    A prompt's value is drawn from the gate's values on validate by a number made from its token ids, so it stays the same
    in every batch and on every run.
    """
    texts = fit.prompts.text[sf.rows(fit, "validate")].tolist()
    if not texts or steering.gate is None:
        raise InputError(f"{steering.name} has no gate to shuffle, or validate has no prompt to take its values from")
    values = np.sort(steering_budget.gate_values(fit.subject, steering, texts))
    gate = partial(_drawn, values, seed)
    return replace(
        steering, name=f"{steering.name}, shuffled gate", strength=strength, gate=gate, reads=_ungated(steering)
    )


def oracle_gate(fit: Fit, strength: float = 1.0, *, steering: Steering, harmful: Sequence[str]) -> Steering:
    """The steering with a gate that knows: 1 for these user turns, 0 for all others. An upper bound, not a defence."""
    known = frozenset(tuple(map(int, defence_outcomes.encode(fit.subject, text))) for text in harmful)
    gate = partial(_known, known)
    return replace(
        steering, name=f"{steering.name}, oracle gate", strength=strength, gate=gate, reads=_ungated(steering)
    )


def _ungated(steering: Steering) -> tuple[Read, ...]:
    """What an adaptive steering's edits may still read; names of gates are dropped."""
    return tuple(read for read in steering.reads if read.name not in ("gate", "condition"))


def _rows(prompt: Prompt) -> list[tuple[int, ...]]:
    return [tuple(map(int, ids[real])) for ids, real in zip(prompt.ids.cpu(), prompt.real.cpu(), strict=True)]


def _drawn(values: np.ndarray, seed: int, prompt: Prompt) -> Float[torch.Tensor, "prompt"]:
    chosen = []
    for ids in _rows(prompt):
        digest = hashlib.sha256(f"{seed} {ids}".encode()).digest()
        chosen.append(values[int.from_bytes(digest[:8], "big") * len(values) >> 64])
    return torch.tensor(chosen, device=prompt.ids.device, dtype=torch.float32)


def _known(known: frozenset[tuple[int, ...]], prompt: Prompt) -> Float[torch.Tensor, "prompt"]:
    return torch.tensor([float(ids in known) for ids in _rows(prompt)], device=prompt.ids.device)
