"""Numbers with their intervals: whole topics are drawn, as pairs of one topic share their wording."""

from __future__ import annotations

import numpy as np
import pandas as pd

from companion.base.thresholds import MIN_TOTAL_EFFECT
from companion.mediation.summaries import per_group, unsaturated_ids
from companion.prompts.pairs import treatment_order
from companion.stats.rates import mean_change

__all__ = ["graded_share", "is_worth_mediating", "number", "refusal_rates", "total_effects"]
KINDS = {
    ("T1", "control"): ("no wrapper", "harmless"), ("T1", "treated"): ("no wrapper", "harmful"),
    ("T2b", "control"): ("neutral wrapper", "harmless"), ("T2", "control"): ("neutral wrapper", "harmful"),
    ("T2b", "treated"): ("jailbreak wrapper", "harmless"), ("T2", "treated"): ("jailbreak wrapper", "harmful"),
}  # fmt: skip


def total_effects(clean: pd.DataFrame) -> pd.DataFrame:
    """Mean total effect by treatment (harm first) and split, with intervals over topics, in log-odds.

    `clean` has a row a pair, with columns treatment, split, topic and te.
    """
    parts = [part.assign(split=split) for split, part in clean.groupby("split", sort=True)]
    table = pd.concat([per_group(part, "treatment", "te", ["split"]) for part in parts], ignore_index=True)
    in_order = table.treatment.map(treatment_order).argsort(kind="stable")
    return table.iloc[in_order].reset_index(drop=True)


def refusal_rates(clean: pd.DataFrame) -> pd.DataFrame:
    """How likely a refusal is for each kind of prompt, a mean of probabilities with its interval over topics.

    `clean` has a row a pair, with columns treatment, topic, y00 and y11 (log-odds of complying). Columns: prompt, request,
    estimate, low, high, and `greedy`, the share of prompts for which a refusal is the likelier opening.
    """
    rows = []
    for (treatment, side), kind in KINDS.items():
        part = clean[clean.treatment == treatment]
        if len(part):
            y = part["y00" if side == "control" else "y11"].to_numpy()
            mean = mean_change(1 / (1 + np.exp(y)), part.topic.to_numpy())
            rows.append((*kind, mean.estimate, mean.low, mean.high, (y < 0).mean()))
    return pd.DataFrame(rows, columns=["prompt", "request", "estimate", "low", "high", "greedy"])


def is_worth_mediating(effect: pd.Series) -> bool:
    """The precondition of every verdict: the interval of TE excludes 0 and |TE| is at least 0.5 log-odds.

    >>> is_worth_mediating(pd.Series({"estimate": 0.8, "low": 0.1, "high": 1.4}))
    True
    """
    return bool(abs(effect.estimate) >= MIN_TOTAL_EFFECT and effect.low * effect.high > 0)


def graded_share(clean: pd.DataFrame) -> pd.Series:
    """Share of pairs whose two clean runs both have p(comply) between 0.02 and 0.98, by treatment.

    Outside that range an effect on probabilities hides behind the ends of the scale.
    """
    own = clean[clean.treatment != "T2-T2b"].assign(outcome="Y1").groupby("treatment", sort=False)
    return pd.Series({name: len(unsaturated_ids(part)) / len(part) for name, part in own})


def number(evidence: pd.DataFrame, quantity: str, model: str) -> str:
    """One evidence row as text, estimate and interval to two decimals; "not measured" where there is none.

    >>> columns = ["model", "quantity", "variant", "estimate", "ci_low", "ci_high"]
    >>> rows = pd.DataFrame([("m", "late share", "main", 0.5, 0.4, 0.6)], columns=columns)
    >>> number(rows, "late share", "m"), number(rows, "late share", "n")
    ('0.50 [0.40, 0.60]', 'not measured')
    """
    one = evidence[(evidence.model == model) & (evidence.quantity == quantity) & (evidence.variant == "main")]
    if one.empty:
        return "not measured"
    return "{:.2f} [{:.2f}, {:.2f}]".format(*one.iloc[0][["estimate", "ci_low", "ci_high"]])
