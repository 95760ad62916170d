"""Evidence for C5b (a gate): which sets are tested, the four tests on them, and the table that names what each can show.

Fixed before the shipped models were measured: a sparse set has max(8, 1 % of the layer) neurons, the top of the
discover ranking; below the last layer the set of the layer with the largest index on discover is taken; the verdict reads
the sparse set that is not a readout on discover and, among such, has the largest index there (forms b and c); numbers
from test. One thing was added after a first look at the embedded model, with the thresholds unchanged: form b with the
harm signal switched by the twin (`gate_twins`), because a gate written by hand showed that within a pair an up-projection
that carries the harm never moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from helpers import bootstrap as bs
from helpers import evidence as levels
from helpers import gate_answers as answers
from helpers import gate_cells, gate_twins, gates, relatives
from helpers.errors import InputError
from helpers.evidence_rows import row
from helpers.gate_cells import NeuronSet
from helpers.gates import Index
from helpers.neurons import ranking
from helpers.study import Study

BENIGN_PAIRS = 60
ANSWER_PAIRS = 120
# By experiment (a form of `gate_cells.cells` or `gate_twins.cells`): what stands in the tables. Below the last layer the
# experiment "upstream" is form c.
FORMS = {
    "upstream": "a: last layer, upstream x set",
    "inside": "b: inside last-layer neurons, gate x up",
    gate_twins.WRAPPER_HARM: "b: inside last-layer neurons, gate by wrapper x up by harm",
    gate_twins.HARM_WRAPPER: "b: inside last-layer neurons, gate by harm x up by wrapper",
    "below": "c: below the last layer, upstream x set",
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


@dataclass(frozen=True)
class Gates:
    """What the four tests give for one model: cells, answer tables, sets by name, and the forms that are defined."""

    study: Study
    primary: str
    sets: dict[str, NeuronSet]
    cells: pd.DataFrame
    timing: pd.DataFrame
    cost: pd.DataFrame
    candidates: tuple[Candidate, ...]

    @property
    def headline(self) -> Candidate | None:
        """The form that the verdict reads, chosen on discover: b or c, not a readout if there is one, then the largest."""
        mine = [one for one in self.candidates if one.treatment == self.primary and one.set_name != WHOLE]
        usable = [one for one in mine if one.form in ("b", "c") and one.main.is_defined]
        return max(usable, key=lambda one: one.rank, default=None)


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


def measure(study: Study, table: pd.DataFrame) -> Gates:
    """The four tests on the sparse sets of a neuron table (`neurons.NEURONS`); validate pairs are not used.

    Raises InputError if the study has no jailbreak wrappers (T2), or no neuron of the last layer has an effect.
    """
    if not study.of("T2"):
        raise InputError("gates need pairs with a jailbreak wrapper (T2): supply some")
    study = replace(study, pairs=tuple(p for p in study.pairs if p.pair.split != "validate"))
    primary = "T2-T2b" if "T2-T2b" in set(table.treatment) else "T2"
    sets = sets_of(study, table, primary)
    if LAST not in sets:
        raise InputError("no effect reaches a neuron of the last layer: there is no set to test")
    subject, openers = study.subject, study.openers
    cells = gate_cells.cells(subject, study.of("T2", "T2b"), openers, list(sets.values()), (LAST, WHOLE))
    cells = gate_cells.difference(cells, study.twins)
    cells = pd.concat([cells, _twin_cells(study, sets, cells), *_benign_cells(study, table, sets)])
    found = Gates(study, primary, sets, cells, pd.DataFrame(), pd.DataFrame(), _candidates(cells, sets, primary))
    return _with_answers(found)


def _twin_cells(study: Study, sets: dict[str, NeuronSet], cells: pd.DataFrame) -> pd.DataFrame:
    """Gate against up with the harm signal switched by the twin; `te` becomes that of T2 - T2b."""
    split = [sets[LAST], sets[WHOLE]]
    made = gate_twins.cells(study.subject, study.of("T2", "T2b"), study.twins, study.openers, split)
    if made.empty:
        return made
    known = cells[(cells.treatment == "T2-T2b") & (cells["set"] == LAST) & (cells.form == "upstream")]
    keys = ["pair_id", "outcome"]
    return made.drop(columns="te").merge(known[[*keys, "te"]], on=keys, validate="many_to_one")


def _benign_cells(study: Study, table: pd.DataFrame, sets: dict[str, NeuronSet]) -> list[pd.DataFrame]:
    """The harm sets on benign pairs (specificity), and each behaviour's own sparse set (the index's reference)."""
    made = []
    thin = relatives.thinned(study, BENIGN_PAIRS)
    for name in (name for name in thin.treatments if name.startswith("B")):
        own = sets_of(study, table, name) if name in set(table.treatment) else {}
        every = [*sets.values(), *([replace(own[LAST], name=f"own {name}")] if LAST in own else [])]
        made.append(gate_cells.cells(study.subject, thin.of(name), study.openers, every, (f"own {name}",)))
    return made


def _candidates(cells: pd.DataFrame, sets: dict[str, NeuronSet], primary: str) -> tuple[Candidate, ...]:
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


def _with_answers(found: Gates) -> Gates:
    """Timing and perplexity for the last layer's sparse set and for the set that the verdict reads."""
    study, chosen = found.study, found.headline
    names = list(dict.fromkeys([LAST, *([chosen.set_name] if chosen else [])]))
    sets = [found.sets[name] for name in names]
    thin = relatives.thinned(study, ANSWER_PAIRS)
    harm = [pair for pair in thin.of("T2", "T2b") if pair.pair.split == "test"]
    timing = answers.timing(study.subject, harm, study.openers, sets) if harm else pd.DataFrame()
    timing = gate_cells.difference(timing, study.twins) if len(timing) else timing
    control = [pair for pair in thin.of("T2") if pair.pair.split == "discover"]
    benign = [p for p in relatives.thinned(study, BENIGN_PAIRS).pairs if p.pair.treatment.startswith("B")]
    benign = [pair for pair in benign if pair.pair.split == "test"]
    tables = [
        answers.closing_cost(
            study.subject, benign, study.openers, one, answers.closed_values(study.subject, control, one)
        )
        for one in sets
        if benign and control
    ]
    return replace(found, timing=timing, cost=pd.concat(tables) if tables else pd.DataFrame())


def gated_benign(found: Gates) -> list[str]:
    """Benign behaviours whose TE passes the gate on discover: only they have an effect to compare with."""
    discover = found.cells[(found.cells.split == "discover") & (found.cells.outcome == "Y1")]
    te = discover[discover.treatment.str.startswith("B")].groupby("treatment")["te"].mean()
    return sorted(te.index[te.abs() >= levels.GATE])


def evidence(found: Gates, model: str) -> list[dict[str, object]]:
    """Evidence rows of C5b: every form of the index, specificity, timing and readout; "gate index", main, is the headline."""
    rows: list[dict[str, object]] = []
    for one in found.candidates:
        where = "" if one.treatment == found.primary else f" {one.treatment}"
        label = FORMS[one.experiment] + (", whole layer" if one.set_name == WHOLE else "") + where
        rows += _index_rows(model, "gate index, form", label, one)
    chosen = found.headline
    if chosen:
        rows += _index_rows(model, "gate index", "main", chosen)
    for name in dict.fromkeys([LAST, *([chosen.set_name] if chosen else [])]):
        variant = "main" if chosen and name == chosen.set_name else "last layer"
        rows += _other_rows(found, model, name, variant)
    return rows


def _index_rows(model: str, quantity: str, variant: str, one: Candidate) -> list[dict[str, object]]:
    made = []
    note = (
        f"{'' if one.main.is_defined else 'not defined: too little at stake; '}{FORMS[one.experiment]}, {one.set_name}"
    )
    for label, index in {"main": one.main, **one.variants}.items():
        name = label if variant == "main" else variant + ("" if label == "main" else f", {label}")
        base = row(model, "C5b", quantity, name, index.signed, index.n_pairs) | {"note": note}
        ends = {"estimate": index.estimate, "ci_low": index.low, "ci_high": index.high}
        made += [base | ends, base | {"quantity": f"{quantity}, signed"}]
    return made


def _other_rows(found: Gates, model: str, name: str, variant: str) -> list[dict[str, object]]:
    benign = gated_benign(found)
    harm = gates.select(found.cells, found.primary, name, "upstream", "Y1", "test")
    measured: Sequence[tuple[str, bs.Estimates | None, int]] = (
        ("readout share", gates.readout_share(found.cells, found.primary, name), len(harm)),
        ("benign share", gates.benign_share(found.cells, found.primary, name, benign), len(harm)),
        ("perplexity ratio", gates.perplexity_ratio(found.cost, name) if len(found.cost) else None, len(found.cost)),
        ("timing share", gates.timing_share(found.timing, found.primary, name) if len(found.timing) else None,
         len(found.timing[found.timing.treatment == found.primary]) if len(found.timing) else 0),
    )  # fmt: skip
    note = f"{len(benign)} benign behaviours; {name}"
    return [
        row(model, "C5b", quantity, variant, estimates, n) | {"note": note}
        for quantity, estimates, n in measured
        if estimates is not None
    ]
