"""Evidence for C5b (a gate): which sets are tested, the four tests on them, and the rows that say what each can show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd

from companion.base import thresholds
from companion.base.errors import InputError
from companion.evidence.layers import EvidenceRows
from companion.mediation.estimands import with_difference
from companion.mediation.study import Study
from companion.neurons import gating
from companion.neurons.clamping import LastLayerCache, NeuronSet, four_cells
from companion.neurons.gating import FORMS, LAST, WHOLE, GateForm, gate_forms, sets_of
from companion.neurons.timing import closed_values, closing_cost, timing_effects
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
    forms: tuple[GateForm, ...]

    @property
    def headline(self) -> GateForm | None:
        """The form that the verdict reads, chosen on discover: b or c, not a readout if there is one, then the largest."""
        mine = [one for one in self.forms if one.treatment == self.primary and one.set_name != WHOLE]
        usable = [one for one in mine if one.form in ("b", "c") and one.main.is_defined]
        return max(usable, key=lambda one: one.rank, default=None)

    @property
    def tested(self) -> list[str]:
        """Names of the sets that all four tests are made on: the last layer's sparse set, and the one that the verdict reads."""
        chosen = self.headline
        return list(dict.fromkeys([LAST, *([chosen.set_name] if chosen else [])]))


def measure_gates(study: Study, table: pd.DataFrame, caches: Mapping[str, LastLayerCache] | None = None) -> Gates:
    """The four tests on the sparse sets of a neuron table (`single.NEURONS`); validate pairs are not used.

    `caches` of the study's own pairs (`neurons.measure_last_layer`) save the runs where every set is of the last layer.

    Raises NothingToTest (an InputError) if the study has no jailbreak wrappers (T2), or no effect in the last layer.
    """
    if not study.of("T2"):
        raise NothingToTest(thresholds.NO_WRAPPERS)
    study = replace(study, pairs=tuple(p for p in study.pairs if p.pair.split != "validate"))
    primary = "T2-T2b" if "T2-T2b" in set(table.treatment) else "T2"
    sets = sets_of(study, table, primary)
    if LAST not in sets:
        raise NothingToTest("no effect reaches a neuron of the last layer: there is no set to test")
    known, every, harm = dict(caches or {}), list(sets.values()), study.of("T2", "T2b")
    cells = four_cells(study.subject, harm, study.openers, every, (LAST, WHOLE), known)
    cells = with_difference(cells, study.twins)
    cells = pd.concat([cells, _twin_cells(study, sets, cells, known), *_benign_cells(study, table, sets, known)])
    cells = cells.astype(dict.fromkeys(NAMES, "category"))  # rows are chosen by them again and again
    found = Gates(study, primary, sets, cells, pd.DataFrame(), pd.DataFrame(), gate_forms(cells, sets, primary))
    return _with_answers(found)


def _twin_cells(
    study: Study, sets: dict[str, NeuronSet], cells: pd.DataFrame, caches: Mapping[str, LastLayerCache]
) -> pd.DataFrame:
    """Gate against up with the harm signal switched by the twin; `te` becomes that of T2 - T2b."""
    made = gating.twin_cells(study.subject, caches, study.twins, study.openers, [sets[LAST], sets[WHOLE]])
    if made.empty:
        return made
    known = cells[(cells.treatment == "T2-T2b") & (cells["set"] == LAST) & (cells.form == "upstream")]
    keys = ["pair_id", "outcome"]
    return made.drop(columns="te").merge(known[[*keys, "te"]], on=keys, validate="many_to_one")


def _benign_cells(
    study: Study, table: pd.DataFrame, sets: dict[str, NeuronSet], caches: dict[str, LastLayerCache]
) -> list[pd.DataFrame]:
    """The harm sets on benign pairs (specificity), and each behaviour's own sparse set (the index's reference)."""
    made, thin = [], study.subsample(BENIGN_PAIRS)
    for name in (name for name in study.treatments if name.startswith("B")):
        own = sets_of(study, table, name) if name in set(table.treatment) else {}
        every = [*sets.values(), *([replace(own[LAST], name=f"own {name}")] if LAST in own else [])]
        made.append(four_cells(study.subject, thin.of(name), study.openers, every, (f"own {name}",), caches))
    return made


def _with_answers(found: Gates) -> Gates:
    """Timing and perplexity for the sets that all tests are made on."""
    study, sets = found.study, [found.sets[name] for name in found.tested]
    subject, openers, thin = study.subject, study.openers, study.subsample(ANSWER_PAIRS)
    harm = [pair for pair in thin.of("T2", "T2b") if pair.pair.split == "test"]
    timing, cost = pd.DataFrame(), pd.DataFrame()
    if harm:
        timing = with_difference(timing_effects(subject, harm, openers, sets), study.twins)
    control = [pair for pair in thin.of("T2") if pair.pair.split == "discover"]
    benign = [p for p in study.subsample(BENIGN_PAIRS).pairs if p.pair.treatment.startswith("B")]
    benign = [pair for pair in benign if pair.pair.split == "test"]
    if benign and control:
        closed = closed_values(subject, control, sets)
        cost = closing_cost(subject, benign, openers, closed)
    return replace(found, timing=timing, cost=cost)


def gating_evidence(
    study: Study, table: pd.DataFrame, model: str, caches: Mapping[str, LastLayerCache] | None = None
) -> EvidenceRows:
    """Evidence rows for C5b of any study, from its neuron table; none where it has no T2 pairs or no set to test."""
    try:
        return evidence_c5b(measure_gates(study, table, caches), model)
    except NothingToTest:
        return []


def evidence_c5b(found: Gates, model: str) -> EvidenceRows:
    """Evidence rows of C5b: every form of the index, specificity, timing and readout; "gate index", main, is the headline."""
    rows: EvidenceRows = []
    for one in found.forms:
        where = "" if one.treatment == found.primary else f" {one.treatment}"
        label = FORMS[one.experiment] + (", whole layer" if one.set_name == WHOLE else "") + where
        rows += _index_rows(model, "gate index, form", label, one)
    chosen = found.headline
    if chosen:
        rows += _index_rows(model, "gate index", "main", chosen)
    for name in found.tested:
        rows += _other_rows(found, model, name, "main" if chosen and name == chosen.set_name else "last layer")
    return rows


def _index_rows(model: str, quantity: str, variant: str, one: GateForm) -> EvidenceRows:
    made = []
    undefined = "" if one.main.is_defined else "not defined: too little at stake; "
    for label, index in {"main": one.main, **one.variants}.items():
        name = label if variant == "main" else variant + ("" if label == "main" else f", {label}")
        base = row(model, "C5b", quantity, name, index.signed, index.n_pairs)
        base["note"] = f"{undefined}{FORMS[one.experiment]}, {one.set_name}"
        size = {"estimate": index.estimate, "ci_low": index.low, "ci_high": index.high}
        made += [base | size, base | {"quantity": f"{quantity}, signed"}]
    return made


def _other_rows(found: Gates, model: str, name: str, variant: str) -> EvidenceRows:
    discover = found.cells[(found.cells.split == "discover") & (found.cells.outcome == "Y1")]
    te = discover[discover.treatment.str.startswith("B")].groupby("treatment")["te"].mean()
    # Only benign behaviours whose TE is large enough on discover have an effect to compare with.
    benign = sorted(te.index[te.abs() >= thresholds.MIN_TOTAL_EFFECT])
    n_harm = len(gating.select(found.cells, found.primary, name, "upstream", "Y1", "test"))
    measured: list[tuple[str, bootstrap.Estimates | None, int]] = [
        ("readout share", gating.readout_share(found.cells, found.primary, name), n_harm),
        ("benign share", gating.benign_share(found.cells, found.primary, name, benign), n_harm),
    ]
    if len(found.cost):
        measured.append(("perplexity ratio", gating.perplexity_ratio(found.cost, name), len(found.cost)))
    if len(found.timing):
        share, n = gating.timing_share(found.timing, found.primary, name), found.timing.treatment == found.primary
        measured.append(("timing share", share, int(n.sum())))
    note = {"note": f"{len(benign)} benign behaviours; {name}"}
    return [row(model, "C5b", quantity, variant, one, n) | note for quantity, one, n in measured if one is not None]
