"""The pipeline of notebooks 02 to 06 in one call: all evidence rows of any study, from the functions that they call.

Pairs of the validate split are left out where no rule reads them: they only choose how many neurons notebook 05 clamps.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import pandas as pd

from companion.base.files import EVIDENCE
from companion.base.thresholds import UNTRAINED
from companion.evidence import layers, steering, tokens
from companion.evidence.layers import EvidenceRows, Layers
from companion.evidence.neurons import Neurons, gating_evidence, measure_neurons, neuron_evidence
from companion.mediation import estimands, mechanisms, sweeps
from companion.mediation.study import CONTROL_PAIRS, Study, normalisations
from companion.model.load import untrained_twin
from companion.steering.prompts import Prompts

# What is measured together, and the claims that it is measured for.
STAGES = {
    "context": ("C3",), "layers": ("C1", "C2", "C4"), "timing": ("C5c",), "neurons": ("C5a", "C5b", "C7"), "steering": ("C6",)
}  # fmt: skip
KEYS = ["model", "claim", "quantity", "variant"]


@dataclass(frozen=True)
class Measured:
    """Evidence rows (`files.EVIDENCE`) with the tables behind them, for whoever compares estimators."""

    rows: pd.DataFrame
    layers: Layers | None
    neurons: Neurons | None
    computed: pd.DataFrame | None  # effects of what each component computes (`mechanisms`)


def measure_study(
    this: Study, label: str, stages: Collection[str] = tuple(STAGES), *, full_response: bool = False,
    prompt_set: Prompts | None = None,
) -> Measured:  # fmt: skip
    """Evidence rows under a model label, with those of the untrained twin behind them, for some stages.

    `full_response` adds Y2, which no verdict rests on. Steering asks for the `prompt_set`, whose suites it is tried on,
    and is judged by the study's judge. Every stage has the preconditions of the treatments that its rules ask about.
    """
    core = replace(this, pairs=tuple(pair for pair in this.pairs if pair.pair.split != "validate"))
    harm = replace(core, pairs=tuple(pair for pair in core.pairs if pair.pair.treatment != "T1"))
    rows: EvidenceRows = []
    swept = neurons = computed = None
    if "layers" in stages:
        swept = layers.measure_layers(harm, label, full_response=full_response, direct=True)
        rows += swept.evidence + layers.evidence_c2(swept.effects, swept.effects, label, normalisations(harm))
        computed = mechanisms.interaction_effects(core)
        rows += layers.evidence_c1_computed(computed, label, core.subject.n_layers)
        # Without T1: the one control that reads a twin is that of C1.
        thin = harm.subsample(CONTROL_PAIRS)
        rows += layers.measure_layers(replace(thin, subject=untrained_twin(harm.subject)), label + UNTRAINED).evidence
        rows += tokens.measure_c4(this, label)
    elif {"timing", "neurons", "steering"} & set(stages):
        clean = estimands.with_difference(sweeps.clean_outcomes(harm), core.twins)
        rows += layers.precondition_rows(clean, label, core.subject.n_layers)
    if "context" in stages and core.of("T1"):
        rows += layers.measure_layers(replace(core, pairs=tuple(core.of("T1")), twins={}), label).evidence
    if "timing" in stages:
        rows += tokens.evidence_c5c(tokens.measure_timing(this), label)
    if "neurons" in stages:
        neurons = measure_neurons(core)
        rows += neuron_evidence(neurons, label) + gating_evidence(core, neurons.table, label)
    if "steering" in stages and prompt_set is not None:
        rows += [{"model": label, **row} for row in steering.steering_evidence(this, prompt_set)]
    table = pd.DataFrame(rows, columns=list(EVIDENCE)).drop_duplicates(KEYS, ignore_index=True)
    return Measured(table, swept, neurons, computed)
