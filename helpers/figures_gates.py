"""The figures of the section "gate or contributor" of notebook 04."""

from __future__ import annotations

from helpers import plots_gates
from helpers.figure_spec import ESTIMATE, FigureSpec

SPECS = (
    FigureSpec(
        "04_gate_drawing",
        plots_gates.drawing,
        "C5b",
        "Last-layer neurons only add to the residual stream; inside one neuron the gate multiplies the up-projection",
        {
            **dict.fromkeys(("panel", "kind", "text", "colour"), "str"),
            **dict.fromkeys(("x", "y", "to_x", "to_y"), "float"),
        },
    ),
    FigureSpec(
        "04_gate_forms",
        plots_gates.indices,
        "C5b",
        "Signed gate index of every form that is defined, for the harm contrast and for benign behaviours, by read-out",
        {"form": "str", "outcome": "str", **ESTIMATE},
    ),
)
