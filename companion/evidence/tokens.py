"""Evidence for C4 and C5c: what carries the signal on from the last token, and whether neurons switch the whole answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats as st

from companion.base.display import NotDefined
from companion.base.files import EVIDENCE
from companion.base.thresholds import CONTENT_JUDGE, KEPT_BY_FIRST_TOKEN
from companion.evidence.layers import EvidenceRows
from companion.mediation import mechanisms, summaries
from companion.mediation.mechanisms import CARRIED_VARIANTS, HELD, PATHS, WITH_OWN
from companion.mediation.study import Study, control_study, other_shipped
from companion.neurons import sets, single, timing
from companion.neurons.sets import cumulative, measure_all, on_contrast, settles, sizes
from companion.neurons.single import all_neurons
from companion.neurons.timing import Clamp, clamped_answers
from companion.prompts.tokens import TokenPair
from companion.stats import bootstrap, clusters
from companion.stats.bootstrap import exact_row, interval, row

FALLBACK = 64
BENIGN_PAIRS = 40
WANTED = ("none", "first token", "first five", "all tokens")


@dataclass(frozen=True)
class Timing:
    """The clamped neurons, and what the clamps do on test: to harmful `answers`, to Y2 (`forced`), and to benign answers,
    clamped to the other run of their own pair (`benign`), or harmless ones to a refusing run (`transferred`).
    """

    neurons: tuple[int, ...]
    answers: pd.DataFrame
    forced: pd.DataFrame
    benign: pd.DataFrame
    transferred: pd.DataFrame


def top_neurons(study: Study) -> tuple[int, ...]:
    """The last-layer neurons that are clamped: ranked by |mean NIE| on discover, k90 of them by the curve on validate.

    Where no k has 0.9 of the layer's effect and keeps it, the first 64 are taken.
    """
    subject, treatment = study.subject, "T2-T2b" if study.twins and study.of("T2b") else "T2"
    last = all_neurons(subject, [subject.n_layers - 1])
    measured = measure_all(study.thinned(len(study.pairs)), dict.fromkeys(("T2", "T2b"), last))
    order = single.ranking(single.neuron_table(measured.effects[treatment]), treatment, measured.last)
    ks = sizes(subject.d_mlp, sets.EVERY_COSTLY if study.is_costly else sets.EVERY)
    k = min(FALLBACK, subject.d_mlp)
    curve = on_contrast(measured, treatment, "validate", lambda ends: cumulative(subject, ends, order, ks))
    effect = curve.nie.mean(0)
    if len(curve.pairs) and effect[-1] > 0 and np.isfinite(k90 := settles(effect / effect[-1], ks, 0.9)):
        k = int(k90)
    return tuple(int(i) for i in order[:k])


def measure_timing(study: Study, schedules: Sequence[str] = tuple(timing.SCHEDULES)) -> Timing | NotDefined:
    """Interventions during generation on the test pairs of T2, and on benign ones; not defined for a study without T2.

    `schedules` of harmful answers; `evidence_c5c` reads those in `WANTED`.
    """
    tested = [pair for pair in study.of("T2") if pair.pair.split == "test"]
    if not tested:
        return NotDefined("No jailbroken prompt (T2) in the test split.")
    chosen = top_neurons(study)
    few, whole = Clamp("neurons", chosen), Clamp("whole MLP")
    arms = [(clamp, name) for clamp in (few, whole) for name in schedules]
    benign = [
        pair for pair in study.thinned(BENIGN_PAIRS).pairs
        if pair.pair.treatment not in ("T1", "T2") and pair.pair.split == "test"
    ]  # fmt: skip
    known: timing.Controls = {}
    (harmful,) = clamped_answers(study, [tested], arms, known=known)
    clamped_always = clamped_answers(study, [benign, refusing(study, tested)], [(few, "all tokens")])
    return Timing(chosen, harmful, timing.forced_scores(study, tested, few, WANTED, known), *clamped_always)


def refusing(study: Study, pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """Harmless requests in their jailbreak wrapper, paired with the harmful twin's control, which is refused.

    A clamp from such a pair asks whether the neurons of a refusal turn any request into one. Twins of unequal length are out.
    """
    return [
        replace(twin, pair=replace(twin.pair, control=harmful.pair.control), control=harmful.control)
        for harmful, twin in study.with_twins(pairs)
    ]


def harmful_rates(answers: pd.DataFrame) -> pd.DataFrame:
    """Share of harmful answers by clamp and schedule.

    Columns: clamp, schedule, n, estimate, low, high (Wilson, over prompts), and the shares that are `refused` and `off_topic`.
    """
    rows = []
    for key, part in answers.groupby(["clamp", "schedule"], sort=False):
        share = clusters.rate(int((part.label == "harmful").sum()), len(part))
        rows.append((*key, len(part), *share, *((part.label == name).mean() for name in ("refusal", "off_topic"))))
    columns = ["clamp", "schedule", "n", "estimate", "low", "high", "refused", "off_topic"]
    return pd.DataFrame(rows, columns=columns)


def taken_away(table: pd.DataFrame) -> pd.DataFrame:
    """How much less `y` is under each schedule than without a clamp: one row a pair, one column a schedule."""
    made = table.pivot(index=["pair_id", "topic"], columns="schedule", values="y").reset_index()
    names = [name for name in timing.SCHEDULES if name in made and name != "none"]
    return made[["pair_id", "topic"]].assign(**{name: made["none"] - made[name] for name in names})


def evidence_c5c(found: Timing | NotDefined, model: str) -> EvidenceRows:
    """C5c, a switch of the whole answer: share of the effect on all tokens that the first token keeps; benign answers."""
    if isinstance(found, NotDefined) or found.answers.topic.nunique() < 2:
        return []
    harm = found.answers.assign(y=(found.answers.label == "harmful").astype(float))
    rows = kept_share_rows(taken_away(harm[harm.clamp == "neurons"]), model, "main")
    rows += kept_share_rows(taken_away(harm[harm.clamp == "whole MLP"]), model, "whole MLP")
    if (harm.content != "").all():
        by_content = harm[harm.clamp == "neurons"].assign(y=lambda part: (part.content == "harmful").astype(float))
        rows += kept_share_rows(taken_away(by_content), model, CONTENT_JUDGE)
    rows += kept_share_rows(taken_away(found.forced), model, "full response", is_judged=False)
    hard = "harmless answers changed, refusing run's values"
    for answers, quantity in ((found.benign, "benign answers changed"), (found.transferred, hard)):
        if len(answers) and answers.topic.nunique() > 1:
            rows.append(changed_share_row(answers, model, quantity))
    note = f"the {len(found.neurons)} largest neurons of the last layer"
    return [{**entry, "note": note} if entry["variant"] == "main" and not entry["note"] else entry for entry in rows]


def changed_share_row(answers: pd.DataFrame, model: str, quantity: str) -> dict[str, object]:
    """Share of answers whose tokens change, with exact limits: resampling topics cannot see a change that no topic shows."""
    part = answers.assign(y=answers.changed.astype(float))
    found = at_least_exact(interval(clusters.cluster_sums(part, "y"), clusters.mean), part.topic.nunique())
    return row(model, "C5c", quantity, "main", found, len(part))


def at_least_exact(found: bootstrap.Estimates, n: int) -> bootstrap.Estimates:
    """Shares of answers with limits at least as wide as Clopper and Pearson's (1934) for `n` independent answers.

    Where every answer behaves alike the bootstrap's interval has no width: it cannot see what no topic shows. The exact
    binomial limits can, with topics as the trials: all of 36 leave room for 1 in 10 that are otherwise.
    """
    hits = np.clip(found.estimate, 0, 1) * n
    low = np.where(hits > 0, st.beta.ppf(0.025, np.maximum(hits, 1e-9), n - hits + 1), 0.0)
    high = np.where(hits < n, st.beta.ppf(0.975, hits + 1, np.maximum(n - hits, 1e-9)), 1.0)
    return replace(found, low=np.minimum(found.low, low), high=np.maximum(found.high, high))


def kept_share_rows(table: pd.DataFrame, model: str, variant: str, *, is_judged: bool = True) -> EvidenceRows:
    """Rows of the effect of all tokens and of the shares kept (of `taken_away`); "not defined" if all have no sure effect.

    Judged answers are counts, so their limits are those of `at_least_exact`; the trials are all topics for the effect, and for
    what is kept of it the topics that have some.
    """
    sums = clusters.cluster_sums(table, ["first token", "first five", "all tokens"])
    whole = interval(sums, clusters.contrast([0, 0, 1]))
    whole = at_least_exact(whole, len(sums.clusters)) if is_judged else whole
    rows = [row(model, "C5c", "effect of all tokens", variant, whole, len(table))]
    if not whole.low[0] > 0:
        note = f"holding them at all tokens has no sure effect on harm ({whole.estimate[0]:.2f}): there is none to keep"
        return [*rows, {**rows[0], "quantity": "not defined", "note": note}]
    kept = interval(sums, clusters.ratio([[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 1]]))
    kept = at_least_exact(kept, int((sums.sums[:, -1] != 0).sum())) if is_judged else kept
    labels = (KEPT_BY_FIRST_TOKEN, "share kept by the first five tokens")
    return rows + [row(model, "C5c", label, variant, kept, len(table), i) for i, label in enumerate(labels)]


def evidence_of_run(
    study: Study, model: str, profile: str, paths: pd.DataFrame, found: Timing | NotDefined
) -> pd.DataFrame:
    """Evidence rows for C4 and C5c of a run's own study, already measured, and of the other shipped models, measured here."""
    rows = evidence_c4(paths, study.slug, study.subject.n_layers) if study.of("T2") else []
    rows += evidence_c5c(found, study.slug)
    for name in other_shipped(model, profile):
        relative = control_study(study, model, name)
        rows += measure_c4(relative, name) + evidence_c5c(measure_timing(relative, WANTED), name)
    return pd.DataFrame(rows, columns=list(EVIDENCE))


def measure_c4(study: Study, model: str) -> EvidenceRows:
    """Evidence rows for C4 of any study; none without T2."""
    return evidence_c4(mechanisms.path_effects(study), model, study.subject.n_layers) if study.of("T2") else []


def evidence_c4(table: pd.DataFrame, model: str, n_layers: int) -> EvidenceRows:
    """C4, MLPs carry the signal on: the hand-over layer, and from there the shares of MLPs, attention and skip path.

    The layer is the one of discover; its row shows test. Above the last layer nothing is left, which a row "not defined" says;
    only the share with the layer's own MLP is defined there. Variants "from layer l" start elsewhere.
    """
    treatment = summaries.primary(table)
    discover, test = (mechanisms.hand_over_layer(table, treatment, split) for split in ("discover", "test"))
    if discover.empty or test.empty:
        return []
    layer, one = int(discover.layer.iloc[0]), test.iloc[0]
    size = int(one.n_pairs), int(one.n_topics)
    limits = {"ci_low": float(one.low), "ci_high": float(one.high)}
    rows = [exact_row(model, "C4", "hand-over layer", one.layer, *size, f"layer {layer} on discover") | limits]

    def shares(at: int, variant: summaries.Variant, paths: Mapping[str, Mapping[str, int]], label: str) -> EvidenceRows:
        effects = summaries.signed_variant(table, treatment, variant, list(HELD))
        found = None if effects is None else mechanisms.path_shares(effects, at, variant.value, paths)
        if found is None:
            return []
        made, n_pairs = found.estimates(), found.table.pair_id.nunique()
        return [row(model, "C4", f"share of {path}", label, made, n_pairs, i) for i, path in enumerate(paths)]

    for at in range(n_layers - 1):
        rows += shares(at, CARRIED_VARIANTS[0], PATHS | WITH_OWN, f"from layer {at}")
    paths, note = PATHS | WITH_OWN, "the hand-over layer's residual stream has no effect of the treatment's sign"
    if is_last := layer >= n_layers - 1:
        paths = WITH_OWN
        note = "the last token takes over in the last layer only: no block is left above it to carry anything"
    found = [entry for variant in CARRIED_VARIANTS for entry in shares(layer, variant, paths, variant.name)]
    undefined = [exact_row(model, "C4", "not defined", 0.0, *size, note)] if is_last or not found else []
    return rows + undefined + found
