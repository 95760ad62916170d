"""Verdicts on claims: evidence by name, the controls that cap a verdict, and the steps that every rule takes.

A verdict is supported, contradicted, inconclusive or not testable. A rule is asked where its precondition holds, and a
control that fails or was not run caps its verdict at inconclusive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from companion.base import thresholds
from companion.base.thresholds import FLOAT32_BITS, MIN_BENIGN, MIN_JOINT, MIN_TOPICS, MIN_TOTAL_EFFECT

# By quantity that a verdict shows: supported if the whole interval lies from here on, contradicted if it lies up to here.
AT_LEAST = {
    thresholds.COMPUTED: (0.5, 0.4), "late share": (0.5, 0.4), "MLP share of direct effects": (0.6, 0.5),
    "MLP share of NIE": (0.6, 0.5), thresholds.PSI: (0.3, 0.1), thresholds.MLP_SHARE: (0.6, 0.4),
    thresholds.MLP_SHARE_WITH_OWN: (0.6, 0.4), "psi1": (0.3, 0.15), "gate index": (thresholds.GATE_LOW, thresholds.GATE_HIGH),
    "gate index, form": (thresholds.GATE_LOW, thresholds.GATE_HIGH), thresholds.KEPT_BY_FIRST_TOKEN: (0.8, 0.4),
    "advantage over early": (0.0, thresholds.POINTS), "advantage over mid": (0.0, thresholds.POINTS), "Moran's I": (0.05, 0.05),
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """One model's rows of an evidence table, looked up by claim, quantity and variant."""

    model: str
    evidence: pd.DataFrame

    @cached_property
    def table(self) -> pd.DataFrame:
        """The model's own rows."""
        return self.evidence[self.evidence.model == self.model]

    @cached_property
    def _by_name(self) -> dict[tuple[str, str, str], pd.Series]:
        """Rows by claim, quantity and variant: a rule asks for dozens, and each look at the table takes a millisecond."""
        return {(row.claim, row.quantity, row.variant): row for _, row in self.table.iterrows()}

    def find(self, claim: str, quantity: str, variant: str = "main") -> pd.Series | None:
        """The row, or None if it was not measured."""
        return self._by_name.get((claim, quantity, variant))

    def of(self, claim: str) -> dict[str, pd.Series]:
        """The main rows of a claim, by quantity."""
        return {key[1]: row for key, row in self._by_name.items() if (key[0], key[2]) == (claim, "main")}

    def variants(self, claim: str, quantity: str, prefix: str = "") -> dict[str, pd.Series]:
        """Rows of a quantity whose variant begins with a prefix, by variant."""
        named = self._by_name.items()
        return {key[2]: row for key, row in named if key[:2] == (claim, quantity) and key[2].startswith(prefix)}


@dataclass(frozen=True)
class Verdict:
    """One row of the ledger; `controls` maps a control to "passed", "failed" or "not run", `rule` says whose verdict it is."""

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
    rule: str = "registered"


def is_high(row: pd.Series) -> bool:
    """Whether the whole interval lies where its quantity supports a claim."""
    return bool(row.ci_low >= AT_LEAST[str(row.quantity)][0])


def is_low(row: pd.Series) -> bool:
    """Whether the whole interval lies where its quantity contradicts a claim."""
    return bool(row.ci_high <= AT_LEAST[str(row.quantity)][1])


def control(row: pd.Series | None, holds: Callable[[pd.Series], bool] = lambda row: True) -> str:
    """A control's state: "passed" or "failed" by what holds of its row, "not run" where there is no row."""
    return "not run" if row is None else "passed" if holds(row) else "failed"


def same_side(rows: Rows, claim: str, quantity: str, variant: str, middle: float, main_variant: str = "main") -> str:
    """The control that a variant of the estimate lies on the same side of the middle."""
    main, other = rows.find(claim, quantity, main_variant), rows.find(claim, quantity, variant)
    if main is None or other is None:
        return "not run"
    return "passed" if (main.estimate > middle) == (other.estimate > middle) else "failed"


def benign_behaviours(rows: Rows) -> str:
    """The control that C1's centroid comparison rests on at least five benign behaviours."""
    n_used = sum(name.startswith("centroid B") for name in rows.of("C1"))
    return control(rows.find("C1", "centroid difference"), lambda _: n_used >= MIN_BENIGN)


def generation(rows: Rows) -> str:
    """The treatment that stands for generation: T2 - T2b where harmless twins were measured, else T2."""
    return "T2-T2b" if rows.find("gate", "TE T2-T2b") is not None else "T2"


def precondition(rows: Rows, claim: str) -> Verdict | None:
    """The verdict if the claim cannot be judged: its treatment (T1 for C3, else that of generation) is missing, has too few
    topics, or no effect to mediate.
    """
    treatment = "T1" if claim == "C3" else generation(rows)
    effect = rows.find("gate", f"TE {treatment}")
    if effect is None:
        no_pairs = "the prompt set has no harmless/harmful pairs (T1): supply some"
        return Verdict(rows.model, claim, "not testable", no_pairs if treatment == "T1" else thresholds.NO_WRAPPERS)
    is_clear = effect.ci_low > 0 or effect.ci_high < 0
    if effect.n_topics < MIN_TOPICS:
        reason = f"{effect.n_topics} topics of {treatment} in the test split, {MIN_TOPICS} needed"
    elif not is_clear or not abs(effect.estimate) >= MIN_TOTAL_EFFECT:  # NaN stops here too
        reason = (
            f"TE of {treatment} is {interval(effect)} log-odds: nothing to mediate (gate: |TE| >= {MIN_TOTAL_EFFECT})"
        )
    else:
        return None
    return replace(conclude(rows, effect, "inconclusive", {}, reason, claim=claim, tags=()), controls={})


def decide(*, supported: bool, contradicted: bool) -> str:
    """The verdict that the numbers alone give; what contradicts wins."""
    return "contradicted" if contradicted else "supported" if supported else "inconclusive"


def conclude(
    rows: Rows, row: pd.Series, decision: str, checks: Mapping[str, str], reason: str, *, claim: str = "",
    for_support: Collection[str] = (), tags: tuple[str, ...] | None = None,
) -> Verdict:  # fmt: skip
    """A verdict that shows one evidence row; a control in `checks` that is not "passed" caps it at inconclusive.

    So does half precision, and where the openers of both camps hold too little of the probability for Y1 to see the behaviour.
    Controls named in `for_support` belong to the verdict supported alone. `tags`: by default whether twins are missing.
    """
    claim = claim or str(row.claim)
    joint = rows.find("gate", f"joint probability {'T1' if claim == 'C3' else 'T2'}")
    checks = {**checks, "joint probability": control(joint, lambda row: row.estimate >= MIN_JOINT)}
    checks = {name: state for name, state in checks.items() if decision == "supported" or name not in for_support}
    bad = [f"{name} {state}" for name, state in checks.items() if state != "passed"]
    bits = rows.find("gate", "significand bits")
    if bits is not None and bits.estimate < FLOAT32_BITS:
        bad.append("half precision is for screening")
    if bad and decision != "inconclusive":
        decision, reason = "inconclusive", f"{reason}; {decision} by its numbers, capped: {', '.join(bad)}"
    no_twin = ("no harmless twin",) if generation(rows) == "T2" else ()
    return Verdict(
        rows.model, claim, decision, reason, quantity=str(row.quantity), estimate=float(row.estimate),
        ci_low=float(row.ci_low), ci_high=float(row.ci_high), n_pairs=int(row.n_pairs), n_topics=int(row.n_topics),
        controls=checks, tags=no_twin if tags is None else tags,
    )  # fmt: skip


def interval(row: pd.Series) -> str:
    """Estimate and interval, two decimals."""
    return f"{row.estimate:.2f} [{row.ci_low:.2f}, {row.ci_high:.2f}]"
