"""The figures of notebook 04."""

from __future__ import annotations

from helpers import plots_neurons
from helpers.figure_spec import ESTIMATE, FigureSpec

SPECS = (
    FigureSpec(
        "04_geometry",
        plots_neurons.geometry,
        "C5a",
        "One last-layer neuron's write added to the residual stream, both pulled back to a sphere by the final norm, "
        "and the read-out direction, in the plane of residual stream and write",
        {"item": "str", **dict.fromkeys(("x", "y", "to_x", "to_y"), "float")},
    ),
    FigureSpec(
        "04_neurons",
        plots_neurons.by_index,
        "C5a",
        "Exact indirect effect of every single neuron at the last token by layer and index, with intervals",
        {"layer": "int", "neuron": "int", "passes": "bool", **ESTIMATE},
    ),
    FigureSpec(
        "04_curves",
        plots_neurons.curves,
        "C5a",
        "Joint effect of the top k last-layer neurons as a share of the whole layer's, against random order and benign "
        "behaviours",
        {"panel": "str", "series": "str", "k": "int", **ESTIMATE},
    ),
    FigureSpec(
        "04_sparsity",
        plots_neurons.sparsity,
        "C5a",
        "k50 and k90 of the last layer for harm and for each benign behaviour",
        {"behaviour": "str", "quantity": "str", **ESTIMATE},
    ),
    FigureSpec(
        "04_adjacency",
        plots_neurons.adjacency,
        "C7",
        "Effects of single last-layer neurons and of windows of neighbours, in training order and after a permutation "
        "of the neurons that leaves the model's function as it was",
        {"order": "str", "place": "int", "name": "int", "single": "float", "window": "float"},
    ),
    FigureSpec(
        "04_moran",
        plots_neurons.permutations,
        "C7",
        "Moran's I of rank |effect| along the neuron index, against its values under permuted indices",
        dict.fromkeys(("start", "end", "count", "observed", "least", "most"), "float"),
    ),
)
