"""Lesson 02: in which layers the decision arises, for all pairs, with intervals, and as evidence for C1 and C3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from companion.base.display import NotDefined
from companion.base.files import write_json, write_table
from companion.base.paths import results_dir
from companion.base.thresholds import MIN_TOTAL_EFFECT, UNTRAINED, deepest_early_layer
from companion.claims.corrected_rules import centroid_over_behaviours
from companion.claims.verdict import Rows
from companion.evidence import layers as evidence
from companion.evidence.layers import Layers
from companion.mediation import mechanisms, sweeps
from companion.mediation.study import Study, control_studies, control_study, other_shipped
from companion.mediation.summaries import VARIANTS, averaged, primary, select, share_of_te, signed_contrast, te_weighted

__all__ = ["Layers", "centroids", "computed_effects", "cumulative", "deepest_early_layer", "measure_layers",
           "measure_relatives", "passed_and_computed", "primary", "read_and_carried", "shares_by_treatment",
           "write_evidence"]  # fmt: skip


def measure_layers(study: Study) -> Layers:
    """Effects of residual stream, attention and MLP outputs of every layer at the last token, for all pairs.

    Both directions and both clean runs, in log-odds, T2 - T2b behind the others; kept as `02_layers.parquet`.
    """
    found = evidence.measure_layers(study, study.slug, full_response=True)
    write_table(found.effects, results_dir(study.slug) / "02_layers.parquet")
    write_json(sweeps.memory_plan(study), results_dir(study.slug) / "chunks.json")
    return found


def measure_relatives(study: Study, model: str, profile: str) -> dict[str, Layers]:
    """The same for the untrained twin, and for a shipped model's other seeds; kept as `02_relatives.parquet`.

    Their `study` is the model's own, so that no relative stays in memory.
    """
    found = {}
    for label, one in control_studies(study, model, profile):
        found[label] = replace(evidence.measure_layers(one, label, direct=True), study=study)
    table = pd.concat([one.effects.assign(model=label) for label, one in found.items()])
    write_table(table, results_dir(study.slug) / "02_relatives.parquet")
    return found


def cumulative(main: Layers, relatives: Mapping[str, Layers]) -> pd.DataFrame:
    """Share of TE in the last token's residual stream after each layer, of the model and of its untrained twin.

    `line` is a treatment, or "untrained twin", whose pairs are weighted by their own TE, since it has either sign. Columns
    model, line, layer, estimate, low, high, earliest (the first layer that masks allow), te (its mean).
    """
    family = {main.study.slug: main, **relatives}
    full = [label for label in relatives if label.startswith("full") and not label.endswith(UNTRAINED)]
    first, tables = main.study.main_treatment, []
    for name in (main.study.slug, *full[:1]):
        earliest = family[name].clean.query("treatment == @first").earliest.median()
        effects = family[name].effects
        lines = {one: signed_contrast(effects, one, ["resid_post"]) for one in dict.fromkeys((first, primary(effects)))}
        twin = averaged(select(family[name + UNTRAINED].effects, first, VARIANTS[0], ["resid_post"]))
        twin = twin.query("split == 'test'")
        lines["untrained twin"] = te_weighted(twin)
        for line, rows in lines.items():
            te = twin.te.mean() if line == "untrained twin" else rows.te.mean()
            tables.append(share_of_te(rows, by=["layer"]).assign(model=name, line=line, earliest=earliest, te=te))
    return pd.concat(tables)


def shares_by_treatment(effects: pd.DataFrame) -> pd.DataFrame | NotDefined:
    """Share of TE through each attention and MLP output, for T1, T2, T2b and T2 - T2b where TE is at least 0.5 log-odds."""
    te = effects[(effects.outcome == "Y1") & (effects.split == "test")].groupby("treatment").te.mean().abs()
    names = [name for name in ("T1", "T2", "T2b", "T2-T2b") if te.get(name, 0.0) >= MIN_TOTAL_EFFECT]
    if not names:
        return NotDefined("No treatment has a total effect of at least 0.5 log-odds.")
    return pd.concat([share_of_te(signed_contrast(effects, name)).assign(treatment=name) for name in names])


def centroids(main: Layers) -> pd.DataFrame | NotDefined:
    """Effect-weighted mean depth of harm and of each benign behaviour, and twice their difference, with intervals.

    The first interval of the difference draws topics, the second behaviours as well. Columns quantity, contrast, estimate,
    low, high; units are the network's depth.
    """
    rows = Rows(main.study.slug, pd.DataFrame(main.evidence))
    found, wide = rows.find("C1", "centroid difference"), centroid_over_behaviours(rows)
    if found is None or wide is None:
        return NotDefined(
            "This prompt set has no benign behaviour (treatments B1, B2, ...) with an effect to compare with."
        )
    own = rows.table[rows.table.quantity.str.match("centroid (B|T)")]
    harm = own.quantity.str.startswith("centroid T")
    own = own.assign(quantity=own.quantity.str.removeprefix("centroid "), contrast=np.where(harm, "harm", "benign"))
    both = pd.DataFrame([found, wide]).assign(contrast="difference")
    both["quantity"] = ["topics drawn", "topics and behaviours drawn"]
    table = pd.concat([own, both], ignore_index=True).rename(columns={"ci_low": "low", "ci_high": "high"})
    return table[["quantity", "contrast", "estimate", "low", "high"]]


def computed_effects(study: Study) -> pd.DataFrame | NotDefined:
    """Effects of what each attention and MLP output makes of wrapper and request together, in log-odds.

    Rows as those of the sweep, for T2 - T2b, kept as `02_computed.parquet`; not defined without twins of one token length.
    """
    found = mechanisms.interaction_effects(study)
    table = found if len(found) else NotDefined("No pair of T2 has a twin in T2b with as many tokens.")
    write_table(table, results_dir(study.slug) / "02_computed.parquet")
    return table


def passed_and_computed(effects: pd.DataFrame, computed: pd.DataFrame | NotDefined) -> pd.DataFrame | NotDefined:
    """Share of the TE of T2 - T2b that passes through each component, and that it computes; columns panel, site, layer, ..."""
    if isinstance(computed, NotDefined):
        return computed
    tables = {"passes through": effects, "computed here": computed.assign(position="last")}
    parts = [share_of_te(signed_contrast(table, "T2-T2b")).assign(panel=panel) for panel, table in tables.items()]
    return pd.concat(parts)


def read_and_carried(
    main: Layers, scores: Mapping[int, np.ndarray], topics: Sequence[str]
) -> pd.DataFrame | NotDefined:
    """By layer, AUROC of a probe on shared tokens and the share of TE that those tokens carry (psi0), with intervals.

    `scores` holds, for each layer, the probe's scores of test pairs, shape (pair, side). T1 only.
    """
    effects, rows = main.effects, pd.DataFrame(main.evidence)
    shared = effects[(effects.treatment == "T1") & (effects.position == "shared") & (effects.outcome == "Y1")]
    words = rows[rows.quantity == "AUROC bag of tokens"]
    if shared.empty or words.empty:
        return NotDefined("This prompt set has too few pairs of T1, which turn a harmless request into a harmful one.")
    areas = evidence.auroc({str(layer): values for layer, values in scores.items()}, topics)
    read = areas.to_frame(pd.DataFrame({"layer": [*scores, -1]})).iloc[:-1].assign(what="probe on activations (AUROC)")
    carried = share_of_te(shared[shared.split == "test"], "nie0", by=["layer"])
    carried = carried.assign(what="carried (share of total effect)")
    limits = dict(zip(["estimate", "low", "high"], words.iloc[0][["estimate", "ci_low", "ci_high"]], strict=True))
    bag = pd.DataFrame({"layer": list(scores), **limits, "what": "probe on words alone (AUROC)"})
    return pd.concat([read, bag, carried])


def write_evidence(
    main: Layers, relatives: Mapping[str, Layers], computed: pd.DataFrame | NotDefined, model: str, profile: str
) -> pd.DataFrame:
    """Write `02_evidence.csv`, all that verdicts on C1 and C3 read: the model, its relatives, and what each computes.

    Returns the rows of the run's own model.
    """
    study, family = main.study, {main.study.slug: main, **relatives}
    tables = {} if isinstance(computed, NotDefined) else {study.slug: computed}
    for name in other_shipped(model, profile):
        tables[name] = mechanisms.interaction_effects(control_study(study, model, name))
    rows = []
    for label, one in family.items():
        more = evidence.evidence_c1_computed(tables.get(label, pd.DataFrame()), label, study.subject.n_layers)
        rows += [*one.evidence, *more]
    table = pd.DataFrame(rows)
    write_table(table, results_dir(study.slug) / "02_evidence.csv")
    return table[table.model == study.slug]
