"""Relative depth: what "early" and "late" mean, for networks of any number of layers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

LATE, EARLY = 2 / 3, 1 / 3


def depth(layer: ArrayLike, n_layers: int) -> np.ndarray:
    """Relative depth of a layer's middle, in (0, 1).

    >>> depth(np.array([0, 5]), 6).round(3)
    array([0.083, 0.917])
    """
    return (np.asarray(layer) + 0.5) / n_layers


def deepest_early_layer(n_layers: int) -> int:
    """The last layer of depth < 1/3.

    >>> deepest_early_layer(6), deepest_early_layer(32)
    (1, 10)
    """
    return int(np.flatnonzero(depth(np.arange(n_layers), n_layers) < EARLY)[-1])


COMPUTED = "late share of what is computed"  # measured by `mediation.interaction`


POINTS = 2.0  # smallest harm change that counts, largest harmless loss, and how near counts as equal


MARGINS = {"KL": 0.02, "perplexity ratio": 1.01, "over-refusal": POINTS}


CARRIED = "share of MLPs"


CARRIED_OWN = "share of MLPs from this layer on"  # the hand-over layer's own MLP among them


KEPT = "share kept by the first token"


CONTENT = "content judge"  # the variant whose labels do not rest on an answer's opener


UNTRAINED = " (untrained)"  # behind a model's name: its untrained twin, a control


MIN_BENIGN = 5


MIN_JOINT = 0.8


COMPONENTS = ("attn_out", "mlp_out")


MIN_TOTAL_EFFECT = 0.5


SATURATED = 0.02


GATE_LOW, GATE_HIGH = 0.6, 0.2


READOUT = 0.5  # ours: a set that writes half of its effect itself is a readout


BENIGN_SHARE, PERPLEXITY = 0.20, 1.01


MIN_TOPICS = 20


FLOAT32_BITS = 24


# What every claim on generation reads without T2, wherever it is said.
NO_WRAPPERS = (
    "not testable: no jailbreak wrapper; supply pairs of treatment T2 in the prompt set's folder, or for a public prompt "
    "set templates of your own with --wrappers FILE"
)
