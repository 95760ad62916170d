"""Verdicts on claims: what they hold, and the steps that every rule takes: gate, decision, cap by controls.

Verdicts are supported, contradicted, inconclusive, or not testable. No rule is asked before its gate: the treatment must
have an effect worth mediating. A listed control that fails or was not run caps the verdict at inconclusive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from helpers import wrappers
from helpers.controls import Rows
from helpers.evidence import GATE

MIN_TOPICS = 20
FLOAT32_BITS = 24


@dataclass(frozen=True)
class Verdict:
    """One row of the ledger; `controls` maps a control to "passed", "failed" or "not run"."""

    model: str
    claim: str
    verdict: str
    reason: str
    quantity: str = ""
    estimate: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    n_pairs: int = 0
    n_topics: int = 0
    controls: Mapping[str, str] | None = None
    tags: tuple[str, ...] = ()


def generation(rows: Rows) -> str:
    """The treatment that stands for generation: T2 - T2b where harmless twins were measured, else T2."""
    return "T2-T2b" if rows.find("gate", "TE T2-T2b") is not None else "T2"


def gate(rows: Rows, claim: str, treatment: str) -> Verdict | None:
    """The verdict if the claim cannot be judged: treatment missing, too few topics, or no effect to mediate."""
    effect = rows.find("gate", f"TE {treatment}")
    if effect is None:
        without = {"T1": "the prompt set has no harmless/harmful pairs (T1): supply some"}.get(treatment, wrappers.NONE)
        return Verdict(rows.model, claim, "not testable", without)
    if effect.n_topics < MIN_TOPICS:
        reason = f"{effect.n_topics} topics of {treatment} in the test split, {MIN_TOPICS} needed"
    elif not (effect.ci_low > 0 or effect.ci_high < 0) or not abs(effect.estimate) >= GATE:  # NaN stops here too
        reason = f"TE of {treatment} is {interval(effect)} log-odds: nothing to mediate (gate: |TE| >= {GATE})"
    else:
        return None
    return verdict(rows, effect, "inconclusive", {}, reason, claim)


def decide(*, supported: bool, contradicted: bool) -> str:
    """The verdict that the numbers alone give; what contradicts wins."""
    return "contradicted" if contradicted else "supported" if supported else "inconclusive"


def verdict(
    rows: Rows, row: pd.Series, decision: str, checks: Mapping[str, str], reason: str, claim: str | None = None
) -> Verdict:
    """A verdict that shows one evidence row; a control in `checks` that is not "passed" caps it at inconclusive.

    So does a run in half precision, whose effects are for screening only.
    """
    bad = [f"{name} {state}" for name, state in checks.items() if state != "passed"]
    bits = rows.find("gate", "significand bits")
    if bits is not None and bits.estimate < FLOAT32_BITS:
        bad.append("half precision is for screening")
    if bad and decision != "inconclusive":
        decision, reason = "inconclusive", f"{reason}; {decision} by its numbers, capped: {', '.join(bad)}"
    return Verdict(
        rows.model,
        claim or str(row.claim),
        decision,
        reason,
        quantity=str(row.quantity),
        estimate=float(row.estimate),
        ci_low=float(row.ci_low),
        ci_high=float(row.ci_high),
        n_pairs=int(row.n_pairs),
        n_topics=int(row.n_topics),
        controls=dict(checks),
    )


def interval(row: pd.Series) -> str:
    """Estimate and interval, two decimals."""
    return f"{row.estimate:.2f} [{row.ci_low:.2f}, {row.ci_high:.2f}]"


def tags(rows: Rows, robust: bool, decision: str) -> tuple[str, ...]:
    """What a reader must know beside a verdict on generation: no twins to subtract; robust over outcomes."""
    no_twin = ("no harmless twin",) if generation(rows) == "T2" else ()
    return (*no_twin, "robust") if robust and decision == "supported" else no_twin
