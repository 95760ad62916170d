"""The numbers that verdicts rest on: one row for each model, claim, quantity and variant, with an interval.

A claim's rule (in `claims`) reads these rows and nothing else. Choices that could be bent after the fact, such as which
components count as positive, are fixed on the discover split; every number is from the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from helpers import bootstrap as bs
from helpers import stats
from helpers.depth import LATE, depth
from helpers.errors import InputError
from helpers.evidence_rows import mean_row, row, share_row

COMPONENTS = ("attn_out", "mlp_out")
GATE = 0.5
SATURATED = 0.02


@dataclass(frozen=True)
class Variant:
    """One way to measure the same quantity: an outcome, a column of the effect table, and a subset of pairs."""

    name: str
    outcome: str = "Y1"
    value: str = "nie"
    unsaturated: bool = False


# The first is the estimate; the others are its robustness checks.
VARIANTS = (
    Variant("main"),
    Variant("sufficiency", value="nie0"),
    Variant("necessity", value="nie1"),
    Variant("full response", outcome="Y2"),
    Variant("norm frozen", outcome="Y1.frozen"),
    Variant("unsaturated", unsaturated=True),
)


def averaged(table: pd.DataFrame) -> pd.DataFrame:
    """Effects with `nie`, the mean of both directions, beside them."""
    return table.assign(nie=(table.nie0 + table.nie1) / 2)


def signed(table: pd.DataFrame, reference: pd.DataFrame | None = None) -> pd.DataFrame:
    """`averaged` effects, each treatment and outcome signed by its TE on discover.

    A subset is signed by the set it was taken from (`reference`): signed by itself it could never disagree.
    """
    columns = ["te", "nie0", "nie1"]
    source = table if reference is None else reference
    discover = source[source.split == "discover"]
    sign = np.sign(discover.groupby(["treatment", "outcome"])["te"].mean()).rename("sign").reset_index()
    joined = table.merge(sign, on=["treatment", "outcome"], how="left", validate="many_to_one")
    if joined["sign"].isna().any():
        lost = joined.loc[joined["sign"].isna(), "treatment"].iloc[0]
        raise InputError(f"{lost} has no pair in the discover split, which fixes its sign: give it more topics")
    return averaged(joined.assign(**{name: joined[name] * joined["sign"] for name in columns}).drop(columns="sign"))


def unsaturated_ids(table: pd.DataFrame) -> set[str]:
    """Pairs whose two clean runs both have p(comply | comply or refuse) between 0.02 and 0.98 (Y1)."""
    clean = table[table.outcome == "Y1"].drop_duplicates("pair_id")
    bound = np.log((1 - SATURATED) / SATURATED)
    return set(clean.loc[(clean.y00.abs() <= bound) & (clean.y11.abs() <= bound), "pair_id"])


def total_effects(clean: pd.DataFrame, model: str) -> list[dict[str, object]]:
    """TE of every treatment on test: the gate that any verdict must pass. `clean` has one row a pair."""
    groups = clean[clean.split == "test"].groupby("treatment", sort=False)
    return [mean_row(part, "te", model, "gate", f"TE {treatment}") for treatment, part in groups]


def positive_cells(discover: pd.DataFrame, value: str, columns: pd.DataFrame) -> Bool[np.ndarray, "column"]:
    """Which cells have a positive effect on discover, in the order of `columns`, whose keys name the cells.

    Positive means above 0 by a one-sided clustered t-test at 5 %: cells that are noise around 0 would put noise into
    the denominator of a share.
    """
    keys = [name for name in columns.columns if name in ("treatment", "site", "layer", "head")]
    positive = {}
    for cell, part in discover.groupby(keys):
        test = stats.clustered_t(part[[value]].to_numpy(), part["topic"].to_numpy())
        positive[cell] = bool(test.mean[0] > 0 and test.p[0] / 2 < 0.05)
    return np.array([positive[cell] for cell in columns[keys].itertuples(index=False, name=None)])


def share(
    table: pd.DataFrame, value: str, numerator: Callable[[pd.DataFrame], np.ndarray], scale: pd.Series | None = None
) -> bs.Estimates | None:
    """Share of the positive effects that the numerator's cells hold: a ratio of sums over pairs, on test.

    `numerator` picks cells from a frame with `site` and `layer`; `scale` (indexed by site, layer) divides each cell
    before it is summed, for effects per unit of patch norm or per parameter. None if no cell is positive on discover,
    as in a network that does nothing.
    """
    sums = stats.cluster_sums(table[table.split == "test"], value, by=["site", "layer"])
    positive = positive_cells(table[table.split == "discover"], value, sums.columns)
    if not positive.any():
        return None
    weight = positive.astype(float)
    if scale is not None:
        divisor = scale.loc[pd.MultiIndex.from_frame(sums.columns[["site", "layer"]])].to_numpy()
        # A component that cannot differ yet has patches of length 0, and no positive effect.
        weight = np.divide(weight, divisor, out=np.zeros_like(weight), where=positive)
    return bs.bootstrap(sums, stats.ratio(weight * numerator(sums.columns), weight))


def late_share(table: pd.DataFrame, n_layers: int, value: str = "nie") -> bs.Estimates | None:
    """Share of the positive component effects that lie in late layers (depth > 2/3)."""
    return share(table, value, lambda cells: depth(cells["layer"], n_layers) > LATE)


def mlp_share(table: pd.DataFrame, value: str = "nie", scale: pd.Series | None = None) -> bs.Estimates | None:
    """Share of the positive component effects that MLP outputs hold, against attention outputs."""
    return share(table, value, lambda cells: cells["site"].str.startswith("mlp_out").to_numpy(), scale)


def centroids(
    harm: pd.DataFrame, benign: pd.DataFrame, n_layers: int, value: str = "nie"
) -> tuple[bs.Estimates, int, list[str]]:
    """Effect-weighted mean depth of the positive components: harm - benign, then each treatment's own.

    Entry 0 is the difference between the harm contrast and the mean over the benign behaviours; the others follow the
    returned list of names, harm first. Topics are drawn within harm and within each benign behaviour.
    """
    table = pd.concat([harm, benign], ignore_index=True)
    test = stratified(table[table.split == "test"])
    sums = stats.cluster_sums(test, value, by=["treatment", "site", "layer"], strata="stratum")
    weight = positive_cells(table[table.split == "discover"], value, sums.columns).astype(float)
    at = depth(sums.columns["layer"], n_layers)
    names = [harm.treatment.iloc[0], *sorted(benign.treatment.unique())]
    member = np.stack([(sums.columns["treatment"] == name).to_numpy() for name in names])

    def statistic(
        total: Float[np.ndarray, "rep column"], count: Float[np.ndarray, "rep column"]
    ) -> Float[np.ndarray, "rep stat"]:
        own = (total @ (member * weight * at).T) / (total @ (member * weight).T)
        return np.concatenate([own[:, :1] - own[:, 1:].mean(axis=1, keepdims=True), own], axis=1)

    return bs.bootstrap(sums, statistic), harm.loc[harm.split == "test", "pair_id"].nunique(), names


def stratified(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a `stratum`: the treatments that a topic serves; topics alone in theirs join the largest one."""
    serves = table.groupby("topic")["treatment"].agg(lambda names: " ".join(sorted(set(names))))
    sizes = serves.value_counts()
    return table.assign(stratum=table["topic"].map(serves.where(serves.map(sizes) > 1, sizes.index[0])))


def primary(table: pd.DataFrame) -> str:
    """The treatment that stands for generation: T2 - T2b where twins exist, else T2, else the first there is."""
    present = list(dict.fromkeys(table.treatment))
    return next((name for name in ("T2-T2b", "T2") if name in present), present[0])


def select(table: pd.DataFrame, treatment: str, variant: Variant, sites: Sequence[str] = COMPONENTS) -> pd.DataFrame:
    """Rows of one treatment, outcome and set of sites at the last token, restricted to unsaturated pairs on demand."""
    chosen = table[(table.treatment == treatment) & (table.outcome == variant.outcome) & (table.position == "last")]
    chosen = chosen[chosen.site.isin(sites)]
    if variant.unsaturated:
        source = table[table.treatment == "T2"] if treatment == "T2-T2b" else table[table.treatment == treatment]
        chosen = chosen[chosen.pair_id.isin(unsaturated_ids(source))]
    return chosen


def enough(table: pd.DataFrame, least: int = 2) -> bool:
    """True if discover and test both hold pairs of at least `least` topics."""
    return all(table.loc[table.split == split, "topic"].nunique() >= least for split in ("discover", "test"))


def c1(table: pd.DataFrame, model: str, n_layers: int) -> list[dict[str, object]]:
    """C1, generation arises late: the late share in all variants, and the centroid difference harm - benign."""
    treatment, rows = primary(table), []
    for variant in VARIANTS:
        whole = select(table, treatment, replace(variant, unsaturated=False))
        chosen = select(table, treatment, variant)
        if enough(chosen):
            estimates = late_share(signed(chosen, whole), n_layers, variant.value)
            rows += share_row(model, "C1", "late share", variant.name, estimates, chosen)
    benign = usable_benign(table)
    if len(benign) and rows and rows[0]["variant"] == "main":
        harm = signed(select(table, treatment, VARIANTS[0]))
        estimates, n_pairs, names = centroids(harm, benign, n_layers)
        test = pd.concat([harm, benign]).query("split == 'test'").groupby("treatment")
        sizes = test.agg(n_pairs=("pair_id", "nunique"), n_topics=("topic", "nunique")).to_dict("index")
        named = [("centroid difference", names[0]), *((f"centroid {name}", name) for name in names)]
        for i, (quantity, name) in enumerate(named):
            rows.append(row(model, "C1", quantity, "main", estimates, n_pairs, i) | sizes[name])
    return rows


def usable_benign(table: pd.DataFrame) -> pd.DataFrame:
    """Component effects of the benign behaviours that have some, and whose TE passes the gate on discover."""
    kept = []
    for name in sorted(name for name in set(table.treatment) if name.startswith("B")):
        part = select(table, name, VARIANTS[0])
        discover = part[part.split == "discover"]
        if enough(part) and abs(discover.te.mean()) >= GATE:
            part = signed(part)
            cells = part[["site", "layer"]].drop_duplicates()
            kept += [part] if positive_cells(part[part.split == "discover"], "nie", cells).any() else []
    return pd.concat(kept, ignore_index=True) if kept else table.iloc[:0]


def c2(
    totals: pd.DataFrame, direct: pd.DataFrame, model: str, scales: Mapping[str, pd.Series]
) -> list[dict[str, object]]:
    """C2, MLP not attention: MLP share of total (NIE) and of direct effects, raw and under each normalisation.

    `scales` maps a normalisation to its divisor by (site, layer). Direct effects are those of the frozen-norm linear
    contrast, which add up to its total effect.
    """
    rows: list[dict[str, object]] = []
    treatment = primary(totals)
    if treatment not in ("T2", "T2-T2b"):
        return rows
    for variant in VARIANTS:
        whole = select(totals, treatment, replace(variant, unsaturated=False))
        chosen = select(totals, treatment, variant)
        if enough(chosen):
            estimates = mlp_share(signed(chosen, whole), variant.value)
            rows += share_row(model, "C2", "MLP share of NIE", variant.name, estimates, chosen)
    linear = Variant("main", outcome="contrast.frozen")
    sites = [f"{site}.direct" for site in COMPONENTS]
    written = signed(select(direct, treatment, linear, sites))
    written = written.assign(site=written.site.str.removesuffix(".direct"))
    total = signed(select(totals, treatment, VARIANTS[0]))
    for quantity, effects in (("MLP share of NIE", total), ("MLP share of direct effects", written)):
        raw = {} if effects is total else {"main": None}  # the raw total is the first variant above
        for name, scale in {**raw, **scales}.items():
            if enough(effects):
                rows += share_row(model, "C2", quantity, name, mlp_share(effects, scale=scale), effects)
    return rows
