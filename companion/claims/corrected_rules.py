"""Corrected rules of the claims whose registered rule was found to err by construction on compiled models.

The registered rules stand, and every verdict of the ledger is theirs. The corrections were written down after the first 24
draws of the calibration had been seen (notebook 07) and before any other draw was measured; those of C1, C4 and C6 after
all draws of these claims had been seen. Each is judged on draws that were measured afterwards, beside the registered rules.
Thresholds are the registered ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from companion.base import thresholds
from companion.base.thresholds import COMPUTED
from companion.claims import registered_rules, verdict
from companion.claims.verdict import Rows, Verdict, decide, generation, interval, precondition

WHY = {
    "C1": "An indirect effect is as large where a decision is only copied or fetched as where it is made: what counts is "
    "where wrapper and request together become more than their sum.",
    "C2": "MLPs in a chain of n MLPs behind one head hold n/(n+1) of the indirect effects whoever writes the decision: "
    "the direct effects decide alone.",
    "C3": "A probe that fails where nothing is recognised must not stand in the way of saying so: it is a condition of "
    "supported, not a control of both verdicts.",
    "C4": "An MLP that reads what the attention of its own layer brought, and writes the decision, leaves nothing to the layers "
    "above it: the hand-over layer's own MLP is one of those that carry on.",
    "C5a": "Where the last MLP has no effect its k90 is no better than that of a random order: that control belongs to "
    "supported only.",
    "C5b": "All that a last-layer neuron does it writes itself, so the readout test denies every gate there: the index "
    "inside its neurons decides, and what is written whatever the gate does is one minus the index.",
    "C5c": "An answer that is labelled by its opener is decided by its first token by definition: the label must rest on "
    "the content.",
    "C6": "What is added in early or middle layers reaches the late ones by the skip path: that it defends as well does not "
    "speak against late layers, and stands in the way of supported only.",
}


def corrected_c1(rows: Rows) -> Verdict | None:
    """C1 by where the interaction is computed; None where that was not measured, as without twins of one length.

    Supported: late share of it low >= 0.50, and the centroid difference low >= 0.05 as registered. Contradicted: late share
    high <= 0.40. A centroid difference alone contradicts nothing, since what fetches the wrapper moves it too.
    """
    share, centroid = rows.find("C1", COMPUTED), rows.find("C1", "centroid difference")
    if share is None:
        return None
    stop = precondition(rows, "C1", generation(rows))
    if stop:
        return stop
    checks = {
        "benign behaviours": verdict.benign(rows),
        "unsaturated pairs": verdict.same_side(rows, "C1", COMPUTED, "unsaturated", 0.5),
        "joint probability": verdict.joint(rows, "T2"),
    }
    later = centroid is not None and centroid.ci_low >= 0.05
    decision = decide(supported=share.ci_low >= 0.50 and later, contradicted=share.ci_high <= 0.40)
    against_benign = "no benign behaviour to compare with" if centroid is None else interval(centroid)
    reason = f"late share {interval(share)} of what is computed; depth centroid, harm - benign: {against_benign}"
    return verdict.verdict(rows, share, decision, checks, reason)


def corrected_c2(rows: Rows) -> Verdict:
    """C2 by direct effects alone: supported if the MLP share is low >= 0.60, contradicted if high <= 0.50."""
    stop = precondition(rows, "C2", generation(rows))
    if stop:
        return stop
    direct = rows.find("C2", "MLP share of direct effects")
    if direct is None:
        return registered_rules.rule_c2(rows)  # which says what was not measured
    checks = {
        "per patch norm": verdict.measured(rows, "per patch norm"),
        "per parameter": verdict.measured(rows, "per parameter"),
        "joint probability": verdict.joint(rows, "T2"),
    }
    decision = decide(supported=direct.ci_low >= 0.60, contradicted=direct.ci_high <= 0.50)
    return verdict.verdict(rows, direct, decision, checks, f"MLP share {interval(direct)} of direct effects")


def corrected_rules_of(rows: Rows) -> Iterator[Verdict]:
    """The verdicts of all corrected rules on one model."""
    if (first := corrected_c1(rows)) is not None:
        yield first
    yield corrected_c2(rows)
    yield registered_rules.rule_c3(rows, corrected=True)
    if rows.variants("C4", thresholds.MLP_SHARE_WITH_OWN, ""):  # older draws do not have it
        yield registered_rules.rule_c4(rows, corrected=True)
    yield registered_rules.rule_c5a(rows, corrected=True)
    yield registered_rules.rule_c5b(rows, corrected=True)
    yield registered_rules.rule_c5c(rows, corrected=True)
    yield registered_rules.rule_c6(rows, corrected=True)
