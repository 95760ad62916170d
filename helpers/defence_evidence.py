"""Evidence on C6, from the trials of a defence: one row a number, as the claims ledger reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from helpers import defence, defence_stats
from helpers.defence_stats import Change

WEAK = 3  # wrapper tiers up to here count as weak


def row(model: str, quantity: str, change: Change, variant: str = "main", note: str = "") -> dict[str, object]:
    """One row of the evidence table of C6."""
    return {
        "model": model,
        "claim": "C6",
        "quantity": quantity,
        "variant": variant,
        "estimate": change.estimate,
        "ci_low": change.low,
        "ci_high": change.high,
        "n_pairs": change.n,
        "n_topics": change.n_topics,
        "note": note,
    }


def single(value: float, n: int = 0) -> Change:
    """A number without an interval: a p-value, or a ratio of two budgets."""
    return Change(value, value, value, n, n)


def not_defined(model: str, reason: str) -> list[dict[str, object]]:
    """What the ledger is told where directions cannot be fitted."""
    return [row(model, "not defined", single(0.0), note=reason)]


def outcome_rows(
    model: str, plain: pd.DataFrame, steered: pd.DataFrame, refits: Sequence[float], variant: str = "main"
) -> list[dict[str, object]]:
    """Harm change, over-refusal and harmless loss of one arm, in points; the first with the variance of the refits.

    `refits` are harm changes with directions fitted on other draws of the discover topics. The main arm also gets its
    greedy answers, weak and strong wrappers apart, and the smallest change that its prompts could have shown.
    """
    harm = defence.changed(plain, steered, "harmful")
    wide = defence_stats.with_refits(harm, refits) if len(refits) > 1 else harm
    made = [row(model, "harm change", wide, variant)]
    for kind, name in (("borderline", "over-refusal"), ("harmless", "harmless loss")):
        if (plain.kind == kind).any():  # a set may lack one
            made.append(row(model, name, defence.changed(plain, steered, kind), variant))
    if variant != "main":
        return made
    if len(refits) > 1:
        spread = float(np.std(refits, ddof=1))
        made.append(
            row(model, "spread over refits", Change(spread, min(refits), max(refits), len(refits), len(refits)))
        )
    if "greedy" in steered:
        made.append(row(model, "harm change", defence.changed(plain, steered, "harmful", "greedy"), "greedy"))
    for name, mask in _tiers(steered).items():
        if mask.sum() and steered.loc[mask, "topic"].nunique() > 1:
            made.append(row(model, "harm change", defence.changed(plain[mask], steered[mask], "harmful"), name))
    return made + [row(model, "detectable change", single(value), kind) for kind, value in detectable(plain).items()]


def _tiers(table: pd.DataFrame) -> dict[str, pd.Series]:
    harmful = table.kind == "harmful"
    return {
        "weak wrappers": harmful & (table.tier > 0) & (table.tier <= WEAK),
        "strong wrappers": harmful & (table.tier > WEAK),
    }


def detectable(plain: pd.DataFrame) -> dict[str, float]:
    """The smallest change in points that each kind of prompt can show at 80 % power, by kind, from the plain model.

    The spread over topics of an unpaired rate: pairing, and common random numbers, can only make it smaller.
    """
    found = {}
    for kind, part in plain.groupby("kind", sort=False):
        values = 100 * (part.label == defence.GOOD[str(kind)])
        found[str(kind)] = defence_stats.detectable(values.to_numpy(float), part.topic.to_numpy())
    return {kind: value for kind, value in found.items() if np.isfinite(value)}


def price_rows(model: str, price: pd.DataFrame, variant: str = "main") -> list[dict[str, object]]:
    """Mean KL a token, its 95th percentile over prompts, and the perplexity ratio, on harmless prompts."""
    kl, p95, ratio = defence.divergence(price)
    return [
        row(model, "KL", kl, variant),
        row(model, "KL p95", single(p95, kl.n), variant),
        row(model, "perplexity ratio", ratio, variant),
    ]


def rival_rows(
    model: str, late: pd.DataFrame, rivals: Mapping[str, pd.DataFrame], spent: Mapping[str, float]
) -> list[dict[str, object]]:
    """How many points less harm late steering leaves than each rival with the same budget; and whether it was the same.

    `spent` holds the measured budgets, that of the late arm as "late". Positive: late does better.
    """
    made = []
    for name, trial in rivals.items():
        advantage = defence.changed(late, trial, "harmful")
        made.append(row(model, f"advantage over {name}", advantage))
        made.append(row(model, f"budget of {name} over late", single(spent[name] / spent["late"])))
    return made


def random_rows(model: str, null: pd.DataFrame) -> list[dict[str, object]]:
    """Rank p-values of the fitted direction among random ones, one row a family of draws; see `defence_random`."""
    made = []
    for family, part in null.groupby("family", sort=False):
        tested = float(part.loc[part.role != "random", "value"].iloc[0])
        drawn = part.loc[part.role == "random", "value"].to_numpy()
        made.append(row(model, f"p {family}", single(defence_stats.rank_p(tested, drawn), len(drawn))))
    return made
