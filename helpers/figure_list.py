"""The list of all figures, in the order of the notebooks."""

from __future__ import annotations

from helpers import (
    figures_calibration,
    figures_gates,
    figures_layers,
    figures_neurons,
    figures_steering,
    figures_tokens,
)

SPECS = tuple(
    sorted(
        (
            *figures_layers.SPECS,
            *figures_neurons.SPECS,
            *figures_gates.SPECS,
            *figures_tokens.SPECS,
            *figures_steering.SPECS,
            *figures_calibration.SPECS,
        ),
        key=lambda spec: spec.name[:2],
    )
)
