"""Plants in a real model: where mediation finds what training added, beside where the model was trained.

`smollm2-refuser-mlp` is `smollm2` after training of its MLPs only, and so on. We subtract the model as it was, and ask where
what training *added* passes and is written. Frozen parts may turn what a trained part writes into the refusal, also at tokens
where we do not look. So a small share of a trained part is no mistake of the method; one larger than where everything was
trained confirms it (`trained_places`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from companion.base import files, folders, paths, smollm2, thresholds
from companion.calibration import truths
from companion.calibration.campaign import SCHEMAS, code_version, read_shipped, run_campaign
from companion.mediation import estimands, study, summaries, sweeps
from companion.stats import clusters
from companion.stats.bootstrap import interval

MEANING = {"total": "passes through (indirect effect)", "direct": "writes (direct effect)"}
PROMPTS, PAIRS = "english", 40  # pairs a treatment, each of another topic; the training saw none of them
THIRDS = ("early", "middle", "late")
TRAINED, ELSE = "all that was trained", "all else"
TRAINED_IN = {  # how the figure calls the parts
    "all": "everything", "attention": "attention", "mlp": "MLPs", "early": "first third", "late": "last third",
}  # fmt: skip
PART = {"attn_out": "attention", "mlp_out": "mlp"}  # what the part is called that holds the parameters of a site


@cache
def real_effects(model: str) -> pd.DataFrame:
    """Total and direct effects of all components at the last token, for T1 and T2 - T2b: columns of `estimands`, log-odds.

    Pairs are of all splits: nothing is chosen on any of them, not even a sign.
    """
    this = study.begin(model, PROMPTS, model)
    this = replace(this, pairs=tuple(this.of("T1", "T2", "T2b"))).subsample(PAIRS)
    wanted = estimands.mediators(this.subject, (*thresholds.COMPONENTS, *sweeps.DIRECT_SITES))
    found = estimands.measure_effects(this.subject, this.pairs, this.openers, wanted, ("Y1", "contrast.frozen"))
    return estimands.with_difference(found, this.twins)


def is_learned(part: str, site: str, third: str) -> bool:
    """Whether components of a site in a third of the layers were trained in a part, as `organisms.refuser` names parts.

    >>> is_learned("mlp", "mlp_out", "late"), is_learned("early", "attn_out", "late"), is_learned("all", "attn_out", "early")
    (True, False, True)
    """
    return part in ("all", third, PART[site])


def real_shares(part: str, after: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Where the effects of a trained model lie, those of the model before, and what training added to them.

    `after` and `before` are `real_effects` of the same pairs. A row is a treatment, an effect ("total", "direct"), whose it is
    (`of`: "refuser", "plain", "change" = refuser - plain, pair by pair) and a place: a site in a third of the layers, and unless
    all was trained everything that was, and everything else. `share`: its sum of effects over that of all components, with a
    BCa interval over topics; `size`: the share that evenly spread effects would give; `te`: mean total effect, log-odds.
    """
    tables = []
    for treatment in ("T1", "T2-T2b"):
        for effect in MEANING:
            one, other = (_by_place(table, treatment, effect) for table in (after, before))
            for of, found in {"refuser": one, "plain": other, "change": one - other}.items():
                made = _place_shares(part, found)
                tables.append(made.assign(treatment=treatment, effect=effect, of=of, pairs=len(found) // 6))
    return pd.concat(tables, ignore_index=True).assign(kind=part)


def _by_place(effects: pd.DataFrame, treatment: str, effect: str) -> pd.DataFrame:
    """NIE summed over the components of each place, and TE, by (pair_id, topic, site, third)."""
    table = summaries.averaged(truths.effects_of(effects, treatment, effect))
    at = thresholds.depth(table.layer, int(table.layer.max()) + 1)
    third = np.array(THIRDS)[(at > thresholds.EARLY).astype(int) + (at > thresholds.LATE)]
    table = table.assign(site=table.site.str.removesuffix(".direct"), third=third)
    return table.groupby(["pair_id", "topic", "site", "third"]).agg(nie=("nie", "sum"), te=("te", "mean"))


def _place_shares(part: str, found: pd.DataFrame) -> pd.DataFrame:
    """Where, learned, size, share, low, high, te and topics of one of the tables of `_by_place`."""
    sums = clusters.cluster_sums(found.reset_index(), "nie", by=["site", "third"])
    cells = sums.columns
    learned = np.array([is_learned(part, cell.site, cell.third) for cell in cells.itertuples()])
    places = [site.removesuffix("_out") + " " + third for site, third in zip(cells.site, cells.third, strict=True)]
    which = np.vstack([np.eye(len(cells)), learned, ~learned])
    made = interval(sums, clusters.ratio(which, np.ones_like(which)))
    labels = pd.DataFrame({"where": [*places, TRAINED, ELSE], "learned": [*learned, True, False]})
    table = made.to_frame(labels).rename(columns={"estimate": "share", "n_clusters": "topics"})
    table = table.assign(size=which.mean(axis=1), te=found.te.mean())
    return table.iloc[: len(cells)] if learned.all() else table


def trained_places(table: pd.DataFrame) -> pd.DataFrame:
    """Of what training added to T1, the share in each place and in all that was trained: a row a plant, effect and place.

    Columns kind, effect, place, learned, estimate, low, high, and for all that was trained `in_refuser`, the share of the same
    places where everything may learn (mostly late layers): only a share above that shows that we see where a plant was trained.
    """
    change = table[(table.of == "change") & (table.treatment == "T1") & (table["where"] != ELSE)]
    whole = change[change.kind == "all"].drop_duplicates("effect")
    change = pd.concat([change, whole.assign(where=TRAINED, share=1.0, low=1.0, high=1.0)])
    places = [f"{site.removesuffix('_out')} {third}" for site in PART for third in THIRDS]
    order = {name: k for k, name in enumerate([*TRAINED_IN, *MEANING, *places, TRAINED])}
    change = change.sort_values(["effect", "kind", "where"], key=lambda names: names.map(order), kind="stable")
    named = {"kind": TRAINED_IN, "effect": MEANING, "where": {TRAINED: "framed, together"}}
    made = change.replace(named).rename(columns={"where": "place", "share": "estimate"})
    made = made[["kind", "effect", "place", "learned", "estimate", "low", "high"]].reset_index(drop=True)
    together = made.place == "framed, together"
    own, by = made[made.learned & ~together], ["kind", "effect"]
    same = own[own.kind == TRAINED_IN["all"]].set_index(["effect", "place"]).estimate.rename("in_refuser")
    same = own.join(same, on=["effect", "place"]).groupby(by).in_refuser.sum()
    return made.join(same, on=by).assign(in_refuser=lambda joined: joined.in_refuser.where(together))


def measure_real_plant(model: str) -> dict[str, pd.DataFrame]:
    """The rows of `real_plants` of a refuser by its name, against `smollm2`."""
    adapter = smollm2.refusers()[model]
    made = real_shares(adapter.name.rsplit("-", 1)[0], real_effects(model), real_effects(smollm2.NAME))
    sha256 = files.hash_file(adapter / folders.ADAPTER_WEIGHTS, {})
    return {"real_plants": made.assign(adapter=sha256, code=code_version())[list(SCHEMAS["real_plants"])]}


def run_real_plants(share: str = "1/1", folder: Path = paths.CALIBRATION) -> None:
    """Measure every refuser of seed 0 of this share that is not there yet; `smollm2` is fetched where it is missing."""
    shipped = read_shipped("real_plants", folder, or_empty=True)
    plan = {model: model for model, adapter in smollm2.refusers().items() if adapter.name.endswith("-0")}

    def is_shipped(model: str) -> bool:
        return smollm2.refusers()[model].name.removesuffix("-0") in set(shipped.kind)

    run_campaign(plan, measure_real_plant, ("real_plants",), is_shipped, share, folder)
