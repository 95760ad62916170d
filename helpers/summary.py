"""Summaries behind the figures: means, shares and increments per cell, each with an interval over topics.

Every function takes effect tables (or their joined relatives) and returns one tidy row per estimate, with `estimate`,
`low` and `high`; what a figure draws is exactly such a table, saved as CSV.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from helpers import bootstrap as bs
from helpers import stats
from helpers.evidence import signed, stratified
from helpers.evidence_rows import interval


def cell_means(table: pd.DataFrame, value: str = "nie", by: Sequence[str] = ("site", "layer")) -> pd.DataFrame:
    """Mean effect of every cell over all pairs of the table, with intervals and a simultaneous band.

    Columns: `by`, estimate, low, high, band_low, band_high, in the unit of the outcome. Cells that are zero by
    structure take no part in the band.
    """
    sums = stats.cluster_sums(table, value, by=list(by))
    estimates = interval(sums, stats.mean)
    band = bs.max_t_band(estimates)
    frame = estimates.to_frame(sums.columns[list(by)])
    return frame.assign(band_low=band.low, band_high=band.high)


def per_group(
    table: pd.DataFrame, group: str, value: str = "nie", by: Sequence[str] = ("site", "layer")
) -> pd.DataFrame:
    """`cell_means` within each value of a column (a treatment, a model), stacked; bands hold within a group."""
    parts = [cell_means(part, value, by).assign(**{group: name}) for name, part in table.groupby(group, sort=False)]
    return pd.concat(parts, ignore_index=True)


def share_of_te(table: pd.DataFrame, value: str = "nie", by: Sequence[str] = ("site", "layer")) -> pd.DataFrame:
    """Proportion mediated per cell: the effect summed over pairs by TE summed over pairs (never a mean of ratios)."""
    sums = stats.cluster_sums(table, [value, "te"], by=list(by))
    cells = sums.columns.loc[sums.columns["value"] == value, list(by)].reset_index(drop=True)
    n = len(cells)
    effect = np.eye(2 * n)[np.flatnonzero(sums.columns["value"] == value)]
    total = np.eye(2 * n)[np.flatnonzero(sums.columns["value"] == "te")]
    return interval(sums, stats.ratio(effect, total)).to_frame(cells)


def te_weighted(table: pd.DataFrame) -> pd.DataFrame:
    """Every effect of a pair multiplied by the pair's own TE, so that shares become sum(TE NIE) / sum(TE TE).

    This is the least-squares slope of NIE on TE through 0. It is defined where TE has either sign from pair to pair,
    as in an untrained network; a ratio of means would there divide noise by noise.
    """
    return table.assign(**{name: table[name] * table["te"] for name in ("nie", "nie0", "nie1")}, te=table["te"] ** 2)


def increments(table: pd.DataFrame, value: str = "nie") -> pd.DataFrame:
    """What each layer adds to the cumulative curve: psi(layer) - psi(layer - 1), with psi(-1) = 0, as shares of TE."""
    sums = stats.cluster_sums(table, [value, "te"], by=["layer"])
    layers = np.sort(table.layer.unique())
    column = {(row.value, row.layer): i for i, row in enumerate(sums.columns.itertuples())}
    weights = np.zeros((len(layers), len(column)))
    total = np.zeros_like(weights)
    for i, layer in enumerate(layers):
        weights[i, column[value, layer]] = 1
        total[i, column["te", layer]] = 1
        if i:
            weights[i, column[value, layers[i - 1]]] = -1
    return interval(sums, stats.ratio(weights, total)).to_frame(pd.DataFrame({"layer": layers}))


def harm_minus_benign(harm: pd.DataFrame, benign: pd.DataFrame) -> pd.DataFrame:
    """Each component's share of TE in the harm contrast, in the mean benign behaviour, and their difference.

    Topics are drawn within harm and within each benign behaviour. `contrast` is "harm", "benign" or "difference".
    """
    table = signed(pd.concat([harm, benign], ignore_index=True))
    sums = stats.cluster_sums(
        stratified(table[table.split == "test"]), ["nie", "te"], by=["treatment", "site", "layer"], strata="stratum"
    )
    columns = sums.columns
    cells = columns.loc[columns.treatment == harm.treatment.iloc[0], ["site", "layer"]].drop_duplicates()
    names = [harm.treatment.iloc[0], *sorted(benign.treatment.unique())]
    order = pd.MultiIndex.from_frame(columns[["value", "treatment", "site", "layer"]])

    def index(value: str, name: str) -> np.ndarray:
        wanted = [(value, name, cell.site, cell.layer) for cell in cells.itertuples()]
        return order.get_indexer(pd.MultiIndex.from_tuples(wanted))

    def statistic(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        psi = [total[:, index("nie", name)] / total[:, index("te", name)] for name in names]
        benign_mean = np.mean(psi[1:], axis=0)
        return np.concatenate([psi[0], benign_mean, psi[0] - benign_mean], axis=1)

    labels = pd.concat([cells.assign(contrast=name) for name in ("harm", "benign", "difference")])
    return interval(sums, statistic).to_frame(labels)
