"""Evidence for C5b (a gate): which sets are tested, the four tests on them, and the table that names what each can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from companion.base import thresholds
from companion.base.errors import InputError
from companion.mediation.estimands import with_difference
from companion.mediation.study import Study
from companion.neurons import clamping, gating
from companion.neurons.clamping import LastLayerCache, NeuronSet
from companion.neurons.gating import FORMS, LAST, WHOLE, Candidate, candidates, sets_of
from companion.prompts.tokens import TokenPair
from companion.stats import bootstrap
from companion.stats.bootstrap import row

BENIGN_PAIRS = 48


ANSWER_PAIRS = 120


NAMES = ("topic", "treatment", "split", "set", "form", "outcome")


class NothingToTest(InputError):
    """The study holds no set of neurons of which one could ask whether it is a gate."""


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


def measure_gates(study: Study, table: pd.DataFrame, ends: Mapping[str, LastLayerCache] | None = None) -> Gates:
    """The four tests on the sparse sets of a neuron table (`single.NEURONS`); validate pairs are not used.

    `ends` of the study's own pairs (`neurons.quick`) save the runs where every set is of the last layer.

    Raises NothingToTest (an InputError) if the study has no jailbreak wrappers (T2), or no effect in the last layer.
    """
    if not study.of("T2"):
        raise NothingToTest(thresholds.NO_WRAPPERS)
    study = replace(study, pairs=tuple(p for p in study.pairs if p.pair.split != "validate"))
    primary = "T2-T2b" if "T2-T2b" in set(table.treatment) else "T2"
    sets = sets_of(study, table, primary)
    if LAST not in sets:
        raise NothingToTest("no effect reaches a neuron of the last layer: there is no set to test")
    cells, ends = _harm_cells(study, sets, _usable(study, sets, ends))
    cells = with_difference(cells, study.twins)
    cells = pd.concat([cells, _twin_cells(study, sets, cells, ends), *_benign_cells(study, table, sets, ends)])
    cells = cells.astype(dict.fromkeys(NAMES, "category"))  # rows are chosen by them again and again
    found = Gates(study, primary, sets, cells, pd.DataFrame(), pd.DataFrame(), candidates(cells, sets, primary))
    return _with_answers(found)


def _usable(
    study: Study, sets: dict[str, NeuronSet], ends: Mapping[str, LastLayerCache] | None
) -> dict[str, LastLayerCache]:
    """The ends of treatments of which every pair is in them, if no set needs more."""
    if ends is None or any(one.layer < study.subject.n_layers - 1 for one in sets.values()):
        return {}
    wanted = {name: {pair.pair.id for pair in _pairs(study, name)} for name in study.treatments}
    return {
        name: end for name, end in ends.items() if {pair.pair.id for pair in end.batch.pairs} == wanted.get(name, set())
    }


def _pairs(study: Study, treatment: str) -> list[TokenPair]:
    return (study.subsample(BENIGN_PAIRS) if treatment.startswith("B") else study).of(treatment)


def _harm_cells(
    study: Study, sets: dict[str, NeuronSet], known: dict[str, LastLayerCache]
) -> tuple[pd.DataFrame, dict[str, LastLayerCache]]:
    subject, openers, every, inside = study.subject, study.openers, list(sets.values()), (LAST, WHOLE)
    present = [name for name in ("T2", "T2b") if study.of(name)]
    if not set(present) <= set(known):
        cells, ends = clamping.measured(subject, study.of("T2", "T2b"), openers, every, inside)
        return cells, known | ends
    tables = [clamping.of_end(subject, known[name], openers[name], every, inside) for name in present]
    return pd.concat(tables, ignore_index=True), known


def _twin_cells(
    study: Study, sets: dict[str, NeuronSet], cells: pd.DataFrame, ends: dict[str, LastLayerCache]
) -> pd.DataFrame:
    """Gate against up with the harm signal switched by the twin; `te` becomes that of T2 - T2b."""
    split = [sets[LAST], sets[WHOLE]]
    made = gating.cells(study.subject, ends, study.twins, study.openers, split)
    if made.empty:
        return made
    known = cells[(cells.treatment == "T2-T2b") & (cells["set"] == LAST) & (cells.form == "upstream")]
    keys = ["pair_id", "outcome"]
    return made.drop(columns="te").merge(known[[*keys, "te"]], on=keys, validate="many_to_one")


def _benign_cells(
    study: Study, table: pd.DataFrame, sets: dict[str, NeuronSet], ends: dict[str, LastLayerCache]
) -> list[pd.DataFrame]:
    """The harm sets on benign pairs (specificity), and each behaviour's own sparse set (the index's reference)."""
    made, subject, openers = [], study.subject, study.openers
    for name in (name for name in study.treatments if name.startswith("B")):
        own = sets_of(study, table, name) if name in set(table.treatment) else {}
        every = [*sets.values(), *([replace(own[LAST], name=f"own {name}")] if LAST in own else [])]
        if name in ends:
            made.append(clamping.of_end(subject, ends[name], openers[name], every, (f"own {name}",)))
        else:
            made.append(clamping.cells(subject, _pairs(study, name), openers, every, (f"own {name}",)))
    return made


def _with_answers(found: Gates) -> Gates:
    """Timing and perplexity for the last layer's sparse set and for the set that the verdict reads."""
    study, chosen = found.study, found.headline
    names = list(dict.fromkeys([LAST, *([chosen.set_name] if chosen else [])]))
    sets = [found.sets[name] for name in names]
    thin = study.subsample(ANSWER_PAIRS)
    harm = [pair for pair in thin.of("T2", "T2b") if pair.pair.split == "test"]
    timing = clamping.timing(study.subject, harm, study.openers, sets) if harm else pd.DataFrame()
    timing = with_difference(timing, study.twins) if len(timing) else timing
    control = [pair for pair in thin.of("T2") if pair.pair.split == "discover"]
    benign = [p for p in study.subsample(BENIGN_PAIRS).pairs if p.pair.treatment.startswith("B")]
    benign = [pair for pair in benign if pair.pair.split == "test"]
    cost = pd.DataFrame()
    if benign and control:
        closed = clamping.closed_values(study.subject, control, sets)
        cost = clamping.closing_cost(study.subject, benign, study.openers, closed)
    return replace(found, timing=timing, cost=cost)


def gated_benign(found: Gates) -> list[str]:
    """Benign behaviours whose TE passes the gate on discover: only they have an effect to compare with."""
    discover = found.cells[(found.cells.split == "discover") & (found.cells.outcome == "Y1")]
    te = discover[discover.treatment.str.startswith("B")].groupby("treatment")["te"].mean()
    return sorted(te.index[te.abs() >= thresholds.MIN_TOTAL_EFFECT])


def gating_evidence(
    study: Study, table: pd.DataFrame, model: str, ends: Mapping[str, LastLayerCache] | None = None
) -> list[dict[str, object]]:
    """Evidence rows for C5b of any study, from its neuron table; none where it has no T2 pairs or no set to test."""
    try:
        return evidence_c5b(measure_gates(study, table, ends), model)
    except NothingToTest:
        return []


def evidence_c5b(found: Gates, model: str) -> list[dict[str, object]]:
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
    harm = gating.select(found.cells, found.primary, name, "upstream", "Y1", "test")
    measured: Sequence[tuple[str, bootstrap.Estimates | None, int]] = (
        ("readout share", gating.readout_share(found.cells, found.primary, name), len(harm)),
        ("benign share", gating.benign_share(found.cells, found.primary, name, benign), len(harm)),
        ("perplexity ratio", gating.perplexity_ratio(found.cost, name) if len(found.cost) else None, len(found.cost)),
        ("timing share", gating.timing_share(found.timing, found.primary, name) if len(found.timing) else None,
         len(found.timing[found.timing.treatment == found.primary]) if len(found.timing) else 0),
    )  # fmt: skip
    note = f"{len(benign)} benign behaviours; {name}"
    return [
        row(model, "C5b", quantity, variant, estimates, n) | {"note": note}
        for quantity, estimates, n in measured
        if estimates is not None
    ]
