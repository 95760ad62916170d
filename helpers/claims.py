"""The claims ledger: pre-registered rules that turn evidence rows into verdicts.

A rule sees only the evidence table. Verdicts are supported, contradicted, inconclusive, or not testable. No rule is
asked before its gate: the treatment must have an effect worth mediating. A listed control that fails or was not run
caps the verdict at inconclusive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd

from helpers import controls
from helpers.controls import Rows
from helpers.depth import EARLY
from helpers.evidence import GATE

MIN_TOPICS = 20

STATEMENTS = {
    "C1": "Harmful generation arises in later layers.",
    "C2": "It comes from MLP blocks rather than attention blocks.",
    "C3": "Early layers understand harmfulness in context.",
    "C4": "MLP blocks carry the signal on to the last layer.",
    "C5a": "A sparse set of last-layer neurons carries it.",
    "C5b": "These neurons gate harmful generation: they switch an upstream signal on or off.",
    "C5c": "They switch the whole answer, not only its first token.",
    "C6": "Steering late layers prevents harmful output and preserves harmless output.",
    "C7": "Related neurons are adjacent.",
}


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


def c1(rows: Rows, twin: Rows) -> Verdict:
    """Supported: late share low >= 0.50, centroid difference low >= 0.05. Contradicted: high <= 0.40, or <= 0."""
    stop = _gate(rows, "C1", _generation(rows))
    if stop:
        return stop
    share, centroid = rows.find("C1", "late share"), rows.find("C1", "centroid difference")
    if share is None:
        return Verdict(rows.model, "C1", "inconclusive", "no component has a positive effect on the discover split")
    centroid_low, centroid_high = (-1.0, 1.0) if centroid is None else (centroid.ci_low, centroid.ci_high)
    checks = {
        "benign behaviours": controls.benign(rows),
        "untrained twin": controls.untrained(twin),
        "final norm frozen": controls.same_side(rows, "C1", "late share", "norm frozen", 0.5),
        "unsaturated pairs": controls.same_side(rows, "C1", "late share", "unsaturated", 0.5),
        "joint probability": controls.joint(rows, "T2"),
    }
    verdict = _decide(
        supported=share.ci_low >= 0.50 and centroid_low >= 0.05,
        contradicted=share.ci_high <= 0.40 or centroid_high <= 0,
    )
    against_benign = (
        "no benign behaviour to compare with"
        if centroid is None
        else f"depth centroid, harm - benign: {_interval(centroid)}"
    )
    made = _verdict(rows, share, verdict, checks, f"late share {_interval(share)}; {against_benign}")
    robust = controls.robust(rows, "C1", "late share", lambda row: row.ci_low >= 0.50)
    earliest = rows.find("gate", "earliest possible depth")
    imposed = ("architecture-imposed",) if earliest is not None and earliest.estimate > EARLY else ()
    return replace(made, tags=(*imposed, *_tags(rows, robust, made.verdict)))


def c2(rows: Rows) -> Verdict:
    """Supported: MLP share low >= 0.60 of direct effects and of NIE. Contradicted: high <= 0.50 of both."""
    stop = _gate(rows, "C2", _generation(rows))
    if stop:
        return stop
    total, direct = rows.find("C2", "MLP share of NIE"), rows.find("C2", "MLP share of direct effects")
    if rows.table[rows.table.claim == "C2"].empty:
        return Verdict(rows.model, "C2", "not testable", "direct effects were not measured: run notebook 03")
    if total is None or direct is None:
        return Verdict(rows.model, "C2", "inconclusive", "no component has a positive effect on the discover split")
    checks = {
        "final norm frozen": controls.same_side(rows, "C2", "MLP share of NIE", "norm frozen", 0.5),
        "unsaturated pairs": controls.same_side(rows, "C2", "MLP share of NIE", "unsaturated", 0.5),
        "per patch norm": controls.measured(rows, "per patch norm"),
        "per parameter": controls.measured(rows, "per parameter"),
        "joint probability": controls.joint(rows, "T2"),
    }
    verdict = _decide(
        supported=min(total.ci_low, direct.ci_low) >= 0.60, contradicted=max(total.ci_high, direct.ci_high) <= 0.50
    )
    flips = [name for name in ("per patch norm", "per parameter") if controls.flips(rows, name, total, direct)]
    reason = f"MLP share {_interval(direct)} of direct effects, {_interval(total)} of indirect effects"
    reason += "" if (total.estimate > 0.5) == (direct.estimate > 0.5) else "; the two disagree"
    reason += (
        f"; the side changes {' and '.join(flips)}" if flips else "; no normalisation moves either across one half"
    )
    # Shown is the share that decides: both must pass, so the one that is further from doing so.
    if verdict == "contradicted":
        binding = max(total, direct, key=lambda row: row.ci_high)
    else:
        binding = min(total, direct, key=lambda row: row.ci_low)
    made = _verdict(rows, binding, verdict, checks, reason)
    robust = controls.robust(rows, "C2", "MLP share of NIE", lambda row: row.ci_low >= 0.60)
    dependent = ("normalisation-dependent",) if flips else ()
    return replace(made, tags=(*dependent, *_tags(rows, robust, made.verdict)))


def c3(rows: Rows) -> Verdict:
    """Supported: psi0 low >= 0.30 and AUROC gain >= 0.05 (its interval above 0). Contradicted: psi0 high <= 0.10."""
    stop = _gate(rows, "C3", "T1")
    if stop:
        return stop
    psi, gain = rows.find("C3", "psi0 early, shared tokens"), rows.find("C3", "AUROC gain")
    if psi is None or gain is None:
        return Verdict(rows.model, "C3", "not testable", "the early-layer effect or the probe was not measured")
    checks = {
        "probe above chance on held-out topics": controls.above(rows, "C3", "AUROC probe", 0.5),
        "joint probability": controls.joint(rows, "T1"),
        "sign in unsaturated pairs": controls.same_side(rows, "C3", "psi0 early, shared tokens", "unsaturated", 0.0),
    }
    verdict = _decide(
        supported=psi.ci_low >= 0.30 and gain.estimate >= 0.05 and gain.ci_low > 0, contradicted=psi.ci_high <= 0.10
    )
    reason = f"psi0 {_interval(psi)} on tokens that do not differ; probe beats bag of tokens by {_interval(gain)} AUROC"
    families = rows.variants("C3", "psi0 early, shared tokens", "family ")
    reason += "".join(f"; {name} {_interval(row)}" for name, row in families.items())
    uneven = len({row.estimate >= 0.30 for row in families.values()}) > 1
    made = _verdict(rows, psi, verdict, checks, reason)
    return replace(made, tags=("families differ",) if uneven else ())


def _generation(rows: Rows) -> str:
    return "T2-T2b" if rows.find("gate", "TE T2-T2b") is not None else "T2"


def _gate(rows: Rows, claim: str, treatment: str) -> Verdict | None:
    """The verdict if the claim cannot be judged: treatment missing, too few topics, or no effect to mediate."""
    effect = rows.find("gate", f"TE {treatment}")
    if effect is None:
        missing = "harmless/harmful pairs (T1)" if treatment == "T1" else "pairs with a jailbreak wrapper (T2)"
        return Verdict(rows.model, claim, "not testable", f"the prompt set has no {missing}: supply some")
    if effect.n_topics < MIN_TOPICS:
        reason = f"{effect.n_topics} topics of {treatment} in the test split, {MIN_TOPICS} needed"
    elif not (effect.ci_low > 0 or effect.ci_high < 0) or not abs(effect.estimate) >= GATE:  # NaN stops here too
        reason = f"TE of {treatment} is {_interval(effect)} log-odds: nothing to mediate (gate: |TE| >= {GATE})"
    else:
        return None
    return _verdict(rows, effect, "inconclusive", {}, reason, claim)


def _decide(*, supported: bool, contradicted: bool) -> str:
    return "contradicted" if contradicted else "supported" if supported else "inconclusive"


def _verdict(
    rows: Rows, row: pd.Series, verdict: str, checks: Mapping[str, str], reason: str, claim: str | None = None
) -> Verdict:
    bad = [f"{name} {state}" for name, state in checks.items() if state != "passed"]
    if bad and verdict != "inconclusive":
        verdict, reason = "inconclusive", f"{reason}; {verdict} by its numbers, capped: {', '.join(bad)}"
    return Verdict(
        rows.model,
        claim or str(row.claim),
        verdict,
        reason,
        quantity=str(row.quantity),
        estimate=float(row.estimate),
        ci_low=float(row.ci_low),
        ci_high=float(row.ci_high),
        n_pairs=int(row.n_pairs),
        n_topics=int(row.n_topics),
        controls=dict(checks),
    )


def _interval(row: pd.Series) -> str:
    return f"{row.estimate:.2f} [{row.ci_low:.2f}, {row.ci_high:.2f}]"


def _tags(rows: Rows, robust: bool, verdict: str) -> tuple[str, ...]:
    no_twin = ("no harmless twin",) if _generation(rows) == "T2" else ()
    return (*no_twin, "robust") if robust and verdict == "supported" else no_twin
