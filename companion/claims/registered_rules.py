"""The claims ledger: pre-registered rules that turn evidence rows into verdicts.

A rule sees only the evidence table. The rules of C1 to C3 are here; those on neurons, gates, tokens and steering stand in
modules of their own.

Rules of the claims about neurons: C5a (a sparse last layer) and C7 (related neurons are adjacent).

The rules of C4 (MLPs carry the signal on) and C5c (a switch of the whole answer).

Rule of C5b: the sparse set gates harmful generation, it does not just contribute to it.

Two choices were fixed, as all thresholds here, before the shipped models were measured (what the index may be read from was
widened after a first look: `gate_choice`).
A last-layer neuron only adds into the last residual stream, so the plain factorial (form a) is near zero there whatever
was learned, and the verdict reads the forms in which a gate could show: inside a neuron (b) and below the last layer (c).
And "not a readout" means that less than half of the set's effect is what it writes into the logits itself.

The rule of C6: steering late layers prevents harmful output and preserves harmless output.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from companion.base.thresholds import (
    BENIGN_SHARE,
    CARRIED,
    CARRIED_OWN,
    CONTENT,
    EARLY,
    GATE_HIGH,
    GATE_LOW,
    KEPT,
    MARGINS,
    MIN_BENIGN,
    PERPLEXITY,
    POINTS,
    READOUT,
)
from companion.claims import verdict
from companion.claims.verdict import Rows, Verdict, decide, generation, interval, precondition, tags

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


def rule_c1(rows: Rows, twin: Rows) -> Verdict:
    """Supported: late share low >= 0.50, centroid difference low >= 0.05. Contradicted: high <= 0.40, or <= 0."""
    stop = precondition(rows, "C1", generation(rows))
    if stop:
        return stop
    share, centroid = rows.find("C1", "late share"), rows.find("C1", "centroid difference")
    if share is None:
        return Verdict(rows.model, "C1", "inconclusive", "no component has a positive effect on the discover split")
    centroid_low, centroid_high = (-1.0, 1.0) if centroid is None else (centroid.ci_low, centroid.ci_high)
    checks = {
        "benign behaviours": verdict.benign(rows),
        "untrained twin": verdict.untrained(twin),
        "final norm frozen": verdict.same_side(rows, "C1", "late share", "norm frozen", 0.5),
        "unsaturated pairs": verdict.same_side(rows, "C1", "late share", "unsaturated", 0.5),
        "joint probability": verdict.joint(rows, "T2"),
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
    made = verdict.verdict(rows, share, decision, checks, f"late share {interval(share)}; {against_benign}")
    robust = verdict.robust(rows, "C1", "late share", lambda row: row.ci_low >= 0.50)
    earliest = rows.find("gate", "earliest possible depth")
    imposed = ("architecture-imposed",) if earliest is not None and earliest.estimate > EARLY else ()
    return replace(made, tags=(*imposed, *tags(rows, robust, made.verdict)))


def rule_c2(rows: Rows) -> Verdict:
    """Supported: MLP share low >= 0.60 of direct effects and of NIE. Contradicted: high <= 0.50 of both."""
    stop = precondition(rows, "C2", generation(rows))
    if stop:
        return stop
    total, direct = rows.find("C2", "MLP share of NIE"), rows.find("C2", "MLP share of direct effects")
    if rows.table[rows.table.claim == "C2"].empty:
        return Verdict(rows.model, "C2", "not testable", "direct effects were not measured: run notebook 03")
    if total is None or direct is None:
        return Verdict(rows.model, "C2", "inconclusive", "no component has a positive effect on the discover split")
    checks = {
        "final norm frozen": verdict.same_side(rows, "C2", "MLP share of NIE", "norm frozen", 0.5),
        "unsaturated pairs": verdict.same_side(rows, "C2", "MLP share of NIE", "unsaturated", 0.5),
        "per patch norm": verdict.measured(rows, "per patch norm"),
        "per parameter": verdict.measured(rows, "per parameter"),
        "joint probability": verdict.joint(rows, "T2"),
    }
    decision = decide(
        supported=min(total.ci_low, direct.ci_low) >= 0.60, contradicted=max(total.ci_high, direct.ci_high) <= 0.50
    )
    flips = [name for name in ("per patch norm", "per parameter") if verdict.flips(rows, name, total, direct)]
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
    made = verdict.verdict(rows, binding, decision, checks, reason)
    robust = verdict.robust(rows, "C2", "MLP share of NIE", lambda row: row.ci_low >= 0.60)
    dependent = ("normalisation-dependent",) if flips else ()
    return replace(made, tags=(*dependent, *tags(rows, robust, made.verdict)))


def rule_c3(rows: Rows, *, corrected: bool = False) -> Verdict:
    """Supported: psi0 low >= 0.30 and AUROC gain >= 0.05 (its interval above 0). Contradicted: psi0 high <= 0.10.

    `corrected`: the probe's control can spoil "supported" only (`claims_corrected`).
    """
    stop = precondition(rows, "C3", "T1")
    if stop:
        return stop
    psi, gain = rows.find("C3", "psi0 early, shared tokens"), rows.find("C3", "AUROC gain")
    if psi is None or gain is None:
        return Verdict(rows.model, "C3", "not testable", "the early-layer effect or the probe was not measured")
    checks = {
        "probe above chance on held-out topics": verdict.above(rows, "C3", "AUROC probe", 0.5),
        "joint probability": verdict.joint(rows, "T1"),
        "sign in unsaturated pairs": verdict.same_side(rows, "C3", "psi0 early, shared tokens", "unsaturated", 0.0),
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
    made = verdict.verdict(rows, psi, decision, checks, reason)
    return replace(made, tags=("families differ",) if uneven else ())


FEW = 8  # k90 may be 1 % of the layer or this, whichever is more
PSI_MIDDLE = 0.225  # half way between the two thresholds of psi1


def rule_c5a(rows: Rows, *, corrected: bool = False) -> Verdict:
    """Supported: psi1 low >= 0.30, k90 <= max(1 % of the layer, 8), below the benign median. Contradicted: psi1 high <=
    0.15 or k90 >= 10 % of the layer.

    `corrected`: the comparison with a random order can spoil "supported" only (`claims_corrected`).
    """
    stop = precondition(rows, "C5a", generation(rows))
    if stop:
        return stop
    psi, size = rows.find("C5a", "psi1"), rows.find("C5a", "neurons in the layer")
    if psi is None or size is None:
        reason = "single neurons were not measured: run notebook 04 (a mixture of experts has no such neurons)"
        return Verdict(rows.model, "C5a", "not testable", reason)
    k90, benign = rows.find("C5a", "k90"), _benign_k90(rows)
    few, many = max(0.01 * size.estimate, FEW), 0.1 * size.estimate
    is_sparse = k90 is not None and k90.estimate <= few and (not benign or k90.estimate < np.median(benign))
    checks = {
        "benign behaviours": "not run" if not benign else "passed" if len(benign) >= MIN_BENIGN else "failed",
        "final norm frozen": verdict.same_side(rows, "C5a", "psi1", "norm frozen", PSI_MIDDLE),
        "sign in unsaturated pairs": verdict.same_side(rows, "C5a", "psi1", "unsaturated", 0.0),
        "joint probability": verdict.joint(rows, "T2"),
    }
    decided = decide(
        supported=psi.ci_low >= 0.30 and is_sparse,
        contradicted=psi.ci_high <= 0.15 or (k90 is not None and k90.estimate >= many),
    )
    # A layer without a k90 is not compared with any order.
    if k90 is not None and (decided == "supported" or not corrected):
        random = rows.find("C5a", "k90", "random order")
        is_better = random is not None and random.ci_low > k90.ci_high
        checks["random order"] = "not run" if random is None else "passed" if is_better else "failed"
    against = f"benign median {np.median(benign):g}" if benign else "no benign behaviour to compare with"
    reason = f"psi1 of the last MLP {interval(psi)}; " + (
        "k90 none: the mean of its two effects is against the treatment"
        if k90 is None
        else f"k90 {k90.estimate:.0f} [{k90.ci_low:.0f}, {k90.ci_high:.0f}] of {size.estimate:.0f} neurons "
        f"(sparse: at most {few:g}, distributed: at least {many:g}), {against}"
    )
    shown = psi if k90 is None or not psi.ci_low >= 0.30 else k90
    made = verdict.verdict(rows, shown, decided, checks, reason)
    return replace(made, tags=tags(rows, False, made.verdict))


def _benign_k90(rows: Rows) -> list[float]:
    table = rows.table
    found = table[(table.claim == "C5a") & table.quantity.str.fullmatch(r"k90 B\S*") & (table.variant == "main")]
    return [float(value) for value in found.estimate]


def rule_c7(rows: Rows) -> Verdict:
    """Supported: Moran's I of rank |NIE| low >= 0.05. Contradicted: high <= 0.05."""
    stop = precondition(rows, "C7", generation(rows))
    if stop:
        return stop
    moran = rows.find("C7", "Moran's I")
    if moran is None:
        reason = "single neurons were not measured: run notebook 04 (a mixture of experts has no such neurons)"
        return Verdict(rows.model, "C7", "not testable", reason)
    window, p = rows.find("C7", "best window - best random group"), rows.find("C7", "best window, permutation p")
    checks = {
        "best window against random groups": "not run" if p is None
        else "passed" if (p.estimate <= 0.05) == (moran.estimate > 0.05) else "failed",
        "joint probability": verdict.joint(rows, "T2"),
    }  # fmt: skip
    reason = f"Moran's I {moran.estimate:.3f} [{moran.ci_low:.3f}, {moran.ci_high:.3f}] ({moran.note})"
    if window is not None and p is not None:
        reason += f"; best window - best random group {interval(window)} of TE, permutation p {p.estimate:.2f}"
    decided = decide(supported=moran.ci_low >= 0.05, contradicted=moran.ci_high <= 0.05)
    made = verdict.verdict(rows, moran, decided, checks, reason)
    return replace(made, tags=tags(rows, False, made.verdict))


SPECIFIC = 0.2  # benign answers changed, as a share of the effect on harmful ones


def rule_c4(rows: Rows, *, corrected: bool = False) -> Verdict:
    """Supported: MLPs alone carry low >= 0.60 of the hand-over residual stream's effect; contradicted: high <= 0.40.

    `corrected`: the hand-over layer's own MLP is one of them (`claims_corrected`).
    """
    stop = precondition(rows, "C4", generation(rows))
    if stop:
        return stop
    carried = CARRIED_OWN if corrected else CARRIED
    share, undefined = rows.find("C4", carried), rows.find("C4", "not defined")
    if share is None and undefined is None:
        return Verdict(
            rows.model, "C4", "not testable", "the paths above the hand-over were not measured: run notebook 05"
        )
    if share is None:
        assert undefined is not None
        return Verdict(rows.model, "C4", "inconclusive", f"{undefined.note}{_elsewhere(rows)}")
    checks = {
        "final norm frozen": verdict.same_side(rows, "C4", carried, "norm frozen", 0.5),
        "unsaturated pairs": verdict.same_side(rows, "C4", carried, "unsaturated", 0.5),
        "joint probability": verdict.joint(rows, "T2"),
    }
    decision = decide(supported=share.ci_low >= 0.60, contradicted=share.ci_high <= 0.40)
    where = "from the hand-over layer's own on" if corrected else "above the hand-over layer"
    parts = [f"MLPs {where} carry {interval(share)} of the effect"]
    for name in () if corrected else ("attention", "skip"):
        other = rows.find("C4", f"share of {name}")
        parts += [] if other is None else [f"{name} {interval(other)}"]
    layer = rows.find("C4", "hand-over layer")
    parts += (
        []
        if layer is None
        else [f"hand-over after layer {layer.estimate:.0f} [{layer.ci_low:.0f}, {layer.ci_high:.0f}]"]
    )
    made = verdict.verdict(rows, share, decision, checks, "; ".join(parts))
    # The full response has no such path: above the answer's own tokens there is no base run to hold anything at.
    return replace(made, tags=tags(rows, False, made.verdict))


def _elsewhere(rows: Rows) -> str:
    """What MLPs carry of the effect from the other layers, for a reader: no verdict rests on it."""
    others = rows.variants("C4", CARRIED, "from layer ")
    return "".join(f"; {name} MLPs carry {interval(row)}" for name, row in others.items())


def rule_c5c(rows: Rows, *, corrected: bool = False) -> Verdict:
    """Supported: the first token keeps low >= 0.8 of the effect on all tokens, and specific; contradicted: high <= 0.4.

    Specific: the share of benign answers that change has its upper limit at 20 % of the harm effect or below.
    `corrected`: answers must have been labelled by their content (`claims_corrected`).
    """
    stop = precondition(rows, "C5c", generation(rows))
    if stop:
        return stop
    labels = CONTENT if corrected else "main"
    kept, undefined = rows.find("C5c", KEPT, labels), rows.find("C5c", "not defined", labels)
    if corrected and kept is None and undefined is None and rows.find("C5c", KEPT) is not None:
        reason = "answers were labelled by their opener, which the first token decides: supply a judge (--judge)"
        return Verdict(rows.model, "C5c", "not testable", reason)
    if kept is None:
        missing = "interventions during generation were not measured: run notebook 05"
        return (
            Verdict(rows.model, "C5c", "not testable", missing)
            if undefined is None
            else Verdict(rows.model, "C5c", "inconclusive", str(undefined.note))
        )
    effect, benign = rows.find("C5c", "effect of all tokens", labels), rows.find("C5c", "benign answers changed")
    measured = effect is not None and benign is not None
    specific = measured and benign.ci_high <= SPECIFIC * effect.estimate  # type: ignore[union-attr]
    checks = {
        "benign answers": "passed" if measured else "not run",
        "full response": verdict.same_side(rows, "C5c", KEPT, "full response", 0.6, labels),
        "joint probability": verdict.joint(rows, "T2"),
    }
    decision = decide(supported=kept.ci_low >= 0.8 and specific, contradicted=kept.ci_high <= 0.4)
    reason = f"the first token alone keeps {interval(kept)} of the effect on all tokens"
    reason += f" ({kept.note})" if kept.note else ""
    reason += f"; effect of all tokens {interval(effect)}" if effect is not None else ""
    reason += (
        f"; benign answers changed {interval(benign)}, {'' if specific else 'not '}specific"
        if benign is not None
        else ""
    )
    hard = rows.find("C5c", "harmless answers changed, refusing run's values")
    reason += f"; with a refusing run's values {interval(hard)} of harmless answers change" if hard is not None else ""
    made = verdict.verdict(rows, kept, decision, checks, reason)
    # Not a part of the rule: benign pairs whose two runs agree cannot show it.
    is_blunt = hard is not None and effect is not None and hard.ci_low > SPECIFIC * effect.estimate
    return replace(
        made, tags=(*tags(rows, False, made.verdict), *(("closes harmless answers too",) if is_blunt else ()))
    )


MIDDLE = 0.4  # half way between the two thresholds


def rule_c5b(rows: Rows, *, corrected: bool = False) -> Verdict:
    """Supported: gate index low >= 0.6, specific, not a readout. Contradicted: index high <= 0.2 in every form, b and c, that is
    defined.

    "Every form" has the whole last layer in it, so that no smaller set of it was overlooked.

    Specific: benign share high <= 0.20 and perplexity ratio high <= 1.01. Not a readout: readout share high < 0.5.

    `corrected`: an index inside the last layer's sparse set counts if it is the larger one, and a set with such an index
    may be a readout (`claims_corrected`).
    """
    stop = precondition(rows, "C5b", generation(rows))
    if stop:
        return stop
    index = rows.find("C5b", "gate index")
    if index is None:
        return _nothing(rows)
    inside = _inside(rows) if corrected else None
    if inside is not None and inside.ci_low >= index.ci_low:
        index = inside
    signed = rows.find("C5b", f"{index.quantity}, signed", index.variant)
    readout, benign, cost = (
        _of_set(rows, name, index) for name in ("readout share", "benign share", "perplexity ratio")
    )
    is_gate = index.ci_low >= GATE_LOW and signed is not None and signed.ci_low > 0
    is_specific = _below(benign, BENIGN_SHARE) and _below(cost, PERPLEXITY)
    not_readout = index is inside or (readout is not None and readout.ci_high < READOUT)
    checks = {
        "specificity measured": "not run" if benign is None or cost is None else "passed",
        "final norm frozen": _frozen(rows, index),
        "joint probability": verdict.joint(rows, "T2"),
    }
    forms = [row for key in "bc" for row in _forms(rows, key)]
    decided = decide(
        supported=is_gate and is_specific and not_readout,
        contradicted=bool(forms) and all(row.ci_high <= GATE_HIGH for row in forms),
    )
    made = verdict.verdict(rows, index, decided, checks, _reason(rows, index, signed))
    return replace(made, tags=tags(rows, False, made.verdict))


def _inside(rows: Rows) -> pd.Series | None:
    """The form b of the last layer's sparse set with the highest lower limit."""
    found = [row for row in _forms(rows, "b") if not str(row.note).endswith(", whole last layer")]
    return max(found, key=lambda row: row.ci_low, default=None)


def _of_set(rows: Rows, quantity: str, index: pd.Series) -> pd.Series | None:
    """Another test of the set that an index was measured on: the verdict's own, or the last layer's sparse set."""
    found = rows.find("C5b", quantity)
    if index.quantity == "gate index" or (found is not None and str(found.note).endswith("; last")):
        return found
    return rows.find("C5b", quantity, "last layer")


def _frozen(rows: Rows, index: pd.Series) -> str:
    """The index with the final norm's scale frozen lies on the same side of the middle."""
    variant = "norm frozen" if index.variant == "main" else f"{index.variant}, norm frozen"
    return verdict.same_side(rows, "C5b", str(index.quantity), variant, MIDDLE, str(index.variant))


def _nothing(rows: Rows) -> Verdict:
    if rows.variants("C5b", "gate index, form", "a"):
        reason = "no sparse set has at least 0.2 of TE at stake: there is nothing of which to ask whether it is a gate"
        row = next(iter(rows.variants("C5b", "gate index, form", "a").values()))
        return verdict.verdict(rows, row, "inconclusive", {}, reason)
    reason = "sets of neurons were not tested: run notebook 04 (a mixture of experts has no such neurons)"
    return Verdict(rows.model, "C5b", "not testable", reason)


def _forms(rows: Rows, form: str) -> list[pd.Series]:
    """Rows of a form on the harm contrast that are defined; benign references carry a treatment's name."""
    return [
        row
        for name, row in rows.variants("C5b", "gate index, form", f"{form}:").items()
        if not name.endswith(("frozen", "read-out"))
        and not str(row.note).startswith("not defined")
        and ", own B" not in str(row.note)
    ]


def _below(row: pd.Series | None, limit: float) -> bool:
    return row is not None and row.ci_high <= limit


def _reason(rows: Rows, index: pd.Series, signed: pd.Series | None) -> str:
    parts = [f"gate index {interval(index)} ({index.note})"]
    if signed is not None and signed.ci_high < 0:
        parts.append("its sign is that of an OR: one of several would do")
    for quantity in ("readout share", "benign share", "perplexity ratio", "timing share"):
        row = _of_set(rows, quantity, index)
        parts.append(f"{quantity} {interval(row)}" if row is not None else f"{quantity} not measured")
    return "; ".join(parts)


PHI = 0.75
MIN_HARMLESS = 300
BEATS = 0.05  # p-value of a rank among random directions
BUDGET = 0.05  # relative difference up to which two budgets count as equal
RIVALS = ("early", "mid")
RANDOM = ("isotropic", "covariance-matched")


def rule_c6(rows: Rows, *, corrected: bool = False) -> Verdict:
    """Supported: harm falls by >= 2 points, phi low >= 0.75, harmless loss high <= 2 points (n >= 300), rivals beaten.

    Contradicted: steering early or mid layers, or along random directions, with the same budget does as well, or
    harmless loss low > 2 points. The rivals enter the rule itself; as controls they must have been run, and fairly.

    `corrected`: early or middle layers that do as well stand in the way of "supported" and contradict nothing
    (`claims_corrected`).
    """
    stop = precondition(rows, "C6", generation(rows))
    if stop:
        return stop
    harm, phi, loss = (rows.find("C6", name) for name in ("harm change", "phi", "harmless loss"))
    if harm is None or phi is None or loss is None:
        return Verdict(rows.model, "C6", "not testable", _missing(rows))
    decision = decide(
        supported=harm.ci_high < 0
        and harm.estimate <= -POINTS
        and phi.ci_low >= PHI
        and loss.ci_high <= POINTS
        and loss.n_pairs >= MIN_HARMLESS
        and all(_advantage(rows, rival) == "beaten" for rival in RIVALS)
        and all(_random(rows, family) == "beaten" for family in RANDOM),
        contradicted=loss.ci_low > POINTS
        or any(_advantage(rows, rival) == "equal" for rival in (() if corrected else RIVALS))
        or any(_random(rows, family) == "equal" for family in RANDOM),
    )
    checks = {
        **{f"{rival} layers at equal budget": _fair(rows, rival) for rival in RIVALS},
        **{f"random directions, {family}": _was_run(rows, f"p {family}") for family in RANDOM},
        "refits of the directions": _was_run(rows, "spread over refits"),
        "greedy decoding": verdict.same_side(rows, "C6", "harm change", "greedy", 0.0),
        "joint probability": verdict.joint(rows, "T2"),
    }
    if decision == "supported":  # what else preservation asks for can spoil this verdict, and no other
        checks |= {f"{name} margin": _within(rows, name, most) for name, most in MARGINS.items()}
    made = verdict.verdict(rows, harm, decision, checks, _reason_claims_steering(rows, harm, phi, loss))
    return replace(made, tags=tags(rows, False, made.verdict))


def _missing(rows: Rows) -> str:
    undefined = rows.find("C6", "not defined")
    return "steering was not measured: run notebook 06" if undefined is None else str(undefined.note)


def _advantage(rows: Rows, rival: str) -> str:
    """How late layers do against a rival with the same budget: "beaten", "equal" (2 points at most), or open."""
    row = rows.find("C6", f"advantage over {rival}")
    if row is None:
        return "open"
    return "beaten" if row.ci_low > 0 else "equal" if row.ci_high <= POINTS else "open"


def _random(rows: Rows, family: str) -> str:
    """The same against random directions: at least half of them doing as well is no better than chance."""
    row = rows.find("C6", f"p {family}")
    if row is None:
        return "open"
    return "beaten" if row.estimate <= BEATS else "equal" if row.estimate >= 0.5 else "open"


def _fair(rows: Rows, rival: str) -> str:
    row = rows.find("C6", f"budget of {rival} over late")
    if row is None or rows.find("C6", f"advantage over {rival}") is None:
        return "not run"
    return "passed" if abs(row.estimate - 1) <= BUDGET else "failed"


def _was_run(rows: Rows, quantity: str) -> str:
    return "not run" if rows.find("C6", quantity) is None else "passed"


def _within(rows: Rows, quantity: str, most: float) -> str:
    row = rows.find("C6", quantity)
    return "not run" if row is None else "passed" if row.ci_high <= most else "failed"


def _reason_claims_steering(rows: Rows, harm: pd.Series, phi: pd.Series, loss: pd.Series) -> str:
    parts = [
        f"harm {interval(harm)} points",
        f"phi {interval(phi)}",
        f"harmless loss {interval(loss)} points (n = {loss.n_pairs})",
    ]
    for rival in RIVALS:
        row = rows.find("C6", f"advantage over {rival}")
        parts += [] if row is None else [f"advantage over {rival} layers {interval(row)} points"]
    for family in RANDOM:
        row = rows.find("C6", f"p {family}")
        parts += [] if row is None else [f"p {row.estimate:.2f} among {family} directions"]
    return "; ".join(parts)
