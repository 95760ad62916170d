"""Effects of neurons as arrays of pairs by neurons, and the table made of them: means, intervals, tests, ranking.

A neuron is one entry of a down projection's input. `helpers.neuron_effects` measures them, `helpers.neuron_sets` sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats as st

from helpers import stats
from helpers.errors import InputError

# One row: one neuron's mean effects over the pairs of a split, signed by TE on discover; the interval is of the mean of
# `nie0` and `nie1`. `exact` is False where only a gradient estimate is known.
NEURONS = {
    **dict.fromkeys(("treatment", "split"), "str"),
    **dict.fromkeys(("layer", "neuron"), "int"),
    **dict.fromkeys(("te", "nie0", "nie1", "direct", "ci_low", "ci_high", "q_value"), "float"),
    "exact": "bool",
}
SPLITS = ("discover", "validate", "test", "all")
FLOOR = 0.01  # an effect below this share of TE is not counted, however sure
LEVEL = 0.05


@dataclass(frozen=True)
class PairEffects:
    """Effects of many mediators on the pairs of one treatment, in log-odds, not signed.

    `pairs` has a row a pair (pair_id, topic, split, te; `unsaturated`: both clean runs, for a contrast those of the harmful
    pair, have p in [0.02, 0.98]), `columns` a row a mediator (layer and neuron, or a set);
    `values` holds arrays (pair, column) by name: "nie0", "nie1", and for neurons "direct".
    """

    treatment: str
    pairs: pd.DataFrame
    columns: pd.DataFrame
    values: Mapping[str, Float[np.ndarray, "pair column"]]

    @property
    def nie(self) -> Float[np.ndarray, "pair column"]:
        """The mean of both directions."""
        return (self.values["nie0"] + self.values["nie1"]) / 2


def difference(harmful: PairEffects, twin: PairEffects, twins: Mapping[str, str]) -> PairEffects:
    """T2 - T2b, pair by pair: each T2 pair minus its harmless twin; T2 pairs without one are left out."""
    place = pd.Series(np.arange(len(twin.pairs)), index=twin.pairs.pair_id)
    partner = harmful.pairs.pair_id.map(twins).map(place)
    has_twin = partner.notna().to_numpy()
    at = partner[has_twin].astype(int).to_numpy()
    pairs = harmful.pairs[has_twin].reset_index(drop=True)
    pairs = pairs.assign(te=pairs.te - twin.pairs.te.to_numpy()[at])
    values = {name: values[has_twin] - twin.values[name][at] for name, values in harmful.values.items()}
    return PairEffects(f"{harmful.treatment}-{twin.treatment}", pairs, harmful.columns, values)


def sign_on_discover(pairs: pd.DataFrame) -> float:
    """The sign of the mean TE on discover, by which a treatment's effects are signed."""
    discover = pairs.te[pairs.split == "discover"]
    if discover.empty:
        raise InputError("no pair is in the discover split, which fixes the sign of the effects: give it more topics")
    return 1.0 if discover.mean() >= 0 else -1.0


def signed(effects: PairEffects) -> PairEffects:
    """The same effects, multiplied by the sign of TE on discover."""
    sign = sign_on_discover(effects.pairs)
    values = {name: sign * values for name, values in effects.values.items()}
    return replace(effects, pairs=effects.pairs.assign(te=sign * effects.pairs.te), values=values)


def in_split(effects: PairEffects, split: str) -> PairEffects:
    """The pairs of one split, or all of them."""
    keep = np.ones(len(effects.pairs), bool) if split == "all" else (effects.pairs.split == split).to_numpy()
    values = {name: values[keep] for name, values in effects.values.items()}
    return replace(effects, pairs=effects.pairs[keep].reset_index(drop=True), values=values)


def in_columns(effects: PairEffects, keep: Bool[np.ndarray, "column"]) -> PairEffects:
    """Some of the mediators."""
    values = {name: array[:, keep] for name, array in effects.values.items()}
    return replace(effects, columns=effects.columns[keep].reset_index(drop=True), values=values)


def last_layer(effects: PairEffects) -> PairEffects:
    """The neurons of the last layer only."""
    return in_columns(effects, (effects.columns.layer == effects.columns.layer.max()).to_numpy())


def table(effects: PairEffects) -> pd.DataFrame:
    """One row for each neuron and split (`NEURONS`): means over pairs, interval by topic, Benjamini-Yekutieli q-value.

    Neurons that are 0 in every pair, because nothing can have reached them, are not tested (q = 1). A split of a
    single topic has no interval.
    """
    effects = signed(effects)
    can_differ = np.any([np.any(values != 0, axis=0) for values in effects.values.values()], axis=0)
    parts = [_split_table(in_split(effects, split), split, can_differ) for split in SPLITS]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)[list(NEURONS)]


def _split_table(part: PairEffects, split: str, can_differ: Bool[np.ndarray, "column"]) -> pd.DataFrame:
    n = len(part.columns)
    if part.pairs.empty:
        return pd.DataFrame()
    means = {name: values.mean(0) for name, values in part.values.items()}
    half, q = np.where(can_differ, np.inf, 0.0), np.ones(n)
    if part.pairs.topic.nunique() > 1:
        test = stats.clustered_t(part.nie, part.pairs.topic.to_numpy())
        half = st.t.isf(0.025, test.df) * test.se
        if can_differ.any():
            q[can_differ] = stats.by_adjust(test.p[can_differ])
    middle = part.nie.mean(0)
    return part.columns.assign(
        treatment=part.treatment, split=split, te=part.pairs.te.mean(), **means,
        ci_low=middle - half, ci_high=middle + half, q_value=q, exact=True,
    )  # fmt: skip


def passing(rows: pd.DataFrame) -> Bool[np.ndarray, "row"]:
    """Which rows of a neuron table count: q-value at most 0.05, and |NIE| at least 1 % of |TE|."""
    middle = (rows.nie0 + rows.nie1) / 2
    return ((rows.q_value <= LEVEL) & (middle.abs() >= FLOOR * rows.te.abs()) & rows.exact).to_numpy()


def ranking(rows: pd.DataFrame, treatment: str, layer: int, *, by_sign: bool = False) -> Int[np.ndarray, "neuron"]:
    """Neurons of a layer from a neuron table, the largest |mean NIE| on discover first.

    With `by_sign` those that push with the treatment come first and those against it last. By size is what sets are
    built from: by sign, hundreds of tiny positive means would be added up before the first negative one.
    """
    chosen = rows[(rows.treatment == treatment) & (rows.split == "discover") & (rows.layer == layer)]
    if chosen.empty:
        raise InputError(f"the neuron table has no rows of {treatment}, layer {layer}, on discover: run notebook 04")
    size = ((chosen.nie0 + chosen.nie1) / 2).to_numpy()
    return chosen.neuron.to_numpy()[np.argsort(-(size if by_sign else abs(size)), kind="stable")]
