"""The list of all figures, in the order of the notebooks."""

from __future__ import annotations

from helpers import figures_layers

SPECS = tuple(sorted(figures_layers.SPECS, key=lambda spec: spec.name[:2]))
