"""Summaries of effect tables: signed effects, shares, centroids and means per cell, with intervals over topics.

Choices such as which components count as positive are fixed on discover; numbers that verdicts rest on are from test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from companion.base.errors import InputError
from companion.base.thresholds import COMPONENTS, LATE, SATURATED, deepest_early_layer, depth
from companion.stats import bootstrap, clusters
from companion.stats.bootstrap import Quantity, interval


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
    """`averaged` effects, each treatment and outcome signed by its TE on discover; a subset by the whole (`reference`)."""
    source = table if reference is None else reference
    discover = source[source.split == "discover"]
    signs = np.sign(discover.groupby(["treatment", "outcome"])["te"].mean()).rename("sign").reset_index()
    joined = table.merge(signs, on=["treatment", "outcome"], how="left", validate="many_to_one")
    sign = joined.pop("sign")
    if sign.isna().any():
        lost = joined.loc[sign.isna(), "treatment"].iloc[0]
        raise InputError(f"{lost} has no pair in the discover split, which fixes its sign: give it more topics")
    return averaged(joined.assign(**{name: joined[name] * sign for name in ("te", "nie0", "nie1")}))


def unsaturated_ids(table: pd.DataFrame) -> set[str]:
    """Pairs whose two clean runs both have p(comply | comply or refuse) between 0.02 and 0.98 (Y1)."""
    clean = table[table.outcome == "Y1"].drop_duplicates("pair_id")
    bound = np.log((1 - SATURATED) / SATURATED)
    return set(clean.loc[(clean.y00.abs() <= bound) & (clean.y11.abs() <= bound), "pair_id"])


def positive_cells(discover: pd.DataFrame, columns: pd.DataFrame, value: str = "nie") -> Bool[np.ndarray, "column"]:
    """Which cells (`columns`) are above 0 on discover (one-sided clustered t, 5 %): noise would spoil a share's denominator."""
    keys, positive = [name for name in columns.columns if name != "value"], {}
    for cell, part in discover.groupby(keys):
        test = clusters.clustered_t(part[[value]].to_numpy(), part["topic"].to_numpy())
        positive[cell] = bool(test.mean[0] > 0 and test.p[0] / 2 < 0.05)
    return np.array([positive[cell] for cell in columns[keys].itertuples(index=False, name=None)])


def late_share(table: pd.DataFrame, n_layers: int, value: str = "nie") -> Quantity | None:
    """Share of the positive component effects that lie in late layers (depth > 2/3)."""
    return _share(table, value, lambda cells: depth(cells["layer"], n_layers) > LATE)


def mlp_share(table: pd.DataFrame, value: str = "nie", scale: pd.Series | None = None) -> Quantity | None:
    """Share of the positive component effects that MLP outputs hold, against attention outputs; `scale` divides effects."""
    return _share(table, value, lambda cells: cells["site"].str.startswith("mlp_out").to_numpy(), scale)


def _share(
    table: pd.DataFrame, value: str, numerator: Callable[[pd.DataFrame], np.ndarray], scale: pd.Series | None = None
) -> Quantity | None:
    """Share of the positive effects that the numerator's cells hold: a ratio of sums over pairs, on test.

    `scale` (indexed by site, layer) divides each cell before it is summed (see `study.normalisations`). None if discover or
    test has fewer than two topics, or no cell is positive on discover.
    """
    test, keys = table[table.split == "test"], ["site", "layer"]
    cells = test[keys].drop_duplicates().sort_values(keys)
    if not enough(table) or not (positive := positive_cells(table[table.split == "discover"], cells, value)).any():
        return None
    weight = positive.astype(float)
    if scale is not None:
        divisor = scale.loc[pd.MultiIndex.from_frame(cells)].to_numpy()
        # A component that cannot differ yet has patches of length 0, and no positive effect.
        weight = np.divide(weight, divisor, out=np.zeros_like(weight), where=positive)
    return Quantity(test, [value], keys, clusters.ratio(weight * numerator(cells), weight))


def written(direct: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """What attention and MLP outputs write themselves: signed direct effects in the frozen-norm linear contrast."""
    sites = [f"{site}.direct" for site in COMPONENTS]
    return signed_contrast(direct, treatment, sites, outcome="contrast.frozen", split=None)


def early_shared(table: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """T1's effects (Y1) of the residual stream of shared tokens at the deepest early layer, on test."""
    at = table[(table.layer == deepest_early_layer(n_layers)) & (table.position == "shared")]
    return at[(at.treatment == "T1") & (at.split == "test") & (at.outcome == "Y1")]


def psi0(effects: pd.DataFrame) -> Quantity | None:
    """Share of TE that one mediator is sufficient for: a ratio of means over pairs; None for fewer than two topics."""
    statistic = clusters.ratio([True, False], [False, True])
    return Quantity(effects, ["nie0", "te"], [], statistic) if effects.topic.nunique() >= 2 else None


def centroids(harm: pd.DataFrame, benign: pd.DataFrame, n_layers: int) -> tuple[bootstrap.Estimates, list[str]]:
    """Effect-weighted mean depth of the positive components: harm - mean over benign behaviours, then each of the names.

    Harm is the first name. Topics are drawn within harm and within each benign behaviour.
    """
    table = pd.concat([harm, benign], ignore_index=True)
    # A stratum is the treatments that a topic serves; topics alone in theirs join the largest one.
    test = table[table.split == "test"]
    serves = test.groupby("topic")["treatment"].agg(lambda names: " ".join(sorted(set(names))))
    sizes = serves.value_counts()
    test = test.assign(stratum=test["topic"].map(serves.where(serves.map(sizes) > 1, sizes.index[0])))
    sums = clusters.cluster_sums(test, "nie", by=["treatment", "site", "layer"], strata="stratum")
    weight = positive_cells(table[table.split == "discover"], sums.columns).astype(float)
    at = depth(sums.columns["layer"], n_layers)
    names = [harm.treatment.iloc[0], *sorted(benign.treatment.unique())]
    member = np.stack([(sums.columns["treatment"] == name).to_numpy() for name in names])

    def statistic(total: np.ndarray, count: np.ndarray) -> Float[np.ndarray, "rep stat"]:
        own = (total @ (member * weight * at).T) / (total @ (member * weight).T)
        return np.concatenate([own[:, :1] - own[:, 1:].mean(axis=1, keepdims=True), own], axis=1)

    return bootstrap.bootstrap(sums, statistic), names


def primary(table: pd.DataFrame) -> str:
    """The treatment that stands for generation: T2 - T2b where twins exist, else T2, else the first there is."""
    present = list(table.treatment.unique())
    return next((name for name in ("T2-T2b", "T2") if name in present), present[0])


def select(table: pd.DataFrame, treatment: str, variant: Variant, sites: Sequence[str] = COMPONENTS) -> pd.DataFrame:
    """Rows of one treatment, outcome and set of sites at the last token, restricted to unsaturated pairs on demand."""
    chosen = table[(table.treatment == treatment) & (table.outcome == variant.outcome) & (table.position == "last")]
    chosen = chosen[chosen.site.isin(sites)]
    if variant.unsaturated:
        source = table[table.treatment == "T2"] if treatment == "T2-T2b" else table[table.treatment == treatment]
        chosen = chosen[chosen.pair_id.isin(unsaturated_ids(source))]
    return chosen


def signed_variant(
    table: pd.DataFrame, treatment: str, variant: Variant, sites: Sequence[str] = COMPONENTS
) -> pd.DataFrame | None:
    """`select`ed effects, signed by those of all pairs; None where a variant was not measured on enough topics."""
    whole, chosen = (select(table, treatment, one, sites) for one in (replace(variant, unsaturated=False), variant))
    return signed(chosen, whole) if enough(chosen) else None


def signed_contrast(
    table: pd.DataFrame, treatment: str | None = None, sites: Sequence[str] = COMPONENTS, *, outcome: str = "Y1",
    split: str | None = "test",
) -> pd.DataFrame:  # fmt: skip
    """Effects with `nie` at the last token, signed on discover: of a treatment (None: `primary`) and split (None: all)."""
    chosen = signed(select(table, treatment or primary(table), Variant("main", outcome=outcome), sites))
    chosen = chosen if split is None else chosen[chosen.split == split]
    return chosen.assign(site=chosen.site.str.removesuffix(".direct"))


def enough(table: pd.DataFrame) -> bool:
    """True if discover and test both hold pairs of at least two topics."""
    return all(table.loc[table.split == split, "topic"].nunique() >= 2 for split in ("discover", "test"))


def cell_means(table: pd.DataFrame, value: str = "nie", by: Sequence[str] = ("site", "layer")) -> pd.DataFrame:
    """Mean effect of every cell with intervals and a simultaneous band: `by`, estimate, low, high, ..., band_low, band_high."""
    sums = clusters.cluster_sums(table, value, by=by)
    estimates = interval(sums, clusters.mean)
    low, high = bootstrap.max_t_band(estimates)
    return estimates.to_frame(sums.columns[list(by)]).assign(band_low=low, band_high=high)


def share_of_te(table: pd.DataFrame, value: str = "nie", by: Sequence[str] = ("site", "layer")) -> pd.DataFrame:
    """Proportion mediated per cell: the effect summed over pairs by TE summed over pairs (never a mean of ratios)."""
    sums = clusters.cluster_sums(table, [value, "te"], by=by)
    cells = sums.columns.loc[sums.columns["value"] == value, list(by)]
    effect, total = (np.eye(2 * len(cells))[sums.columns["value"] == name] for name in (value, "te"))
    return interval(sums, clusters.ratio(effect, total)).to_frame(cells)


def te_weighted(table: pd.DataFrame) -> pd.DataFrame:
    """Effects times the pair's own TE: shares become slopes sum(TE NIE) / sum(TE TE), defined where TE has either sign."""
    return table.assign(**{name: table[name] * table["te"] for name in ("nie", "nie0", "nie1")}, te=table["te"] ** 2)
