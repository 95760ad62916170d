"""Relative depth: what "early" and "late" mean, for networks of any number of layers."""

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
