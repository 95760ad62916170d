"""The analyses of notebooks 02, 04 and 05 on one relative of a model, from the study of the model itself.

Each is one call that can be handed to `beside.start`: it needs nothing that a notebook finds on its way. `label` is one of
`relatives.labels`.
"""

from __future__ import annotations

import pandas as pd

from helpers import gate_evidence, neuron_evidence, origin, relatives, token_evidence
from helpers.study import Layers, Study, measure_layers

Rows = list[dict[str, object]]


def layers(study: Study, model: str, label: str) -> Layers:
    """The layer sweep with direct effects."""
    return measure_layers(relatives.member(study, model, label), label, direct=True)


def computed(study: Study, model: str, label: str) -> pd.DataFrame:
    """Where it computes the decision (`origin.effects`)."""
    return origin.effects(relatives.member(study, model, label))


def neurons(study: Study, model: str, label: str) -> tuple[Rows, Rows]:
    """Evidence rows on C5a and C7, and on C5b. One sweep serves both."""
    swept = neuron_evidence.quick(relatives.member(study, model, label))
    gates = [] if swept is None else gate_evidence.evidence(swept.measured.study, swept.table, label, swept.ends)
    return neuron_evidence.evidence(swept, label), gates


def tokens(study: Study, model: str, label: str) -> Rows:
    """Evidence rows on C4 and C5c."""
    return token_evidence.evidence(relatives.member(study, model, label), label)
