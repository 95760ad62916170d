"""Corrected rules of the claims whose registered rule was found to err by construction on compiled models.

The registered rules stand, and every verdict of the ledger is theirs. The corrections were written down after the first 24
draws of the calibration had been seen (notebook 07) and before any other draw was measured; those of C1, C4 and C6 after
all draws of these claims had been seen. Each is judged on draws that were measured afterwards, beside the registered rules.
On 2026-11-29 C1 and C3 were made stricter; their draws had been seen. Thresholds are the registered ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd
from scipy.stats import t as student

from companion.base.thresholds import COMPUTED, CONTENT_JUDGE, KEPT_BY_FIRST_TOKEN, MLP_SHARE_WITH_OWN
from companion.claims import registered_rules as registered
from companion.claims import verdict
from companion.claims.verdict import Rows, Verdict, conclude, control, decide, interval, precondition, same_side

WHY = {
    "C1": "An indirect effect is as large where a decision is only copied or fetched as where it is made: what counts is "
    "where wrapper and request together become more than their sum.",
    "C2": "MLPs in a chain of n MLPs behind one head hold n/(n+1) of the indirect effects whoever writes the decision: "
    "the direct effects decide alone.",
    "C3": "A probe that fails where nothing is recognised must not stand in the way of saying so: it is a condition of "
    "supported, not a control of both verdicts. Since 2026-11-29 every named family of pairs must pass, since a mean over "
    "families is set by their mix: a stricter rule, written after its draws had been seen.",
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

    Supported: late share of it low >= 0.50, and the centroid difference low >= 0.05, behaviours resampled. Contradicted: late
    share high <= 0.40. A centroid difference alone contradicts nothing, since what fetches the wrapper moves it too.
    """
    share, centroid = rows.find("C1", COMPUTED), centroid_over_behaviours(rows)
    if share is None:
        return None
    if stop := precondition(rows, "C1"):
        return stop
    checks = {
        "benign behaviours": verdict.benign_behaviours(rows),
        "unsaturated pairs": same_side(rows, "C1", COMPUTED, "unsaturated", 0.5),
        "joint probability": verdict.joint_probability(rows, "T2"),
    }
    is_later = centroid is not None and centroid.ci_low >= 0.05
    decision = decide(supported=share.ci_low >= 0.50 and is_later, contradicted=share.ci_high <= 0.40)
    reason = f"late share {interval(share)} of what is computed; "
    if centroid is None:
        reason += registered.NO_BENIGN
    else:
        reason += f"depth centroid, harm - benign: {interval(centroid)}, behaviours resampled"
        is_open = decision == "inconclusive" and centroid.ci_low < 0.05 <= centroid.ci_high
        reason += ", which leaves 0.05 open" if is_open else ""
    return conclude(rows, share, decision, checks, reason)


def centroid_over_behaviours(rows: Rows) -> pd.Series | None:
    """The row of C1's centroid difference with an interval that takes the benign behaviours as a sample, too.

    None where it was not measured; without limits (from -inf to inf) where there are fewer than two behaviours.
    """
    found, harm = rows.find("C1", "centroid difference"), rows.find("C1", f"centroid {verdict.generation(rows)}")
    if found is None:
        return None
    is_benign = (rows.table.claim == "C1") & rows.table.quantity.str.startswith("centroid B")
    benign = rows.table[is_benign & (rows.table.variant == "main")].estimate.astype(float)
    half = math.inf
    if harm is not None and len(benign) > 1:
        # t(k - 1) * sqrt(s^2 / k + v): s is the spread of the k behaviours' centroids, v the variance over topics of harm's.
        over_topics = ((harm.ci_high - harm.ci_low) / (2 * 1.96)) ** 2
        half = float(student.ppf(0.975, len(benign) - 1)) * math.sqrt(benign.var() / len(benign) + over_topics)
    return pd.Series({**found, "ci_low": found.estimate - half, "ci_high": found.estimate + half})


def corrected_c2(rows: Rows) -> Verdict:
    """C2 by direct effects alone: supported if the MLP share is low >= 0.60, contradicted if high <= 0.50."""
    if stop := precondition(rows, "C2"):
        return stop
    direct = rows.find("C2", "MLP share of direct effects")
    if direct is None:
        return registered.rule_c2(rows)  # which says what was not measured
    checks = {
        "per patch norm": control(rows.find("C2", "MLP share of NIE", "per patch norm")),
        "per parameter": control(rows.find("C2", "MLP share of NIE", "per parameter")),
        "joint probability": verdict.joint_probability(rows, "T2"),
    }
    decision = decide(supported=direct.ci_low >= 0.60, contradicted=direct.ci_high <= 0.50)
    return conclude(rows, direct, decision, checks, f"MLP share {interval(direct)} of direct effects")


def corrected_c4(rows: Rows) -> Verdict | None:
    """C4 as registered, the hand-over layer's own MLP among those that carry on; None where that was not measured."""
    if not rows.variants("C4", MLP_SHARE_WITH_OWN, ""):  # older draws do not have it
        return None
    return registered.rule_c4(rows, MLP_SHARE_WITH_OWN, "from the hand-over layer's own on", ())


def corrected_c5b(rows: Rows) -> Verdict:
    """C5b as registered, but an index inside the last layer's sparse set counts where it is the larger one.

    A set with such an index may be a readout.
    """
    index = rows.find("C5b", "gate index")
    sparse = [row for row in registered.gate_forms(rows, "b") if not str(row.note).endswith(", whole last layer")]
    inside = max(sparse, key=lambda row: row.ci_low, default=None)
    if index is None or inside is None or not inside.ci_low >= index.ci_low:
        return registered.rule_c5b(rows)
    return registered.rule_c5b(rows, inside, may_read_out=True)


def corrected_c5c(rows: Rows) -> Verdict:
    """C5c as registered, but answers must have been labelled by their content."""
    if stop := precondition(rows, "C5c"):
        return stop
    by_content = [rows.find("C5c", name, CONTENT_JUDGE) for name in (KEPT_BY_FIRST_TOKEN, "not defined")]
    if all(row is None for row in by_content) and rows.find("C5c", KEPT_BY_FIRST_TOKEN) is not None:
        reason = "answers were labelled by their opener, which the first token decides: supply a judge (--judge)"
        return Verdict(rows.model, "C5c", "not testable", reason)
    return registered.rule_c5c(rows, CONTENT_JUDGE)


# By claim; C3, C5a and C6 differ in an argument alone.
RULES: dict[str, Callable[[Rows], Verdict | None]] = {
    "C1": corrected_c1,
    "C2": corrected_c2,
    "C3": lambda rows: registered.rule_c3(rows, for_support=(registered.PROBE,), by_family=True),
    "C4": corrected_c4,
    "C5a": lambda rows: registered.rule_c5a(rows, for_support=(registered.ORDER,)),
    "C5b": corrected_c5b,
    "C5c": corrected_c5c,
    "C6": lambda rows: registered.rule_c6(rows, contradicting=()),
}


def corrected_verdicts(rows: Rows) -> list[Verdict]:
    """The verdicts of all corrected rules on one model."""
    return [made for rule in RULES.values() if (made := rule(rows)) is not None]
