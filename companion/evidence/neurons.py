"""Evidence on single neurons and sets of them: C5a (a sparse last layer), C5b (a gate) and C7 (adjacency)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Int

from companion.base import thresholds
from companion.base.display import NotDefined
from companion.base.thresholds import MIN_TOTAL_EFFECT
from companion.evidence.layers import EvidenceRows
from companion.mediation import summaries
from companion.mediation.estimands import with_difference
from companion.mediation.study import CONTROL_PAIRS, Study
from companion.neurons import adjacency, gating, screening, sets, single, timing
from companion.neurons.clamping import LastLayerCache, NeuronSet, four_cells
from companion.neurons.gating import FORMS, LAST, WHOLE, GateForm
from companion.neurons.sets import Measured, cumulative, measure_all, on_contrast, sizes, whole_layer
from companion.neurons.single import PairEffects, all_neurons, in_columns, in_split, ranking, signed
from companion.stats.bootstrap import exact_row, interval, row

N_RANDOM_ORDERS = {False: 10, True: 2}  # fewer where each pair is costly
BENIGN_PAIRS, BENIGN_PAIRS_QUICK, ANSWER_PAIRS = CONTROL_PAIRS, 48, 120
NO_SCREEN = NotDefined("Every neuron of this model was measured exactly: there is no screen.")
NOTHING = NotDefined("No neuron of the last layer has an effect, or a split has too few topics.")
DIRECTIONS = {"main": "nie", "sufficiency": "nie0", "necessity": "nie1"}


@dataclass(frozen=True)
class Neurons:
    """What the neuron sweep gives for one model."""

    measured: Measured
    table: pd.DataFrame
    screen: pd.Series | NotDefined

    @property
    def primary(self) -> str:
        """The treatment that stands for generation: see `summaries.primary`."""
        return summaries.primary(self.table)

    @property
    def benign(self) -> list[str]:
        """The benign behaviours whose TE is large enough on discover."""
        effects = self.measured.effects
        te = {name: in_split(effects[name], "discover").pairs.te.mean() for name in effects if name[0] == "B"}
        return sorted(name for name, value in te.items() if abs(value) >= MIN_TOTAL_EFFECT)


def measure_neurons(study: Study, layers: Sequence[int] | None = None) -> Neurons:
    """Measure the neurons of a study: generation treatments (T2, T2b) at every layer (or `layers`), others at the last.

    Where the model is small, all of them exactly; else the last layer, the top of a gradient screen and a random sample. Benign
    behaviours use fewer pairs; T1, which no claim needs, and validate are left out where each pair is costly.
    """
    study = study.judged
    subject, last = study.subject, all_neurons(study.subject, [study.subject.n_layers - 1])
    generation = [name for name in study.treatments if name in ("T2", "T2b")]
    is_exact = layers is not None or screening.is_small(subject)
    if is_exact:
        wide = all_neurons(subject, layers)
    else:
        name = "T2-T2b" if study.twins else (generation or [study.treatments[0]])[0]
        below = screening.below_the_last(study, name)
        n = screening.RECHECKED_SMOKE if study.is_quick else screening.RECHECKED[study.is_costly]
        chosen = screening.to_recheck(below, n, n)
        wide = pd.concat([last, chosen[["layer", "neuron"]]]).sort_values(["layer", "neuron"], ignore_index=True)
    columns = {name: wide if name in generation or not generation else last for name in study.treatments}
    if study.is_costly and generation:
        columns.pop("T1", None)
    measured = measure_all(_with_few_benign(study, BENIGN_PAIRS), columns)
    table = pd.concat([single.neuron_table(effects) for effects in measured.effects.values()], ignore_index=True)
    if is_exact:
        return Neurons(measured, table, NO_SCREEN)
    # How far the screen can be trusted, and its estimates behind the exact rows.
    effects = measured.effects[summaries.primary(table)]
    columns_of = chosen[["layer", "neuron"]]
    place = pd.MultiIndex.from_frame(effects.columns).get_indexer(pd.MultiIndex.from_frame(columns_of))
    values = {name: array[:, place] for name, array in effects.values.items()}
    trust = screening.screen_trust(chosen, replace(effects, columns=columns_of, values=values), len(below))
    guessed = screening.estimate_rows(below, chosen, effects)
    return Neurons(measured, pd.concat([table, guessed], ignore_index=True), trust)


def _with_few_benign(study: Study, n: int) -> Study:
    kept = {pair.pair.id for pair in study.thinned(n).pairs}
    return replace(study, pairs=tuple(p for p in study.pairs if p.pair.treatment[0] != "B" or p.pair.id in kept))


def curve(found: Neurons, treatment: str, order: Int[np.ndarray, "neuron"] | None = None) -> PairEffects:
    """Joint effects on test of the first k last-layer neurons of an order (by default the discover ranking), signed."""
    measured, subject = found.measured, found.measured.study.subject
    ranked = ranking(found.table, treatment, measured.last) if order is None else order
    ks = sizes(subject.d_mlp, sets.EVERY_COSTLY if measured.study.is_costly else sets.EVERY)
    return on_contrast(measured, treatment, "test", partial(cumulative, subject, order=ranked, ks=ks))


def enough(found: Neurons, treatment: str) -> bool:
    """Whether any neuron has an effect, and discover and test hold pairs of at least two topics each."""
    effects = found.measured.effects[treatment]
    n_topics = effects.pairs.groupby("split").topic.nunique()
    return bool(np.any(effects.nie)) and all(n_topics.get(split, 0) >= 2 for split in ("discover", "test"))


def all_curves(found: Neurons) -> dict[str, PairEffects] | NotDefined:
    """The curves of the primary treatment ("main"), of random orders (their mean), and of each benign behaviour by its name."""
    name = found.primary
    if not enough(found, name):
        return NOTHING
    benign = {other: curve(found, other) for other in found.benign if enough(found, other)}
    rng, study = np.random.default_rng(0), found.measured.study
    orders = [rng.permutation(study.subject.d_mlp) for _ in range(N_RANDOM_ORDERS[study.is_costly])]
    drawn = [curve(found, name, order) for order in orders]
    means = {value: np.mean([one.values[value] for one in drawn], axis=0) for value in drawn[0].values}
    return {"main": curve(found, name), "random order": replace(drawn[0], values=means), **benign}


def evidence_c5a(found: Neurons, model: str, made: Mapping[str, PairEffects] | NotDefined) -> EvidenceRows:
    """C5a, a sparse last layer: psi1 of its MLP; k50 and k90 of `all_curves`; how many neurons pass."""
    name, d_mlp = found.primary, found.measured.study.subject.d_mlp
    if isinstance(made, NotDefined) or name not in ("T2", "T2-T2b"):
        return []
    rows, tested = _psi_rows(found, model), made["main"].pairs
    for variant, value in DIRECTIONS.items():
        rows += _curve_rows(model, made["main"], d_mlp, variant, value)
    for other, one in made.items():
        if other != "main":
            variant, behind = ("main", f" {other}") if other in found.benign else (other, "")
            rows += _curve_rows(model, one, d_mlp, variant, behind=behind)
    last = found.table[(found.table.treatment == name) & (found.table.layer == found.measured.last)]
    passed = int(single.passing(last[last.split == "test"]).sum())
    size, counts = (len(tested), tested.topic.nunique()), {"neurons in the layer": d_mlp, "neurons that pass": passed}
    return rows + [exact_row(model, "C5a", label, value, *size) for label, value in counts.items()]


def _psi_rows(found: Neurons, model: str) -> EvidenceRows:
    """Share of TE that the whole last MLP is necessary (psi1) and sufficient (psi0) for, with robustness checks."""
    measured, rows = found.measured, []
    for variant, is_frozen in (("main", False), ("norm frozen", True), ("unsaturated", False)):
        apply = partial(whole_layer, measured.study.subject, is_frozen=is_frozen)
        test = on_contrast(measured, found.primary, "test", apply)
        keep = test.pairs.unsaturated.to_numpy() if variant == "unsaturated" else np.ones(len(test.pairs), bool)
        pairs = test.pairs[keep]
        for quantity, value in (("psi1", "nie1"), ("psi0", "nie0")) if pairs.topic.nunique() > 1 else ():
            both = np.column_stack([test.values[value][keep, 0], pairs.te])
            estimates = interval(sets.topic_sums(pairs, both), lambda total, count: total[:, :1] / total[:, 1:])
            rows.append(row(model, "C5a", quantity, variant, estimates, len(pairs)))
    return rows


def _curve_rows(
    model: str, one: PairEffects, d_mlp: int, variant: str, value: str = "nie", behind: str = ""
) -> EvidenceRows:
    """Rows of `curve_summary` but psi; none where the whole layer works against the treatment and no k settles."""
    found, kept = sets.curve_summary(one, value), [sets.SUMMARY.index(name) for name in ("k50", "k90")]
    kept = kept if found.estimate[kept[1]] <= d_mlp else []
    return [row(model, "C5a", sets.SUMMARY[i] + behind, variant, found, len(one.pairs), i) for i in kept]


def moran(found: Neurons) -> adjacency.MoranTest:
    """Moran's I of the primary treatment's effects on test, over all layers that were measured completely."""
    test = in_split(signed(found.measured.effects[found.primary]), "test")
    # Places in a sample say nothing about neighbours.
    is_whole = test.columns.groupby("layer").size() == found.measured.study.subject.d_mlp
    return adjacency.moran_test(in_columns(test, test.columns.layer.map(is_whole).to_numpy()))


def groups(found: Neurons) -> adjacency.WindowContest | None:
    """The best window against the best random groups; None where the layer is smaller than a window."""
    measured, name = found.measured, found.primary
    if measured.study.subject.d_mlp < 2 * adjacency.HALF_WIDTH + 1:
        return None
    return adjacency.window_contest(measured, name, ranking(found.table, name, measured.last))


def evidence_c7(
    found: Neurons, model: str, pooled: adjacency.MoranTest, best: adjacency.WindowContest | None
) -> EvidenceRows:
    """C7, related neurons are adjacent: rows of `moran` and of `groups`."""
    if found.primary not in ("T2", "T2-T2b"):
        return []
    pairs = in_split(found.measured.effects[found.primary], "test").pairs
    n, n_topics = len(pairs), pairs.topic.nunique()
    note = f"layers {', '.join(map(str, pooled.layers))}"
    own = {"estimate": pooled.estimate, "ci_low": pooled.low, "ci_high": pooled.high}
    rows = [exact_row(model, "C7", "Moran's I", 0, n, n_topics, note) | own]
    rows.append(exact_row(model, "C7", "Moran's I, permutation p", pooled.p, n, n_topics))
    if best is not None:
        rows += [row(model, "C7", label, "main", best.shares, n, i) for i, label in enumerate(adjacency.CONTEST)]
        rows.append(exact_row(model, "C7", "best window, permutation p", best.p, n, n_topics))
    return rows


def quick_study(study: Study) -> Study:
    """What a model's relative is measured on: no validate pairs, no T1, and at most 48 pairs a benign behaviour."""
    pairs = tuple(p for p in study.pairs if p.pair.split != "validate" and p.pair.treatment != "T1")
    return _with_few_benign(replace(study, pairs=pairs), BENIGN_PAIRS_QUICK)


def measure_last_layer(study: Study) -> Neurons | None:
    """The sweep for a model's relatives: the last layer only, on `quick_study`. None without T2: nothing to measure."""
    return measure_neurons(quick_study(study), [study.subject.n_layers - 1]) if study.of("T2") else None


def neuron_evidence(found: Neurons | None, model: str) -> EvidenceRows:
    """Evidence rows for C5a and C7 from a sweep; none for a claim that its pairs or its model cannot speak to."""
    if found is None or not enough(found, found.primary):
        return []
    return evidence_c5a(found, model, all_curves(found)) + evidence_c7(found, model, moran(found), groups(found))


@dataclass(frozen=True)
class Gates:
    """What the four tests give for one model: cells, answer tables, sets by name, and the forms that are defined."""

    study: Study
    primary: str
    sets: dict[str, NeuronSet]
    cells: pd.DataFrame
    forms: tuple[GateForm, ...]
    timing: pd.DataFrame = field(default_factory=pd.DataFrame)
    cost: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def headline(self) -> GateForm | None:
        """The form that the verdict reads, chosen on discover: b or c, not a readout if there is one, then the largest."""
        mine = [one for one in self.forms if one.treatment == self.primary and one.set_name != WHOLE]
        usable = [one for one in mine if one.form in ("b", "c") and one.main.is_defined]
        return max(usable, key=lambda one: one.rank, default=None)

    @property
    def tested(self) -> list[str]:
        """Names of the sets that all four tests are made on: the last layer's sparse set, and the one that the verdict reads."""
        return list(dict.fromkeys([LAST, self.headline.set_name if self.headline else LAST]))


def measure_gates(study: Study, table: pd.DataFrame) -> Gates | NotDefined:
    """The four tests on the sparse sets of a neuron table (`single.NEURONS`), without validate pairs.

    Not defined if the study has no jailbreak wrappers (T2), or no effect in the last layer.
    """
    if not study.of("T2"):
        return NotDefined(thresholds.NO_WRAPPERS)
    study = replace(study, pairs=tuple(p for p in study.pairs if p.pair.split != "validate"))
    primary = "T2-T2b" if "T2-T2b" in set(table.treatment) else "T2"
    sets = gating.sets_of(study, table, primary)
    if LAST not in sets:
        return NotDefined("no effect reaches a neuron of the last layer: there is no set to test")
    cells = _gate_cells(study, table, sets)
    found = Gates(study, primary, sets, cells, gating.gate_forms(cells, sets, primary))
    # Timing and perplexity, for the sets that all tests are made on.
    tested, thin = [sets[name] for name in found.tested], study.subsample(ANSWER_PAIRS)
    harm = [pair for pair in thin.of("T2", "T2b") if pair.pair.split == "test"]
    if harm:
        timed = timing.timing_effects(study.subject, harm, study.openers, tested)
        found = replace(found, timing=with_difference(timed, study.twins))
    control = [pair for pair in thin.of("T2") if pair.pair.split == "discover"]
    benign = [
        p for p in study.subsample(BENIGN_PAIRS_QUICK).pairs if p.pair.treatment[0] == "B" and p.pair.split == "test"
    ]
    if benign and control:
        closed = timing.closed_values(study.subject, control, tested)
        found = replace(found, cost=timing.closing_cost(study.subject, benign, study.openers, closed))
    return found


def _gate_cells(study: Study, table: pd.DataFrame, sets: dict[str, NeuronSet]) -> pd.DataFrame:
    """The four cells of every set on T2 and T2b, across twins (where the twin switches the harm signal, and `te` is that of
    T2 - T2b), and on benign pairs those of the harm sets (specificity) and of each behaviour's own sparse set (reference).
    """
    caches, every, harm = dict[str, LastLayerCache](), list(sets.values()), study.of("T2", "T2b")
    cells = with_difference(four_cells(study.subject, harm, study.openers, every, (LAST, WHOLE), caches), study.twins)
    across = gating.twin_cells(study.subject, caches, study.twins, study.openers, [sets[LAST], sets[WHOLE]])
    if len(across):
        known = cells[(cells.treatment == "T2-T2b") & (cells["set"] == LAST) & (cells.form == "upstream")]
        keys = ["pair_id", "outcome"]
        across = across.drop(columns="te").merge(known[[*keys, "te"]], on=keys, validate="many_to_one")
    made, thin = [cells, across], study.subsample(BENIGN_PAIRS_QUICK)
    for name in (name for name in study.treatments if name.startswith("B")):
        own = gating.sets_of(study, table, name) if name in set(table.treatment) else {}
        some = [*every, *([replace(own[LAST], name=f"own {name}")] if LAST in own else [])]
        made.append(four_cells(study.subject, thin.of(name), study.openers, some, (f"own {name}",), caches))
    chosen_by = ("topic", "treatment", "split", "set", "form", "outcome")  # again and again
    return pd.concat(made).astype(dict.fromkeys(chosen_by, "category"))


def gating_evidence(study: Study, table: pd.DataFrame, model: str) -> EvidenceRows:
    """Evidence rows for C5b of any study, from its neuron table; none where it has no T2 pairs or no set to test."""
    return evidence_c5b(measure_gates(study, table), model)


def evidence_c5b(found: Gates | NotDefined, model: str) -> EvidenceRows:
    """Evidence rows of C5b: every form of the index, specificity, timing and readout; "gate index", main, is the headline."""
    if isinstance(found, NotDefined):
        return []
    rows, chosen = EvidenceRows(), found.headline
    for one in found.forms:
        where = "" if one.treatment == found.primary else f" {one.treatment}"
        label = FORMS[one.experiment] + (", whole layer" if one.set_name == WHOLE else "") + where
        rows += _index_rows(model, "gate index, form", label, one)
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
    benign = sorted(te.index[te.abs() >= MIN_TOTAL_EFFECT])
    n_harm = len(gating.select(found.cells, found.primary, name, "upstream", "Y1", "test"))
    measured = [
        ("readout share", gating.readout_share(found.cells, found.primary, name), n_harm),
        ("benign share", gating.benign_share(found.cells, found.primary, name, benign), n_harm),
    ]
    if len(found.cost):
        measured.append(("perplexity ratio", gating.perplexity_ratio(found.cost, name), len(found.cost)))
    if len(found.timing):
        n_timed = int((found.timing.treatment == found.primary).sum())
        measured.append(("timing share", gating.timing_share(found.timing, found.primary, name), n_timed))
    note = {"note": f"{len(benign)} benign behaviours; {name}"}
    return [row(model, "C5b", quantity, variant, one, n) | note for quantity, one, n in measured if one is not None]
