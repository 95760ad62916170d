"""The claims ledger: pre-registered rules that turn evidence rows into verdicts.

A rule sees only the evidence table. The rules of C1 to C3 are here; those on neurons, gates, tokens and steering stand in
modules of their own.
"""

from __future__ import annotations

from dataclasses import replace

from helpers import controls
from helpers.controls import Rows
from helpers.depth import EARLY
from helpers.verdicts import Verdict, decide, gate, generation, interval, tags, verdict

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


def c1(rows: Rows, twin: Rows) -> Verdict:
    """Supported: late share low >= 0.50, centroid difference low >= 0.05. Contradicted: high <= 0.40, or <= 0."""
    stop = gate(rows, "C1", generation(rows))
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
    decision = decide(
        supported=share.ci_low >= 0.50 and centroid_low >= 0.05,
        contradicted=share.ci_high <= 0.40 or centroid_high <= 0,
    )
    against_benign = (
        "no benign behaviour to compare with"
        if centroid is None
        else f"depth centroid, harm - benign: {interval(centroid)}"
    )
    made = verdict(rows, share, decision, checks, f"late share {interval(share)}; {against_benign}")
    robust = controls.robust(rows, "C1", "late share", lambda row: row.ci_low >= 0.50)
    earliest = rows.find("gate", "earliest possible depth")
    imposed = ("architecture-imposed",) if earliest is not None and earliest.estimate > EARLY else ()
    return replace(made, tags=(*imposed, *tags(rows, robust, made.verdict)))


def c2(rows: Rows) -> Verdict:
    """Supported: MLP share low >= 0.60 of direct effects and of NIE. Contradicted: high <= 0.50 of both."""
    stop = gate(rows, "C2", generation(rows))
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
    decision = decide(
        supported=min(total.ci_low, direct.ci_low) >= 0.60, contradicted=max(total.ci_high, direct.ci_high) <= 0.50
    )
    flips = [name for name in ("per patch norm", "per parameter") if controls.flips(rows, name, total, direct)]
    reason = f"MLP share {interval(direct)} of direct effects, {interval(total)} of indirect effects"
    reason += "" if (total.estimate > 0.5) == (direct.estimate > 0.5) else "; the two disagree"
    reason += (
        f"; the side changes {' and '.join(flips)}" if flips else "; no normalisation moves either across one half"
    )
    # Shown is the share that decides: both must pass, so the one that is further from doing so.
    if decision == "contradicted":
        binding = max(total, direct, key=lambda row: row.ci_high)
    else:
        binding = min(total, direct, key=lambda row: row.ci_low)
    made = verdict(rows, binding, decision, checks, reason)
    robust = controls.robust(rows, "C2", "MLP share of NIE", lambda row: row.ci_low >= 0.60)
    dependent = ("normalisation-dependent",) if flips else ()
    return replace(made, tags=(*dependent, *tags(rows, robust, made.verdict)))


def c3(rows: Rows, *, corrected: bool = False) -> Verdict:
    """Supported: psi0 low >= 0.30 and AUROC gain >= 0.05 (its interval above 0). Contradicted: psi0 high <= 0.10.

    `corrected`: the probe's control can spoil "supported" only (`claims_corrected`).
    """
    stop = gate(rows, "C3", "T1")
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
    decision = decide(
        supported=psi.ci_low >= 0.30 and gain.estimate >= 0.05 and gain.ci_low > 0, contradicted=psi.ci_high <= 0.10
    )
    if corrected and decision != "supported":
        del checks["probe above chance on held-out topics"]
    reason = f"psi0 {interval(psi)} on tokens that do not differ; probe beats bag of tokens by {interval(gain)} AUROC"
    families = rows.variants("C3", "psi0 early, shared tokens", "family ")
    reason += "".join(f"; {name} {interval(row)}" for name, row in families.items())
    uneven = len({row.estimate >= 0.30 for row in families.values()}) > 1
    made = verdict(rows, psi, decision, checks, reason)
    return replace(made, tags=("families differ",) if uneven else ())
