"""Gate or contributor: the four tests of a set of neurons, each a ratio of means over pairs with an interval by topic.

A contributor adds its own share to the outcome, whatever the rest of the network does. A gate decides whether something
else gets through: close it and the upstream signal is lost, open it without a signal and nothing happens. In a factorial
experiment with the switches *signal* (first digit) and *set* (second digit) a contributor leaves the interaction
y11 - y10 - y01 + y00 at zero, a gate makes it as large as the whole effect y11 - y00.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from helpers import bootstrap as bs
from helpers import stats
from helpers.evidence_rows import interval

FEW = 8  # a sparse set: 1 % of the layer's neurons or this many, whichever is more
LEAST = 0.2  # share of |TE| that must be at stake for an index to be defined
GATE_LOW, GATE_HIGH = 0.6, 0.2
READOUT = 0.5  # ours: a set that writes half of its effect itself is a readout
BENIGN_SHARE, PERPLEXITY = 0.20, 1.01


@dataclass(frozen=True)
class Index:
    """A gate index: `signed` with its interval (negative: one of several would do, an OR), and its absolute value.

    `at_stake` is |y11 - y00| over |TE|, and `own` the larger of the set's two effects over |TE|, both on discover (inside
    a neuron, where both switches belong to the set, the two are the same).
    """

    signed: bs.Estimates
    estimate: float
    low: float
    high: float
    at_stake: float
    own: float
    n_pairs: int

    @property
    def is_defined(self) -> bool:
        """Enough is at stake, and the set takes part in it: decided on discover."""
        return min(self.at_stake, self.own) >= LEAST


def sparse_size(d_mlp: int) -> int:
    """How many neurons a sparse set has.

    >>> sparse_size(384), sparse_size(11008)
    (8, 110)
    """
    return min(d_mlp, max(FEW, d_mlp // 100))


def absolute(estimate: float, low: float, high: float) -> tuple[float, float, float]:
    """Absolute value of an estimate and the interval of it: from 0 where the signed interval holds 0.

    >>> absolute(-0.5, -0.7, -0.25)
    (0.5, 0.25, 0.7)
    >>> absolute(0.1, -0.3, 0.2)
    (0.1, 0.0, 0.3)
    """
    ends = (abs(low), abs(high))
    return abs(estimate), 0.0 if low <= 0 <= high else min(ends), max(ends)


def select(
    table: pd.DataFrame, treatment: str, name: str, form: str, outcome: str, split: str | None = None
) -> pd.DataFrame:
    """Rows of one treatment, set, form and outcome, in one split or in all."""
    keep = (table.treatment == treatment) & (table["set"] == name) & (table.form == form) & (table.outcome == outcome)
    return table[keep if split is None else keep & (table.split == split)]


def gate_index(part: pd.DataFrame) -> Index | None:
    """Interaction over whole effect, pooled over the test pairs; None where discover or test has no pairs.

    Whether the index is defined is decided on discover, by means: choosing single pairs by the size of their own
    denominator would bias a ratio.
    """
    discover, test = (part[part.split == split] for split in ("discover", "test"))
    if discover.empty or test.empty or not (test.y11 - test.y00).any():
        return None
    both = pd.DataFrame({"topic": test.topic, "span": test.y11 - test.y00, "interaction": interaction(test)})
    signed = interval(stats.cluster_sums(both, ["interaction", "span"]), stats.ratio([1, 0], [0, 1]))
    middle, low, high = absolute(signed.estimate[0], signed.low[0], signed.high[0])
    means = discover[["y00", "y01", "y10", "y11", "te"]].mean()
    unit = max(abs(float(means.te)), float(np.finfo(float).tiny))
    at_stake = abs(means.y11 - means.y00) / unit
    own = max(abs(means.y01 - means.y00), abs(means.y11 - means.y10)) / unit
    own = own if part.form.isin(["upstream", "write"]).all() else at_stake
    return Index(signed, float(middle), float(low), float(high), at_stake, own, len(test))


def interaction(part: pd.DataFrame) -> pd.Series:
    """What the two switches do together beyond the sum of what each does alone, in every pair."""
    return part.y11 - part.y10 - part.y01 + part.y00


def set_effect(part: pd.DataFrame) -> pd.Series:
    """(NIE0 + NIE1) / 2 of the set in every pair, from the cells of the upstream experiment."""
    return (part.y01 - part.y00 + part.y11 - part.y10) / 2


def readout_share(table: pd.DataFrame, treatment: str, name: str, split: str = "test") -> bs.Estimates | None:
    """Share of the set's effect on Y1 that it writes itself: a_j w_j . (u_comply - u_refuse), final norm frozen.

    The numerator is the set's write into the last residual stream scored by the frozen-norm linear contrast, the
    denominator its whole effect; both are means of both directions. None where there is nothing to divide.
    """
    whole = select(table, treatment, name, "upstream", "Y1", split).set_index("pair_id")
    write = select(table, treatment, name, "write", "contrast.frozen", split).set_index("pair_id")
    both = pd.DataFrame({"topic": whole.topic, "write": set_effect(write), "whole": set_effect(whole)})
    if both.empty or not both.whole.any():
        return None
    return interval(stats.cluster_sums(both, ["write", "whole"]), stats.ratio([1, 0], [0, 1]))


def benign_share(table: pd.DataFrame, treatment: str, name: str, benign: list[str]) -> bs.Estimates | None:
    """Mean |effect| of the set on benign behaviours over its |effect| on harm, in log-odds.

    Each effect gets the sign that it has on discover, so that on test noise around zero is not counted as an effect.
    None where the prompt set has no benign behaviour.
    """
    parts = []
    for column in [treatment, *benign]:
        part = select(table, column, name, "upstream", "Y1")
        effect = set_effect(part)
        sign = -1.0 if effect[part.split == "discover"].mean() < 0 else 1.0
        parts.append(part.assign(effect=sign * effect)[part.split == "test"])
    test = pd.concat(parts)
    if not benign or test.empty or not test.effect.any():
        return None
    sums = stats.cluster_sums(test, "effect", by=["treatment"])
    is_harm = (sums.columns["treatment"] == treatment).to_numpy(float)
    return interval(sums, stats.ratio((1 - is_harm) / len(benign), is_harm))


def timing_share(table: pd.DataFrame, treatment: str, name: str) -> bs.Estimates | None:
    """Effect of clamping the set at the first answer token only, over that of clamping it at all answer tokens."""
    chosen = table[(table.treatment == treatment) & (table["set"] == name) & (table.split == "test")]
    if chosen.empty or not chosen.every.any():
        return None
    return interval(stats.cluster_sums(chosen, ["first", "every"]), stats.ratio([1, 0], [0, 1]))


def perplexity_ratio(table: pd.DataFrame, name: str) -> bs.Estimates | None:
    """Perplexity of the model's own benign answers with the set closed over that without: exp of nats per token."""
    chosen = table[table["set"] == name]
    if chosen.empty:
        return None
    per_token = stats.ratio([1, 0], [0, 1])
    sums = stats.cluster_sums(chosen, ["lost", "n_tokens"])
    return interval(sums, lambda total, count: np.exp(per_token(total, count)))
