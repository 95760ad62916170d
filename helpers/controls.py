"""Controls of the claims: each answers "passed", "failed" or "not run" from the evidence rows alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

UNTRAINED = " (untrained)"  # behind a model's name: its untrained twin, a control
MIN_BENIGN = 5
MIN_JOINT = 0.8


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
