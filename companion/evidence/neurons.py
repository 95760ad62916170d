"""Evidence for C5a (a sparse last layer) and C7 (adjacency): everything that the neuron analysis knows for the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Int

from companion.base.thresholds import MIN_TOTAL_EFFECT
from companion.evidence import gating
from companion.evidence.layers import EvidenceRows
from companion.mediation.estimands import Batch
from companion.mediation.study import CONTROL_PAIRS, Study, control_study
from companion.neurons import adjacency, clamping, screening, sets, single
from companion.neurons.clamping import LastLayerCache
from companion.neurons.sets import Measured, cumulative, measure_all, on_contrast, sizes, whole_layer
from companion.neurons.single import PairEffects, all_neurons, in_columns, in_split, ranking, signed
from companion.stats import bootstrap
from companion.stats.bootstrap import interval, row

N_RANDOM_ORDERS = 10
BENIGN_PAIRS, BENIGN_PAIRS_QUICK = CONTROL_PAIRS, 48
DIRECTIONS = {"main": "nie", "sufficiency": "nie0", "necessity": "nie1"}


@dataclass(frozen=True)
class Neurons:
    """What the neuron sweep gives for one model: single effects, the table of neurons, the screen's trust, and by
    treatment what `gating_evidence` needs of the last layer, where it was kept.
    """

    measured: Measured
    table: pd.DataFrame
    screen: screening.ScreenTrust | None
    caches: Mapping[str, LastLayerCache] | None = None

    @property
    def primary(self) -> str:
        """The treatment that stands for generation: T2 - T2b where twins exist, else T2, else the first there is."""
        present = list(self.measured.effects)
        return next((name for name in ("T2-T2b", "T2") if name in present), present[0])

    @property
    def benign(self) -> list[str]:
        """The benign behaviours whose TE is large enough on discover."""
        effects = self.measured.effects
        te = {name: in_split(effects[name], "discover").pairs.te.mean() for name in effects if name[0] == "B"}
        return sorted(name for name, value in te.items() if abs(value) >= MIN_TOTAL_EFFECT)


def measure_neurons(
    study: Study,
    *,
    every: bool | None = None,
    layers: Sequence[int] | None = None,
    benign: int = BENIGN_PAIRS,
    watch: Callable[[Batch], None] | None = None,
) -> Neurons:
    """Measure the neurons of a study: generation treatments (T2, T2b) at every layer, all others at the last layer.

    `every`: exactly, all of them (by default where the model is small); else the last layer, the top of a gradient
    screen and a random sample. `layers` limits the layers of generation treatments. Benign behaviours, which are a
    comparison, use at most `benign` pairs each. `watch` sees every batch.
    """
    subject, last = study.subject, all_neurons(study.subject, [study.subject.n_layers - 1])
    generation = [name for name in study.treatments if name in ("T2", "T2b")]
    below, chosen = None, None
    if screening.is_small(subject) if every is None else every:
        wide = all_neurons(subject, layers)
    else:
        name = "T2-T2b" if study.twins else (generation or [study.treatments[0]])[0]
        below = screening.below_the_last(study, name)
        chosen = screening.to_recheck(below)
        wide = pd.concat([last, chosen[["layer", "neuron"]]]).sort_values(["layer", "neuron"], ignore_index=True)
    columns = {name: wide if name in generation or not generation else last for name in study.treatments}
    kept = {pair.pair.id for pair in study.subsample(benign).pairs}
    pairs = tuple(one for one in study.pairs if one.pair.treatment[0] != "B" or one.pair.id in kept)
    measured = measure_all(replace(study, pairs=pairs), columns, watch)
    table = pd.concat([single.neuron_table(effects) for effects in measured.effects.values()], ignore_index=True)
    made = Neurons(measured, table, None)
    return made if below is None or chosen is None else _with_screen(made, below, chosen)


def _with_screen(made: Neurons, below: pd.DataFrame, chosen: pd.DataFrame) -> Neurons:
    """How far the screen can be trusted, and its estimates behind the exact rows."""
    effects = made.measured.effects[made.primary]
    place = pd.MultiIndex.from_frame(effects.columns).get_indexer(pd.MultiIndex.from_frame(chosen[["layer", "neuron"]]))
    values = {name: array[:, place] for name, array in effects.values.items()}
    exact = replace(effects, columns=chosen[["layer", "neuron"]], values=values)
    rows = screening.estimate_rows(below, chosen, effects)
    table = pd.concat([made.table, rows], ignore_index=True)
    return replace(made, table=table, screen=screening.screen_trust(chosen, exact, len(below)))


def curve(found: Neurons, treatment: str, order: Int[np.ndarray, "neuron"] | None = None) -> PairEffects:
    """Joint effects on test of the first k last-layer neurons of an order (by default the discover ranking), signed."""
    measured, subject = found.measured, found.measured.study.subject
    ranked = ranking(found.table, treatment, measured.last) if order is None else order
    return on_contrast(measured, treatment, "test", partial(cumulative, subject, order=ranked, ks=sizes(subject.d_mlp)))


def random_curve(found: Neurons, treatment: str, seed: int = 0) -> PairEffects:
    """The mean of `curve` over random orders of the neurons."""
    rng, d_mlp = np.random.default_rng(seed), found.measured.study.subject.d_mlp
    made = [curve(found, treatment, rng.permutation(d_mlp)) for _ in range(N_RANDOM_ORDERS)]
    values = {name: np.mean([one.values[name] for one in made], axis=0) for name in made[0].values}
    return replace(made[0], values=values)


def enough(found: Neurons, treatment: str) -> bool:
    """Whether any neuron has an effect, and discover and test hold pairs of at least two topics each."""
    pairs = found.measured.effects[treatment].pairs
    return bool(np.any(found.measured.effects[treatment].nie)) and all(
        pairs.topic[pairs.split == split].nunique() >= 2 for split in ("discover", "test")
    )


def all_curves(found: Neurons) -> dict[str, PairEffects]:
    """The curve of the primary treatment ("main"), of the same ranked by sign, of random orders, and of each benign
    behaviour by its name; none where nothing has an effect.
    """
    name = found.primary
    if not enough(found, name):
        return {}
    by_sign = ranking(found.table, name, found.measured.last, by_sign=True)
    benign = {other: curve(found, other) for other in found.benign if enough(found, other)}
    made = {"main": curve(found, name), "ranked by sign": curve(found, name, by_sign)}
    return {**made, "random order": random_curve(found, name), **benign}


def evidence_c5a(found: Neurons, model: str, made: Mapping[str, PairEffects]) -> EvidenceRows:
    """C5a, a sparse last layer: psi1 of its MLP; k50, k90 and the areas of `all_curves`; concentration of single effects."""
    name, d_mlp = found.primary, found.measured.study.subject.d_mlp
    if name not in ("T2", "T2-T2b") or not made:
        return []
    rows, n = _psi_rows(found, model), len(made["main"].pairs)
    for variant, value in DIRECTIONS.items():
        rows += _curve_rows(model, sets.curve_summary(made["main"], value), n, d_mlp, variant)
    for other in (one for one in made if one != "main"):
        variant, behind = ("main", f" {other}") if other in found.benign else (other, "")
        rows += _curve_rows(model, sets.curve_summary(made[other]), len(made[other].pairs), d_mlp, variant, behind)
    test = in_split(signed(found.measured.effects[name]), "test")
    is_last = (test.columns.layer == found.measured.last).to_numpy()
    spread = sets.concentration(in_columns(test, is_last))
    rows += [row(model, "C5a", label, "main", spread, n, i) for i, label in enumerate(("Gini", "participation ratio"))]
    passed = found.table[(found.table.treatment == name) & (found.table.split == "test")]
    passed = passed[passed.layer == found.measured.last]
    counts = {"neurons in the layer": d_mlp, "neurons that pass": int(single.passing(passed).sum())}
    return rows + [_exact_row(model, "C5a", label, value, rows[0]) for label, value in counts.items()]


def _psi_rows(found: Neurons, model: str) -> EvidenceRows:
    """Share of TE that the whole last MLP is necessary (psi1) and sufficient (psi0) for, with robustness checks."""
    measured, name, rows = found.measured, found.primary, []
    for variant, is_frozen in (("main", False), ("norm frozen", True), ("unsaturated", False)):
        apply = partial(whole_layer, measured.study.subject, is_frozen=is_frozen)
        test = on_contrast(measured, name, "test", apply)
        keep = test.pairs.unsaturated.to_numpy() if variant == "unsaturated" else np.ones(len(test.pairs), bool)
        pairs = test.pairs[keep]
        if pairs.topic.nunique() < 2:
            continue
        for quantity, value in (("psi1", "nie1"), ("psi0", "nie0")):
            both = np.column_stack([test.values[value][keep, 0], pairs.te])
            estimates = interval(sets.topic_sums(pairs, both), lambda total, count: total[:, :1] / total[:, 1:])
            rows.append(row(model, "C5a", quantity, variant, estimates, len(pairs)))
    return rows


def _curve_rows(
    model: str, estimates: bootstrap.Estimates, n_pairs: int, d_mlp: int, variant: str, behind: str = ""
) -> EvidenceRows:
    """Rows of `curve_summary` but psi; none where the whole layer works against the treatment and no k settles."""
    settled = estimates.estimate[sets.SUMMARY.index("k90")] <= d_mlp
    kept = [i for i, label in enumerate(sets.SUMMARY) if label != "psi" and settled]
    return [row(model, "C5a", sets.SUMMARY[i] + behind, variant, estimates, n_pairs, i) for i in kept]


def _exact_row(model: str, claim: str, quantity: str, value: float, like: dict[str, object]) -> dict[str, object]:
    numbers = dict.fromkeys(("estimate", "ci_low", "ci_high"), float(value))
    return {**like, "model": model, "claim": claim, "quantity": quantity, "variant": "main", **numbers}


def moran(found: Neurons) -> adjacency.MoranTest:
    """Moran's I of the primary treatment's effects on test, over all layers that were measured completely."""
    return adjacency.moran_test(complete_layers(found, in_split(signed(found.measured.effects[found.primary]), "test")))


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
    exact: dict[str, object] = {"n_pairs": len(pairs), "n_topics": int(pairs.topic.nunique()), "note": ""}
    own = {"estimate": pooled.estimate, "ci_low": pooled.low, "ci_high": pooled.high}
    note = {"note": f"layers {', '.join(map(str, pooled.layers))}"}
    rows = [{**_exact_row(model, "C7", "Moran's I", 0, exact), **own, **note}]
    rows.append(_exact_row(model, "C7", "Moran's I, permutation p", pooled.p, exact))
    if best is not None:
        labels = enumerate(adjacency.CONTEST)
        rows += [row(model, "C7", label, "main", best.shares, len(pairs), i) for i, label in labels]
        rows.append(_exact_row(model, "C7", "best window, permutation p", best.p, exact))
    return rows


def complete_layers(found: Neurons, effects: PairEffects) -> PairEffects:
    """Only the layers all of whose neurons were measured: places in a sample say nothing about neighbours."""
    counts = effects.columns.groupby("layer").size()
    return in_columns(effects, effects.columns.layer.map(counts == found.measured.study.subject.d_mlp).to_numpy())


def measure_last_layer(study: Study) -> Neurons | None:
    """The sweep for a model's relatives: the last layer only, no validate pairs, at most 48 pairs a benign behaviour.

    Without recognition (T1), which no claim about neurons reads. None where there is nothing to measure: no T2, or an MLP
    without neurons to name (a mixture of experts).
    """
    if study.subject.d_mlp == 0 or not study.of("T2"):
        return None
    pairs = tuple(p for p in study.pairs if p.pair.split != "validate" and p.pair.treatment != "T1")
    study, last, kept = replace(study, pairs=pairs), [study.subject.n_layers - 1], list[LastLayerCache]()

    def watch(batch: Batch) -> None:
        kept.append(clamping.last_layer_cache(study.subject, batch))

    found = measure_neurons(study, every=True, layers=last, benign=BENIGN_PAIRS_QUICK, watch=watch)
    return replace(found, caches=clamping.joined_by_treatment(kept))


def neuron_evidence(found: Neurons | None, model: str) -> EvidenceRows:
    """Evidence rows for C5a and C7 from a sweep; none for a claim that its pairs or its model cannot speak to."""
    if found is None or not enough(found, found.primary):
        return []
    return evidence_c5a(found, model, all_curves(found)) + evidence_c7(found, model, moran(found), groups(found))


def relative_neurons(study: Study, model: str, label: str) -> tuple[EvidenceRows, EvidenceRows]:
    """Evidence rows on C5a and C7, and on C5b. One sweep serves both."""
    swept = measure_last_layer(control_study(study, model, label))
    gates = [] if swept is None else gating.gating_evidence(swept.measured.study, swept.table, label, swept.caches)
    return neuron_evidence(swept, label), gates
