"""Gate or contributor: which sets of neurons are tested, in which forms, and which of them the verdict reads.

Fixed before the shipped models were measured: a sparse set has max(8, 1 % of the layer) neurons, the top of the
discover ranking; below the last layer the set of the layer with the largest index on discover is taken; the verdict reads
the sparse set that is not a readout on discover and, among such, has the largest index there (forms b and c); numbers
from test. Changed after a first look at the embedded model, with the thresholds unchanged: form b with the harm signal
switched by the twin was added (`gate_twins`), because a gate written by hand showed that within a pair an up-projection
that carries the harm never moves; and the whole last layer, which is not sparse, can no longer be what the verdict reads
(that "contradicted" needs its index low as well was so from the start). Neither changed the model's verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from helpers import gate_twins, gates
from helpers.gate_cells import NeuronSet
from helpers.gates import Index
from helpers.neurons import ranking
from helpers.study import Study

# By experiment (a form of `gate_cells.cells` or `gate_twins.cells`): what stands in the tables. Below the last layer the
# experiment "upstream" is form c.
FORMS = {
    "upstream": "a: last layer, prompt x set",
    "inside": "b: gate x up",
    gate_twins.WRAPPER_HARM: f"b: {gate_twins.WRAPPER_HARM}",
    gate_twins.HARM_WRAPPER: f"b: {gate_twins.HARM_WRAPPER}",
    "below": "c: below the last layer, prompt x set",
}
VARIANTS = {"main": "Y1", "norm frozen": "Y1.frozen", "linear read-out": "contrast.frozen"}
LAST, WHOLE = "last", "whole last layer"


@dataclass(frozen=True)
class Candidate:
    """A form of the index on the set that it was measured on, with what was seen on discover."""

    form: str
    experiment: str
    set_name: str
    treatment: str
    main: Index
    variants: Mapping[str, Index]
    discover: float
    readout_discover: float

    @property
    def rank(self) -> tuple[bool, float]:
        """What is chosen by, on discover: sets that are no readout first, then the larger index."""
        return (self.readout_discover < gates.READOUT, self.discover)


def sets_of(study: Study, table: pd.DataFrame, treatment: str) -> dict[str, NeuronSet]:
    """The sparse set of every layer that an effect reaches, by the discover ranking of a neuron table; and the last layer.

    Layers of which fewer neurons were measured than a sparse set has are left out.
    """
    size, last = gates.sparse_size(study.subject.d_mlp), study.subject.n_layers - 1
    rows = table[(table.treatment == treatment) & (table.split == "discover")]
    layers = rows.assign(moves=(rows.nie0 != 0) | (rows.nie1 != 0)).groupby("layer")["moves"].agg(["size", "any"])
    found = {}
    for layer in (int(layer) for layer in layers.index[layers["any"] & (layers["size"] >= size)]):
        chosen = tuple(int(neuron) for neuron in ranking(table, treatment, layer)[:size])
        name = LAST if layer == last else f"layer {layer}"
        found[name] = NeuronSet(name, layer, chosen)
    if LAST in found:
        found[WHOLE] = NeuronSet(WHOLE, last, tuple(range(study.subject.d_mlp)))
    return found


def candidates(cells: pd.DataFrame, sets: dict[str, NeuronSet], primary: str) -> tuple[Candidate, ...]:
    """Every form on the sets that it is for, and each benign behaviour's own set in forms a and b."""
    below = [name for name in sets if name not in (LAST, WHOLE)]
    found = [_candidate(cells, form, name, primary) for form in FORMS if form != "below" for name in (LAST, WHOLE)]
    lower = [one for name in below if (one := _candidate(cells, "below", name, primary))]
    best = max(lower, key=lambda one: (one.main.is_defined, *one.rank), default=None)
    benign = sorted(name for name in set(cells.treatment) if name.startswith("B"))
    own = [_candidate(cells, form, f"own {name}", name) for form in ("upstream", "inside") for name in benign]
    return tuple(one for one in (*found, best, *own) if one is not None)


def _candidate(cells: pd.DataFrame, form: str, name: str, treatment: str) -> Candidate | None:
    experiment = "upstream" if form == "below" else form
    parts = {label: gates.select(cells, treatment, name, experiment, outcome) for label, outcome in VARIANTS.items()}
    found = {label: index for label, part in parts.items() if (index := gates.gate_index(part)) is not None}
    main = found.pop("main", None)
    if main is None:
        return None
    discover = parts["main"][parts["main"].split == "discover"]
    size = abs(gates.interaction(discover).sum() / (discover.y11 - discover.y00).sum())
    readout = gates.readout_share(cells, treatment, name, "discover")
    share = np.inf if readout is None else float(readout.estimate[0])
    return Candidate(FORMS[form][0], form, name, treatment, main, found, float(size), share)
