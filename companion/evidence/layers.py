"""Evidence for C1, C2 and C3, and for the preconditions of every verdict: what the layer sweep knows about one study.

C3 also asks a probe: can harmfulness be read off an early layer better than off the words alone? A linear probe on activations
of the tokens that both prompts of a pair share, where only context can have carried it, is compared with one on token counts.
Both are fitted on discover and scored on the topics of test, which they have not seen.

Two samples: topics and wrapper families (T2 - T2b), or topics and verbs (T1), drawn together for the key numbers of C1 to C4. No
rule reads these intervals: they say how far a verdict is one on these wrappers alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from companion.base.device import to_host
from companion.base.display import NotDefined
from companion.base.files import EFFECTS, read_table
from companion.base.thresholds import COMPUTED, MIN_TOTAL_EFFECT, MLP_SHARE_WITH_OWN, PSI, deepest_early_layer, depth
from companion.mediation import estimands, mechanisms, summaries, sweeps
from companion.mediation.estimands import batches, run_clean
from companion.mediation.mechanisms import HELD, WITH_OWN
from companion.mediation.study import Study
from companion.mediation.summaries import VARIANTS, enough, late_share, mlp_share, select, signed, signed_contrast
from companion.model.architecture import Subject
from companion.prompts import positions
from companion.prompts.pairs import Pair
from companion.prompts.tokens import TokenPair
from companion.stats import bootstrap, clusters
from companion.stats.bootstrap import Quantity, exact_row, mean_row, row, share_row

EvidenceRows = list[dict[str, object]]
FILES = {  # in a run's folder
    "layers": "02_layers.parquet", "computed": "02_computed.parquet", "modules": "03_modules.parquet",
    "carried": "05_carried.parquet",
}  # fmt: skip


@dataclass(frozen=True)
class Layers:
    """What the layer sweep gives for one model; `effects` has the rows of T2 - T2b behind the others."""

    study: Study
    clean: pd.DataFrame
    effects: pd.DataFrame
    evidence: EvidenceRows


def measure_layers(study: Study, label: str, *, full_response: bool = False, direct: bool = False) -> Layers:
    """Clean runs, effects of every layer and the evidence they give, under a model label.

    `full_response` adds Y2 for T2 and T2b, unless each pair is costly; `direct` adds direct effects.
    """
    found = sweeps.run_sweep(study, "layers with direct effects" if direct else "layers")
    clean, effects = found["clean"], found["effects"]
    if full_response and study.of("T2", "T2b") and not study.is_costly:
        effects = pd.concat([effects, sweeps.run_sweep(study, "whole answers")["effects"]], ignore_index=True)
    clean, effects = (estimands.with_difference(table, study.twins) for table in (clean, effects))
    rows = precondition_rows(clean, label, study.subject.n_layers)
    bits = 1 - math.log2(torch.finfo(study.subject.dtype).eps)
    rows.append(exact_row(label, "gate", "significand bits", bits, len(study.pairs)))
    if study.of("T2"):
        rows += evidence_c1(effects, label, study.subject.n_layers)
    if study.of("T1"):
        rows += evidence_c3(study.subject, study.of("T1"), effects, label)
    return Layers(study, clean, effects, rows)


def precondition_rows(clean: pd.DataFrame, model: str, n_layers: int) -> EvidenceRows:
    """What every verdict needs first, on test: TE and joint probability by treatment, and the light cone of the T2 pairs."""
    test = clean[clean.split == "test"]
    rows = [
        mean_row(part, value, model, "gate", f"{name} {treatment}")
        for value, name in (("te", "TE"), ("joint", "joint probability"))
        for treatment, part in test.groupby("treatment", sort=False)
    ]
    generation = test[test.treatment == "T2"]
    arrives = generation.assign(at=depth(generation.earliest, n_layers))
    return rows + ([mean_row(arrives, "at", model, "gate", "earliest possible depth")] if len(arrives) else [])


def evidence_c1(table: pd.DataFrame, model: str, n_layers: int) -> EvidenceRows:
    """C1, generation arises late: the late share in all variants, and the centroid difference harm - benign."""
    treatment = summaries.primary(table)
    rows: EvidenceRows = []
    for variant in VARIANTS:
        effects = summaries.signed_variant(table, treatment, variant)
        if effects is not None:
            rows += share_row(model, "C1", "late share", variant.name, late_share(effects, n_layers, variant.value))
    benign = usable_benign(table)
    if len(benign) and rows and rows[0]["variant"] == "main":
        harm = signed(select(table, treatment, VARIANTS[0]))
        estimates, names = summaries.centroids(harm, benign, n_layers)
        test = pd.concat([harm, benign]).query("split == 'test'").groupby("treatment")
        sizes = test.agg(n_pairs=("pair_id", "nunique"), n_topics=("topic", "nunique")).to_dict("index")
        named = [("centroid difference", names[0]), *((f"centroid {name}", name) for name in names)]
        for i, (quantity, name) in enumerate(named):  # both sizes are the treatment's own, not those of the whole table
            rows.append(row(model, "C1", quantity, "main", estimates, 0, i) | sizes[name])
    return rows


def usable_benign(table: pd.DataFrame) -> pd.DataFrame:
    """Component effects of the benign behaviours that have some, and whose TE is large enough on discover."""
    kept = []
    for name in sorted(name for name in set(table.treatment) if name.startswith("B")):
        part = select(table, name, VARIANTS[0])
        if enough(part) and abs(part[part.split == "discover"].te.mean()) >= MIN_TOTAL_EFFECT:
            part = signed(part)
            cells = part[["site", "layer"]].drop_duplicates()
            kept += [part] if summaries.positive_cells(part[part.split == "discover"], cells).any() else []
    return pd.concat(kept, ignore_index=True) if kept else table.iloc[:0]


def evidence_c2(
    totals: pd.DataFrame, direct: pd.DataFrame, model: str, scales: Mapping[str, pd.Series]
) -> EvidenceRows:
    """C2, MLP not attention: MLP share of total (NIE) and of direct effects, raw and under each normalisation.

    `scales` maps a normalisation to its divisor by (site, layer). Direct effects are those of the frozen-norm linear contrast.
    """
    rows: EvidenceRows = []
    treatment = summaries.primary(totals)
    if treatment not in ("T2", "T2-T2b"):
        return rows
    for variant in VARIANTS:
        effects = summaries.signed_variant(totals, treatment, variant)
        if effects is not None:
            rows += share_row(model, "C2", "MLP share of NIE", variant.name, mlp_share(effects, variant.value))
    total = signed(select(totals, treatment, VARIANTS[0]))
    for name, scale in scales.items():  # the raw total is the first variant above
        rows += share_row(model, "C2", "MLP share of NIE", name, mlp_share(total, scale=scale))
    written = summaries.written(direct, treatment)
    for name, divisor in {"main": None, **scales}.items():
        rows += share_row(model, "C2", "MLP share of direct effects", name, mlp_share(written, scale=divisor))
    return rows


def evidence_c1_computed(table: pd.DataFrame, model: str, n_layers: int) -> EvidenceRows:
    """Rows for the corrected C1: the late share of the positive effects of what components compute."""
    rows: EvidenceRows = []
    for variant in mechanisms.COMPUTED_VARIANTS if len(table) else ():
        chosen = table[table.pair_id.isin(summaries.unsaturated_ids(table))] if variant.unsaturated else table
        if enough(chosen):
            share = late_share(signed(chosen, table), n_layers, variant.value)
            rows += share_row(model, "C1", COMPUTED, variant.name, share)
    return rows


def evidence_c3(subject: Subject, pairs: Sequence[TokenPair], table: pd.DataFrame, model: str) -> EvidenceRows:
    """C3, early context: psi0 of T1's tokens that do not differ at the deepest early layer, and the probe's gain there."""
    shared, rows = summaries.early_shared(table, subject.n_layers), []
    family = {p.pair.id: p.pair.family for p in pairs}
    open_ids = summaries.unsaturated_ids(table[table.treatment == "T1"])
    parts = {"main": shared, "unsaturated": shared[shared.pair_id.isin(open_ids)]}
    parts |= {f"family {name}": part for name, part in shared.groupby(shared.pair_id.map(family)) if name}
    for variant, part in parts.items():
        rows += share_row(model, "C3", PSI, variant, summaries.psi0(part))
    topics_of = {name: {p.pair.topic for p in pairs if p.pair.split == name} for name in ("discover", "test")}
    if not topics_of["discover"] or len(topics_of["test"]) < 2:
        return rows
    ordered, residual = shared_token_features(subject, pairs, deepest_early_layer(subject.n_layers))
    counts = CountVectorizer(analyzer=list).fit_transform([ids for p in ordered for ids in (p.control, p.treated)])
    tokens = counts.toarray().astype(float).reshape(len(ordered), 2, -1)
    split, scores = np.array([p.pair.split for p in ordered]), {}
    for name, values in (("AUROC probe", residual), ("AUROC bag of tokens", tokens)):
        train, test = (values[split == part].reshape(-1, values.shape[-1]) for part in ("discover", "test"))
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        scores[name] = probe.fit(train, np.tile([0, 1], len(train) // 2)).decision_function(test).reshape(-1, 2)
    topics = [p.pair.topic for p in ordered if p.pair.split == "test"]
    estimates, quantities = auroc(scores, topics), [*scores, "AUROC gain"]
    return rows + [row(model, "C3", name, "main", estimates, len(topics), i) for i, name in enumerate(quantities)]


def shared_token_features(
    subject: Subject, pairs: Sequence[TokenPair], layer: int
) -> tuple[list[TokenPair], Float[np.ndarray, "pair side d"]]:
    """Residual stream after `layer`, averaged over the tokens behind the first difference that both prompts share.

    Sides are control (0) and treated (1); pairs come back in the order of the rows.
    """
    header = positions.user_header(subject.tokenizer)
    ordered, rows = [], []
    for group in batches(pairs, subject):
        batch = run_clean(subject, group)
        mask = subject.tensor(positions.stack(group, header, "shared"))[..., None]
        n_shared = mask.sum(1).clamp(min=1)  # a pair may share no token: then there is nothing to read
        sides = [(run.resid_post[layer] * mask).sum(1) / n_shared for run in (batch.control, batch.treated)]
        rows.append(to_host(torch.stack(sides, dim=1).float()))
        ordered += group
    return ordered, np.concatenate(rows)


def auroc(scores: Mapping[str, Float[np.ndarray, "pair side"]], topics: Sequence[str]) -> bootstrap.Estimates:
    """AUROC of each set of scores, then the gain of the first over the second, topics resampled.

    It counts, over all (treated, control) prompts of any two pairs, how often the treated one scores higher (ties: half). With
    one weight a topic it is a quadratic form in the weights.
    """
    names, codes = np.unique(np.asarray(topics), return_inverse=True)
    member = np.eye(len(names))[codes]
    wins = []
    for values in scores.values():
        treated, control = values[:, 1][:, None], values[:, 0][None, :]
        wins.append(member.T @ ((treated > control) + 0.5 * (treated == control)) @ member)
    sizes = member.sum(axis=0)

    def statistic(weights: Float[np.ndarray, "rep topic"], _: np.ndarray) -> Float[np.ndarray, "rep stat"]:
        trials = (weights @ sizes) ** 2
        areas = [np.einsum("rc,cd,rd->r", weights, table, weights) / trials for table in wins]
        return np.stack([*areas, areas[0] - areas[1]], axis=1)

    # Sums whose resampled columns are the topics' weights themselves: column c is 1 in cluster c.
    eye, strata = np.eye(len(names)), np.zeros(len(names), dtype=int)
    return bootstrap.bootstrap(clusters.ClusterSums(eye, eye, pd.DataFrame(), pd.Index(names), strata), statistic)


# ---- two samples ----


def second_level(pairs: Iterable[Pair]) -> dict[str, str]:
    """For each pair of T1 its verb, of T2 and T2b its family of wrappers (without the tier that the invented language has).

    Pairs without a marked verb, or without a named family, are left out.
    """
    found = {}
    for pair in pairs:
        if pair.treatment == "T1":
            start, end = pair.spans.get("treated", {}).get("verb", (0, 0))
            found[pair.id] = pair.treated[start:end]
        elif pair.treatment in ("T2", "T2b"):
            found[pair.id] = re.sub(r"(?<=.)-\d+$", "", pair.family)
    return {name: level for name, level in found.items() if level}


def read_effects(folder: Path) -> dict[str, pd.DataFrame]:
    """The pair-level tables of a run that `two_way_table` can use, as far as the run left them (`FILES`)."""
    return {name: read_table(folder / file, EFFECTS) for name, file in FILES.items() if (folder / file).is_file()}


def two_way_table(tables: Mapping[str, pd.DataFrame], pairs: Iterable[Pair]) -> pd.DataFrame | NotDefined:
    """Key numbers of C1 to C4 with their interval over topics, and that over topics and wrapper families, or verbs.

    `tables` are pair-level effects by name, whichever of `FILES` a run has; `wider` is the ratio of the widths. A number whose
    pairs share one family or verb has no row; NotDefined where none has a row.
    """
    level, rows = second_level(pairs), []
    for claim, quantity, name, asked in KEY_NUMBERS:
        share = asked(tables[name]) if name in tables and len(tables[name]) else None
        if share is None:
            continue
        table = share.table.assign(level=share.table.pair_id.map(level)).dropna(subset="level")
        n_topics, n_levels = table.topic.nunique(), table.level.nunique()
        if min(n_topics, n_levels) < 2:
            continue
        one = replace(share, table=table).estimates()
        cells = table.assign(topic=list(zip(table.topic, table.level, strict=True)))
        sums = clusters.cluster_sums(cells, share.values, by=share.by)
        topics, levels = (np.array(names) for names in zip(*sums.clusters, strict=True))
        both = bootstrap.two_way(sums, share.statistic, topics, levels)
        ends = [float(x[0]) for x in (one.estimate, one.low, one.high, both.low, both.high)]
        factor = "verbs" if table.treatment.iloc[0] == "T1" else "wrapper families"
        wider = (ends[4] - ends[3]) / (ends[2] - ends[1]) if ends[2] > ends[1] else np.nan
        rows.append((claim, quantity, factor, n_topics, n_levels, *ends, wider))
    if not rows:
        return NotDefined("Two samples need pairs of at least two wrapper families, or of two verbs.")
    columns = ["claim", "quantity", "drawn with topics", "topics", "levels", "estimate", "low", "high", "low both"]
    return pd.DataFrame(rows, columns=[*columns, "high both", "wider"])


def _carried(table: pd.DataFrame) -> Quantity | None:
    treatment = summaries.primary(table)
    hand_over = mechanisms.hand_over_layer(table, treatment, "discover")
    if hand_over.empty:
        return None
    effects = signed_contrast(table, treatment, list(HELD), split=None)
    return mechanisms.path_shares(effects, int(hand_over.layer.iloc[0]), paths=WITH_OWN)


# Claim, key number, the table that it is computed from, and how.
KEY_NUMBERS: tuple[tuple[str, str, str, Callable[[pd.DataFrame], Quantity | None]], ...] = (
    ("C1", "late share", "layers", lambda t: late_share(signed_contrast(t, split=None), t.layer.max() + 1)),
    ("C1", COMPUTED, "computed", lambda t: late_share(signed(t), t.layer.max() + 1)),
    ("C2", "MLP share of direct effects", "modules", lambda t: mlp_share(summaries.written(t, summaries.primary(t)))),
    ("C3", PSI, "layers", lambda t: summaries.psi0(summaries.early_shared(t, t.layer.max() + 1))),
    ("C4", MLP_SHARE_WITH_OWN, "carried", _carried),
)
