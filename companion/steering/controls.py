"""Controls of a steering: what a defence must beat before its direction, its layers or its gate get the credit.

Is a direction better than chance? The same sites and budget, directions drawn at random.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Final, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from companion.base.errors import InputError
from companion.generation import forward, outcomes
from companion.generation.hooks import Edit, Part, Prompt, Read, Steering
from companion.steering import budget, extraction, methods
from companion.steering.budget import EvaluationPrompts
from companion.steering.experiment import SteeringExperiment
from companion.steering.extraction import Fit


def random_isotropic(fit: Fit, strength: float = 1.0, *, like: Steering, seed: int = 0) -> Steering:
    """A direction drawn uniformly from the sphere at every site of `like`, with its gate, layers and tokens.

    Each vector has the length of the site's rejection vector; `to_budget` makes the budgets equal.
    """
    return _random(fit, strength, like, seed, "isotropic")


def random_covariance(fit: Fit, strength: float = 1.0, *, like: Steering, seed: int = 0) -> Steering:
    """The same, drawn from the covariance of benign activations at the site: a direction in which activations do vary."""
    extraction.need(fit, "benign")
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
        size = np.linalg.norm(extraction.rejection(fit, edit.part)[layer])
        edits.append(Edit(edit.layer, edit.part, methods.constant(methods.unit(drawn) * size), edit.where, blind=True))
    return replace(like, name=f"random {family} {seed}", edits=tuple(edits), strength=strength)


@lru_cache(maxsize=32)  # a hundred directions are drawn at the same few sites
def _centred(fit: Fit, part: Part, layer: int) -> Float[np.ndarray, "prompt width"]:
    benign = fit.last[part][extraction.rows(fit, "discover", "benign"), layer].astype(float)
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
        return replace(methods.fixed(fit, strength, layers=at), name=f"fixed{name}")
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
    texts = fit.prompts.text[extraction.rows(fit, "validate")].tolist()
    if not texts or steering.gate is None:
        raise InputError(f"{steering.name} has no gate to shuffle, or validate has no prompt to take its values from")
    values = np.sort(budget.gate_values(fit.subject, steering, texts))
    gate = partial(_drawn, values, seed)
    return replace(
        steering, name=f"{steering.name}, shuffled gate", strength=strength, gate=gate, reads=_ungated(steering)
    )


def oracle_gate(fit: Fit, strength: float = 1.0, *, steering: Steering, harmful: Sequence[str]) -> Steering:
    """The steering with a gate that knows: 1 for these user turns, 0 for all others. An upper bound, not a defence."""
    known = frozenset(tuple(map(int, forward.encode(fit.subject, text))) for text in harmful)
    gate = partial(_known, known)
    return replace(
        steering, name=f"{steering.name}, oracle gate", strength=strength, gate=gate, reads=_ungated(steering)
    )


def _ungated(steering: Steering) -> tuple[Read, ...]:
    """What an adaptive steering's edits may still read; names of gates are dropped."""
    return tuple(read for read in steering.reads if read.name not in ("gate", "condition"))


def _rows(prompt: Prompt) -> list[tuple[int, ...]]:
    return [tuple(map(int, ids[real])) for ids, real in zip(prompt.ids.cpu(), prompt.real.cpu(), strict=True)]


def _drawn(values: np.ndarray, seed: int, prompt: Prompt) -> Float[torch.Tensor, prompt]:
    chosen = []
    for ids in _rows(prompt):
        digest = hashlib.sha256(f"{seed} {ids}".encode()).digest()
        chosen.append(values[int.from_bytes(digest[:8], "big") * len(values) >> 64])
    return torch.tensor(chosen, device=prompt.ids.device, dtype=torch.float32)


def _known(known: frozenset[tuple[int, ...]], prompt: Prompt) -> Float[torch.Tensor, prompt]:
    return torch.tensor([float(ids in known) for ids in _rows(prompt)], device=prompt.ids.device)


FAMILIES: Final = {
    "isotropic": random_isotropic,
    "covariance-matched": random_covariance,
}


DRAWS: Final = 100


def falls(lab: SteeringExperiment, steered: Sequence[Steering], prompts: pd.DataFrame) -> list[float]:
    """Mean fall of the log-odds of complying on these prompts under each steering."""
    found = outcomes.log_odds_each(lab.subject, prompts.text, lab.openers, steered)
    return [float((prompts.log_odds.to_numpy() - one.log_odds.to_numpy()).mean()) for one in found]


def random_null(
    lab: SteeringExperiment,
    fit: Fit,
    tested: Steering,
    on: EvaluationPrompts,
    spend: EvaluationPrompts,
    draws: int = DRAWS,
) -> pd.DataFrame:
    """A row a direction: family, role ("random", or the tested method's name), value (fall of the log-odds on `on`).

    Every random direction is added at the tested method's sites, to every prompt, and spends its budget (on `spend`). No
    rows where the method adds nothing there: then nothing has its size.
    """
    target = budget.budget(lab, tested, spend)
    (own,) = falls(lab, [tested], on.harmful)
    rows: list[tuple[str, str, float]] = []
    for family, draw in FAMILIES.items() if target else ():
        rows.append((family, tested.name, own))
        make = partial(draw, fit, like=tested)
        # Draws of a family have one norm, so the strength that spends the budget is the same for all of them.
        strength = budget.at_budget(lab, make(seed=0), target, spend).strength
        drawn = falls(lab, [make(strength, seed=seed) for seed in range(draws)], on.harmful)
        rows += [(family, "random", value) for value in drawn]
    return pd.DataFrame(rows, columns=["family", "role", "value"])
