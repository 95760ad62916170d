"""Controls of the claims: each answers "passed", "failed" or "not run" from the evidence rows alone.

Verdicts on claims: what they hold, and the steps that every rule takes: gate, decision, cap by controls.

Verdicts are supported, contradicted, inconclusive, or not testable. No rule is asked before its gate: the treatment must
have an effect worth mediating. A listed control that fails or was not run caps the verdict at inconclusive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from companion.base import thresholds
from companion.base.thresholds import FLOAT32_BITS, MIN_BENIGN, MIN_JOINT, MIN_TOPICS, MIN_TOTAL_EFFECT


@dataclass(frozen=True)
class Rows:
    """One model's evidence, looked up by claim, quantity and variant."""

    model: str
    table: pd.DataFrame

    def find(self, claim: str, quantity: str, variant: str = "main") -> pd.Series | None:
        """The row, or None if it was not measured."""
        table = self.table
        found = table[(table.claim == claim) & (table.quantity == quantity) & (table.variant == variant)]
        return found.iloc[0] if len(found) else None

    def variants(self, claim: str, quantity: str, prefix: str) -> dict[str, pd.Series]:
        """Rows of a quantity whose variant begins with a prefix, by variant."""
        table = self.table[(self.table.claim == claim) & (self.table.quantity == quantity)]
        chosen = table[table.variant.str.startswith(prefix)]
        return {str(row.variant): row for _, row in chosen.iterrows()}


def same_side(rows: Rows, claim: str, quantity: str, variant: str, middle: float, main_variant: str = "main") -> str:
    """A variant of the estimate lies on the same side of the middle."""
    main, other = rows.find(claim, quantity, main_variant), rows.find(claim, quantity, variant)
    if main is None or other is None:
        return "not run"
    return "passed" if (main.estimate > middle) == (other.estimate > middle) else "failed"


def benign(rows: Rows) -> str:
    """The centroid comparison rests on at least five benign behaviours that passed the gate."""
    if rows.find("C1", "centroid difference") is None:
        return "not run"
    used = rows.table[rows.table.quantity.str.startswith("centroid B")]
    return "passed" if len(used) >= MIN_BENIGN else "failed"


def untrained(twin: Rows) -> str:
    """An untrained twin must not pass C1's rule: if it does, the rule reads architecture, not learning."""
    if twin.table.empty:
        return "not run"
    share, centroid = twin.find("C1", "late share"), twin.find("C1", "centroid difference")
    if share is None or centroid is None:
        return "passed"
    return "failed" if share.ci_low >= 0.50 and centroid.ci_low >= 0.05 else "passed"


def joint(rows: Rows, treatment: str) -> str:
    """Comply and refuse openers together hold at least 0.8 of the probability, so Y1 sees the behaviour."""
    row = rows.find("gate", f"joint probability {treatment}")
    return "not run" if row is None else "passed" if row.estimate >= MIN_JOINT else "failed"


def above(rows: Rows, claim: str, quantity: str, threshold: float) -> str:
    """The quantity's whole interval lies above the threshold."""
    row = rows.find(claim, quantity)
    return "not run" if row is None else "passed" if row.ci_low > threshold else "failed"


def measured(rows: Rows, normalisation: str) -> str:
    """The MLP share was computed under this normalisation too."""
    return "not run" if rows.find("C2", "MLP share of NIE", normalisation) is None else "passed"


def flips(rows: Rows, normalisation: str, total: pd.Series, direct: pd.Series) -> bool:
    """A normalisation moves one of the two MLP shares to the other side of one half."""
    for raw in (total, direct):
        other = rows.find("C2", str(raw.quantity), normalisation)
        if other is not None and (other.estimate > 0.5) != (raw.estimate > 0.5):
            return True
    return False


def robust(rows: Rows, claim: str, quantity: str, holds: Callable[[pd.Series], bool]) -> bool:
    """True if the full-response outcome and each direction alone would support the claim too."""
    found = [rows.find(claim, quantity, variant) for variant in ("full response", "sufficiency", "necessity")]
    return all(row is not None and holds(row) for row in found)


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


def precondition(rows: Rows, claim: str, treatment: str) -> Verdict | None:
    """The verdict if the claim cannot be judged: treatment missing, too few topics, or no effect to mediate."""
    effect = rows.find("gate", f"TE {treatment}")
    if effect is None:
        without = {"T1": "the prompt set has no harmless/harmful pairs (T1): supply some"}.get(
            treatment, thresholds.NO_WRAPPERS
        )
        return Verdict(rows.model, claim, "not testable", without)
    if effect.n_topics < MIN_TOPICS:
        reason = f"{effect.n_topics} topics of {treatment} in the test split, {MIN_TOPICS} needed"
    elif (
        not (effect.ci_low > 0 or effect.ci_high < 0) or not abs(effect.estimate) >= MIN_TOTAL_EFFECT
    ):  # NaN stops here too
        reason = (
            f"TE of {treatment} is {interval(effect)} log-odds: nothing to mediate (gate: |TE| >= {MIN_TOTAL_EFFECT})"
        )
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
