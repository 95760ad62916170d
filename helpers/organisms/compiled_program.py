"""What a compiled model computes, in channels of its residual stream: heads that copy, neurons, and a read-out.

A program says everything about a model except how it is put into a real architecture (`compiled_weights`). Its
arithmetic is the truth (`compiled_truth`): channel `bias` is 1 there, and no norm divides by anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from jaxtyping import Float

from helpers.organisms.compiled_language import BEHAVIOURS

NOISE_FEATURES, NOISE_CHANNELS = 4, 6


def _names() -> list[str]:
    names = ["bias", "last", "end", "bos", "answering", "complied", "refused", "done"]
    names += ["is_wrapper", "wrapper", "is_verb", "verb", "is_object", "object", "object.side", "is_cue"]
    for stem in ("cue", "present"):
        names += [f"{stem}{b}.word" for b in range(BEHAVIOURS)]
    names += [f"feature{i}" for i in range(NOISE_FEATURES)]
    names += ["danger", "hazard", "harm", "danger.unused", "hazard.unused", "harm.unused"]
    names += ["jail", "jail.second", "stage0", "stage1", "stage2", "out"]
    names += ["hazard.side", "harm.side", "jail.side", "stage.side", "out.side"]
    for stem in ("cue", "present", "decided", "behaviour"):
        names += [f"{stem}{b}" for b in range(BEHAVIOURS)]
    return [*names, *(f"noise{i}" for i in range(NOISE_CHANNELS))]


CHANNELS: Final = {name: i for i, name in enumerate(_names())}
WIDTH: Final = 80
HEAD_WIDTH: Final = 16
N_HEADS: Final = WIDTH // HEAD_WIDTH
assert len(CHANNELS) <= WIDTH

Look = Literal["wrapper", "verb", "object", "cue", "end", "mean", "conjunction"]
Channels = Float[np.ndarray, "channel"]


def channel(weights: Mapping[str, float]) -> Channels:
    """A vector over channels.

    >>> float(channel({"bias": 2.0}).sum())
    2.0
    """
    vector = np.zeros(WIDTH)
    for name, weight in weights.items():
        vector[CHANNELS[name]] = weight
    return vector


@dataclass(frozen=True)
class Head:
    """One attention head: which token it looks for, what it reads there (`value`) and where it writes it (`out`).

    "mean" spreads over all tokens. "verb" and "object" take the most recent. "conjunction" looks at the wrapper as far
    as harm (with harm.side, at the query) times the wrapper's strength (at the key) exceeds `threshold`, else at the
    first token: the wrapper's score is `steep` harm strength, the first token's `steep threshold`, all others' 0.
    """

    layer: int
    look: Look
    value: Float[np.ndarray, "coordinate channel"]
    out: Float[np.ndarray, "channel coordinate"]
    steep: float = 0.0
    threshold: float = 0.0


@dataclass(frozen=True)
class Neurons:
    """One MLP: activation silu(gate . x) (up . x), output activation @ out."""

    gate: Float[np.ndarray, "neuron channel"]
    up: Float[np.ndarray, "neuron channel"]
    out: Float[np.ndarray, "neuron channel"]


@dataclass(frozen=True)
class Program:
    """A model in channels. `unembed` gives the logits of the words, `embed` their features (channel `bias` is 1)."""

    words: tuple[str, ...]
    embed: Float[np.ndarray, "word channel"]
    heads: tuple[Head, ...]
    mlps: tuple[Neurons, ...]
    unembed: Float[np.ndarray, "word channel"]

    @property
    def n_layers(self) -> int:
        """How many layers."""
        return len(self.mlps)

    def at(self, layer: int) -> list[Head]:
        """The heads of a layer, in their slots."""
        return [head for head in self.heads if head.layer == layer]


def copy(layer: int, look: Look, routes: Mapping[str, str]) -> Head:
    """A head that copies channels: `copy(2, "wrapper", {"wrapper": "jail"})` writes what it reads there into `jail`."""
    value = np.stack([channel({source: 1.0}) for source in routes])
    out = np.stack([channel({target: 1.0}) for target in routes.values()], axis=1)
    return Head(layer, look, value, out)
