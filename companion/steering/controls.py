"""Controls of a steering: what a defence must beat before its direction, its layers or its gate get the credit.

Each keeps all of the tested steering but one thing: the direction (drawn at random), the layers, or the gate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from companion.base.display import NotDefined
from companion.generation import forward
from companion.generation.hooks import Edit, Opening, Part, Prompt, Steering
from companion.steering import budget, methods
from companion.steering.budget import EvaluationPrompts
from companion.steering.experiment import SteeringExperiment
from companion.steering.extraction import Fit

FAMILIES: Final = ("isotropic", "covariance-matched")


def random_direction(fit: Fit, family: str, *, like: Steering, seed: int = 0) -> Steering:
    """A random direction at every site of `like`, with its gate, layers, tokens and strength.

    "isotropic" is drawn uniformly from the sphere, "covariance-matched" from the covariance of benign activations at the
    site: a direction in which activations do vary. Each vector has the length of the site's rejection vector.
    """
    rng = np.random.default_rng(seed)
    edits = []
    for edit in like.edits:
        layer = fit.neuron_layers.index(edit.layer) if edit.part == "neurons" else edit.layer
        if family == "isotropic":
            drawn = np.asarray(rng.standard_normal(fit.last[edit.part].shape[-1]))
        else:
            centred = _centred(fit, edit.part, layer)
            drawn = rng.standard_normal(len(centred)) @ centred
        size = np.linalg.norm(fit.rejection(edit.part)[layer])
        edits.append(Edit(edit.layer, edit.part, methods.constant(methods.unit(drawn) * size), edit.where, blind=True))
    return replace(like, name=f"random {family} {seed}", edits=tuple(edits))


@lru_cache(maxsize=32)  # a hundred directions are drawn at the same few sites
def _centred(fit: Fit, part: Part, layer: int) -> Float[np.ndarray, "prompt width"]:
    fit.need("benign")
    benign = fit.last[part][fit.mask("discover", "benign"), layer].astype(float)
    return benign - benign.mean(0)


def random_null(
    fit: Fit, tested: Steering, evaluation: EvaluationPrompts, spend: EvaluationPrompts, draws: int
) -> pd.DataFrame:
    """A row a direction: family, role ("random", or the tested method's name), value (fall of the log-odds on `evaluation`).

    Every random direction is added at the tested method's sites, to every prompt, and spends its budget (on `spend`). No
    rows where the method adds nothing there: then nothing has its size.
    """

    def falls(steered: Sequence[Steering]) -> list[float]:
        """Mean fall of the log-odds of complying under each steering."""
        found = evaluation.experiment.first_tokens(evaluation.harmful, steered)
        return [float((evaluation.harmful.log_odds.to_numpy() - one.log_odds.to_numpy()).mean()) for one in found]

    (target,), own = spend.budgets([tested]), falls([tested])
    rows = []
    for family in FAMILIES if target else ():
        like = replace(tested, strength=1.0)
        first, *others = (random_direction(fit, family, like=like, seed=seed) for seed in range(draws))
        # Draws of a family have one norm, so the strength that spends the budget is the same for all of them.
        (met,) = budget.to_budgets(fit.subject, first, spend.mixed, [target])
        assert isinstance(met, Steering)  # a constant vector: what is added grows with the strength
        drawn = falls([met, *(replace(one, strength=met.strength) for one in others)])
        rows += [(family, tested.name, own[0]), *((family, "random", value) for value in drawn)]
    return pd.DataFrame(rows, columns=["family", "role", "value"])


def elsewhere(like: Steering, layers: Collection[int]) -> Steering | NotDefined:
    """What a steering adds, at layers of the caller's choice: those that mediate nothing, or early or middle ones.

    Lowest layer goes to lowest, with the same vectors, coefficients and gate, so that nothing differs but the place. What it
    reads of a prompt it reads from an unsteered pass, which no edit can change. Not defined for another number of layers.
    """
    own, at = sorted({edit.layer for edit in like.edits}), sorted(set(layers))
    if len(own) != len(at):
        return NotDefined(f"{like.name} steers {len(own)} layers; expected as many to move it to, not {len(at)}")
    to = dict(zip(own, at, strict=True))
    edits = tuple(replace(edit, layer=to[edit.layer]) for edit in like.edits)
    reads = tuple(replace(read, plain=True) for read in like.reads)
    return replace(like, name=f"{like.name} at layers {', '.join(map(str, at))}", edits=edits, reads=reads)


def shuffled_gate(fit: Fit, steering: Steering) -> Steering:
    """The steering with a gate that opens as far and as often as its own on validate, but for the wrong prompts.

    A prompt's value is drawn from the gate's values on validate by a number made from its token ids, so it stays the same
    in every batch and on every run.
    """
    texts = fit.prompts.text[fit.mask("validate")].tolist()
    values = np.sort(budget.gate_values(fit.subject, steering, texts))

    def drawn(prompt: Prompt) -> Float[torch.Tensor, "prompt"]:
        digests = [hashlib.sha256(f"0 {ids}".encode()).digest() for ids in _token_rows(prompt)]
        chosen = [values[int.from_bytes(digest[:8], "big") * len(values) >> 64] for digest in digests]
        return torch.tensor(chosen, device=prompt.ids.device, dtype=torch.float32)

    return _with_gate(steering, "shuffled", drawn)


def oracle_gate(fit: Fit, steering: Steering, harmful: Sequence[str]) -> Steering:
    """The steering with a gate that knows: 1 for these user turns, 0 for all others. An upper bound, not a defence."""
    known = frozenset(tuple(map(int, forward.encode(fit.subject, text))) for text in harmful)

    def is_known(prompt: Prompt) -> Float[torch.Tensor, "prompt"]:
        return torch.tensor([float(ids in known) for ids in _token_rows(prompt)], device=prompt.ids.device)

    return _with_gate(steering, "oracle", is_known)


def gate_controls(
    experiment: SteeringExperiment, chosen: Mapping[str, Steering], names: Sequence[str]
) -> dict[str, Steering]:
    """Those of the named methods that have a gate, with a shuffled and with an oracle gate, at their chosen strength."""
    harmful = experiment.prompts.text[experiment.prompts.kind == "harmful"].tolist()
    made = {}
    for name in names:
        one = chosen.get(name)
        if one is not None and one.gate is not None:
            made[f"{name}, shuffled gate"] = shuffled_gate(experiment.fit, one)
            made[f"{name}, oracle gate"] = oracle_gate(experiment.fit, one, harmful)
    return {name: replace(one, name=name) for name, one in made.items()}


def _with_gate(steering: Steering, which: str, gate: Opening) -> Steering:
    """Another gate; what an adaptive steering's edits read stays, names of gates are dropped."""
    reads = tuple(read for read in steering.reads if read.name not in ("gate", "condition"))
    return replace(steering, name=f"{steering.name}, {which} gate", gate=gate, reads=reads)


def _token_rows(prompt: Prompt) -> list[tuple[int, ...]]:
    return [tuple(map(int, ids[real])) for ids, real in zip(prompt.ids.cpu(), prompt.real.cpu(), strict=True)]
