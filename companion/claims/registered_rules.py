"""The pre-registered rules of all claims: what evidence supports, and what contradicts, each of them.

A rule sees the evidence rows alone, of a model that passes the precondition, and asks as was written down before the shipped
models were measured. Arguments after the rows are where a corrected rule (`corrected_rules`) differs; defaults are registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from companion.base import thresholds
from companion.base.thresholds import KEPT_BY_FIRST_TOKEN, MIN_BENIGN, MLP_SHARE, MLP_SHARE_WITH_OWN, POINTS, PSI
from companion.claims import verdict
from companion.claims.verdict import Rows, Verdict, conclude, control, decide, interval, is_high, is_low, same_side

NO_EFFECT = "no component has a positive effect on the discover split"
NO_NEURONS = "single neurons were not measured: run notebook 04b (a mixture of experts has no such neurons)"
NO_BENIGN = "no benign behaviour to compare with"
PSI_MIDDLE = 0.225  # half way between the two thresholds of psi1
INDEX_MIDDLE = 0.4  # half way between the two thresholds of the gate index
SPECIFIC = 0.2  # benign answers changed, as a share of the effect on harmful ones
PHI = 0.75
MIN_HARMLESS = 300
BEATS = 0.05  # p-value of a rank among random directions
BUDGET = 0.05  # relative difference up to which two budgets count as equal
RIVALS = ("early", "mid")
RANDOM = ("isotropic", "covariance-matched")
TRIED = ("harm change", "phi", "harmless loss")  # what every trial of a defence has


def rule_c1(rows: Rows) -> Verdict:
    """Supported: late share low >= 0.50, centroid difference low >= 0.05. Contradicted: high <= 0.40, or <= 0.

    An untrained twin must not pass this rule: if it does, the rule reads architecture, not learning.
    """
    share, centroid = rows.find("C1", "late share"), rows.find("C1", "centroid difference")
    if share is None:
        return Verdict(rows.model, "C1", "inconclusive", NO_EFFECT)
    twin = Rows(rows.model + thresholds.UNTRAINED, rows.evidence)
    checks = {
        "benign behaviours": verdict.benign_behaviours(rows),
        "untrained twin": "not run" if twin.table.empty else "failed" if _is_late(twin) else "passed",
        "final norm frozen": same_side(rows, "C1", "late share", "norm frozen", 0.5),
        "unsaturated pairs": same_side(rows, "C1", "late share", "unsaturated", 0.5),
    }
    is_not_later = centroid is not None and centroid.ci_high <= 0
    decision = decide(supported=_is_late(rows), contradicted=is_low(share) or is_not_later)
    reason = f"late share {interval(share)}; "
    reason += NO_BENIGN if centroid is None else f"depth centroid, harm - benign: {interval(centroid)}"
    made = conclude(rows, share, decision, checks, reason)
    earliest = rows.find("gate", "earliest possible depth")
    imposed = ("architecture-imposed",) if earliest is not None and earliest.estimate > thresholds.EARLY else ()
    return replace(made, tags=(*imposed, *made.tags, *_robust(rows, made, "late share")))


def _is_late(rows: Rows) -> bool:
    share, centroid = rows.find("C1", "late share"), rows.find("C1", "centroid difference")
    return share is not None and centroid is not None and is_high(share) and bool(centroid.ci_low >= 0.05)


def _robust(rows: Rows, made: Verdict, quantity: str) -> tuple[str, ...]:
    """The tag of a supported claim that the full-response outcome and each direction alone would support too."""
    found = [rows.find(made.claim, quantity, variant) for variant in ("full response", "sufficiency", "necessity")]
    is_robust = made.verdict == "supported" and all(row is not None and is_high(row) for row in found)
    return ("robust",) if is_robust else ()


def rule_c2(rows: Rows) -> Verdict:
    """Supported: MLP share low >= 0.60 of direct effects and of NIE. Contradicted: high <= 0.50 of both."""
    total, direct = rows.find("C2", "MLP share of NIE"), rows.find("C2", "MLP share of direct effects")
    if not rows.of("C2"):
        return Verdict(rows.model, "C2", "not testable", "direct effects were not measured: run notebook 03")
    if total is None or direct is None:
        return Verdict(rows.model, "C2", "inconclusive", NO_EFFECT)
    sizes = ("per patch norm", "per parameter")
    checks = {
        "final norm frozen": same_side(rows, "C2", "MLP share of NIE", "norm frozen", 0.5),
        "unsaturated pairs": same_side(rows, "C2", "MLP share of NIE", "unsaturated", 0.5),
        **{name: control(rows.find("C2", "MLP share of NIE", name)) for name in sizes},
    }
    both = total, direct
    decision = decide(supported=all(map(is_high, both)), contradicted=all(map(is_low, both)))
    flips = [one for one in sizes if "failed" in [same_side(rows, "C2", str(raw.quantity), one, 0.5) for raw in both]]
    reason = f"MLP share {interval(direct)} of direct effects, {interval(total)} of indirect effects; "
    reason += "" if (total.estimate > 0.5) == (direct.estimate > 0.5) else "the two disagree; "
    reason += f"the side changes {' and '.join(flips)}" if flips else "no normalisation moves either across one half"
    # Shown is the share that decides: both must pass, so the one that is further from doing so.
    lowest, highest = min(both, key=lambda row: row.ci_low), max(both, key=lambda row: row.ci_high)
    made = conclude(rows, highest if decision == "contradicted" else lowest, decision, checks, reason)
    dependent = ("normalisation-dependent",) if flips else ()
    return replace(made, tags=(*dependent, *made.tags, *_robust(rows, made, "MLP share of NIE")))


def rule_c3(rows: Rows, *, is_corrected: bool = False) -> Verdict:
    """Supported: psi0 low >= 0.30 and AUROC gain >= 0.05 (its interval above 0). Contradicted: psi0 high <= 0.10.

    Corrected, every named family of pairs must pass, and the probe is a control of support alone. The weakest family is shown;
    where all are surely below the threshold the strongest, which alone can keep the claim from being contradicted.
    """
    psi, gain = rows.find("C3", PSI), rows.find("C3", "AUROC gain")
    if psi is None or gain is None:
        return Verdict(rows.model, "C3", "not testable", "the early-layer effect or the probe was not measured")
    probe = "probe above chance on held-out topics"
    checks = {
        probe: control(rows.find("C3", "AUROC probe"), lambda row: row.ci_low > 0.5),
        "sign in unsaturated pairs": same_side(rows, "C3", PSI, "unsaturated", 0.0),
    }
    families = rows.variants("C3", PSI, "family ")
    asked = list(families.values()) if is_corrected and families else [psi]
    decision = decide(
        supported=all(map(is_high, asked)) and gain.estimate >= 0.05 and gain.ci_low > 0,
        contradicted=all(map(is_low, asked)),
    )
    reason = f"psi0 {interval(psi)} on tokens that do not differ; probe beats bag of tokens by {interval(gain)} AUROC"
    for name, row in families.items():
        side = " early" if is_high(row) else " not early" if is_low(row) else " undecided"
        reason += f"; {name} {interval(row)}{side if is_corrected else ''}"
    differ = len({row.estimate >= verdict.AT_LEAST[PSI][0] for row in families.values()}) > 1
    strongest, weakest = max(asked, key=lambda row: row.ci_high), min(asked, key=lambda row: row.ci_low)
    shown = strongest if strongest.ci_high < 0.30 else weakest
    for_support, tags = (probe,) if is_corrected else (), ("families differ",) if differ else ()
    return conclude(rows, shown, decision, checks, reason, for_support=for_support, tags=tags)


def rule_c4(rows: Rows, *, is_corrected: bool = False) -> Verdict:
    """Supported: MLPs alone carry low >= 0.60 of the hand-over residual stream's effect; contradicted: high <= 0.40.

    Corrected, the hand-over layer's own MLP is among them. The reason names the shares of the other paths, too, if registered.
    """
    carried = MLP_SHARE_WITH_OWN if is_corrected else MLP_SHARE
    share, undefined = rows.find("C4", carried), rows.find("C4", "not defined")
    if share is None:
        if undefined is None:
            why = "the paths above the hand-over were not measured: run notebook 05"
            return Verdict(rows.model, "C4", "not testable", why)
        elsewhere = rows.variants("C4", MLP_SHARE, "from layer ")  # for a reader: no verdict rests on it
        parts = [str(undefined.note), *(f"{name} MLPs carry {interval(row)}" for name, row in elsewhere.items())]
        return Verdict(rows.model, "C4", "inconclusive", "; ".join(parts))
    checks = {
        "final norm frozen": same_side(rows, "C4", carried, "norm frozen", 0.5),
        "unsaturated pairs": same_side(rows, "C4", carried, "unsaturated", 0.5),
    }
    decision = decide(supported=is_high(share), contradicted=is_low(share))
    where = "from the hand-over layer's own on" if is_corrected else "above the hand-over layer"
    parts = [f"MLPs {where} carry {interval(share)} of the effect"]
    shares = {name: rows.find("C4", f"share of {name}") for name in (() if is_corrected else ("attention", "skip"))}
    parts += [f"{name} {interval(row)}" for name, row in shares.items() if row is not None]
    if (layer := rows.find("C4", "hand-over layer")) is not None:
        parts.append(f"hand-over after layer {layer.estimate:.0f} [{layer.ci_low:.0f}, {layer.ci_high:.0f}]")
    # The full response has no such path: above the answer's own tokens there is no base run to hold anything at.
    return conclude(rows, share, decision, checks, "; ".join(parts))


def rule_c5a(rows: Rows, *, is_corrected: bool = False) -> Verdict:
    """Supported: psi1 low >= 0.30, k90 <= max(1 % of the layer, 8), below the benign median. Contradicted: psi1 high <=
    0.15 or k90 >= 10 % of the layer. Corrected, the random order is a control of support alone.
    """
    psi, size = rows.find("C5a", "psi1"), rows.find("C5a", "neurons in the layer")
    if psi is None or size is None:
        return Verdict(rows.model, "C5a", "not testable", NO_NEURONS)
    benign = [row.estimate for name, row in rows.of("C5a").items() if name.startswith("k90 B")]
    k90, random = rows.find("C5a", "k90"), rows.find("C5a", "k90", "random order")
    few, many = thresholds.few_neurons(size.estimate), 0.1 * size.estimate
    is_sparse = k90 is not None and k90.estimate <= few and (not benign or k90.estimate < np.median(benign))
    checks = {
        "benign behaviours": "not run" if not benign else "passed" if len(benign) >= MIN_BENIGN else "failed",
        "final norm frozen": same_side(rows, "C5a", "psi1", "norm frozen", PSI_MIDDLE),
        "sign in unsaturated pairs": same_side(rows, "C5a", "psi1", "unsaturated", 0.0),
    }
    if k90 is None:  # and so it is not compared with any order
        sparsity = "k90 none: the mean of its two effects is against the treatment"
    else:
        checks["random order"] = control(random, lambda row: row.ci_low > k90.ci_high)
        sparsity = f"k90 {k90.estimate:.0f} [{k90.ci_low:.0f}, {k90.ci_high:.0f}] of {size.estimate:.0f} neurons "
        sparsity += f"(sparse: at most {few:g}, distributed: at least {many:g}), "
        sparsity += f"benign median {np.median(benign):g}" if benign else NO_BENIGN
    is_dense = k90 is not None and k90.estimate >= many
    decision = decide(supported=is_high(psi) and is_sparse, contradicted=is_low(psi) or is_dense)
    shown = psi if k90 is None or not is_high(psi) else k90
    reason = f"psi1 of the last MLP {interval(psi)}; {sparsity}"
    return conclude(rows, shown, decision, checks, reason, for_support=("random order",) if is_corrected else ())


def rule_c5b(rows: Rows, inside: pd.Series | None = None) -> Verdict:
    """Supported: gate index low >= 0.6, specific, not a readout. Contradicted: high <= 0.2 in every defined form b and c.

    Specific: benign share high <= 0.20 and perplexity ratio high <= 1.01. Not a readout: less than half of the set's effect is
    what it writes into the logits itself (readout share high < 0.5). The corrected rule reads the index `inside` a set instead,
    which may be a readout.

    A last-layer neuron only adds into the last residual stream, so form a (the plain factorial) is near zero there whatever was
    learned. A gate could show inside a neuron (b) or below the last layer (c); "every form" has the whole last layer in it.
    What the index may be read from was widened after a first look (`companion.neurons.gating`).
    """
    index = rows.find("C5b", "gate index") if inside is None else inside
    if index is None:
        if rows.variants("C5b", "gate index, form", "a"):
            why = "no sparse set has at least 0.2 of TE at stake: there is nothing of which to ask whether it is a gate"
            return Verdict(rows.model, "C5b", "inconclusive", why)
        why = "sets of neurons were not tested: run notebook 04b (a mixture of experts has no such neurons)"
        return Verdict(rows.model, "C5b", "not testable", why)
    signed = rows.find("C5b", f"{index.quantity}, signed", index.variant)
    names = ("readout share", "benign share", "perplexity ratio", "timing share")
    # Other tests of the set that the index was measured on: the verdict's own, or the last layer's sparse set.
    tests = {name: rows.find("C5b", name) for name in names}
    for name, row in tests.items():
        if inside is not None and (row is None or not str(row.note).endswith("; last")):
            tests[name] = rows.find("C5b", name, "last layer")
    readout, benign, cost, _ = tests.values()
    is_gate = index.ci_low >= thresholds.GATE_LOW and signed is not None and signed.ci_low > 0
    is_specific = is_below(benign, thresholds.BENIGN_SHARE) and is_below(cost, thresholds.PERPLEXITY)
    not_readout = inside is not None or (readout is not None and readout.ci_high < thresholds.READOUT)
    frozen = "norm frozen" if index.variant == "main" else f"{index.variant}, norm frozen"
    checks = {
        "specificity measured": "not run" if benign is None or cost is None else "passed",
        "final norm frozen": same_side(rows, "C5b", str(index.quantity), frozen, INDEX_MIDDLE, str(index.variant)),
    }
    forms = [row for form in "bc" for row in gate_forms(rows, form)]
    decision = decide(
        supported=is_gate and is_specific and not_readout,
        contradicted=bool(forms) and all(row.ci_high <= thresholds.GATE_HIGH for row in forms),
    )
    parts = [f"gate index {interval(index)} ({index.note})"]
    if signed is not None and signed.ci_high < 0:
        parts.append("its sign is that of an OR: one of several would do")
    parts += [f"{name} {'not measured' if row is None else interval(row)}" for name, row in tests.items()]
    return conclude(rows, index, decision, checks, "; ".join(parts))


def gate_forms(rows: Rows, form: str) -> list[pd.Series]:
    """Rows of a form on the harm contrast that are defined; benign references carry a treatment's name."""
    found = rows.variants("C5b", "gate index, form", f"{form}:").items()
    mine = [row for name, row in found if not name.endswith(("frozen", "read-out"))]
    return [row for row in mine if not str(row.note).startswith("not defined") and ", own B" not in str(row.note)]


def is_below(row: pd.Series | None, limit: float) -> bool:
    """Whether a row was measured and its whole interval lies at the limit or below."""
    return row is not None and row.ci_high <= limit


def rule_c5c(rows: Rows, labels: str = "main") -> Verdict:
    """Supported: the first token keeps low >= 0.8 of the effect on all tokens, and specific; contradicted: high <= 0.4.

    Specific: share of benign answers that change high <= 20 % of the harm effect. `labels`: the rows' variant, by who labelled.
    """
    kept, undefined = rows.find("C5c", KEPT_BY_FIRST_TOKEN, labels), rows.find("C5c", "not defined", labels)
    if kept is None:
        if undefined is not None:
            return Verdict(rows.model, "C5c", "inconclusive", str(undefined.note))
        why = "interventions during generation were not measured: run notebook 05"
        return Verdict(rows.model, "C5c", "not testable", why)
    effect, benign = rows.find("C5c", "effect of all tokens", labels), rows.find("C5c", "benign answers changed")
    hard = rows.find("C5c", "harmless answers changed, refusing run's values")
    allowed = np.nan if effect is None else SPECIFIC * effect.estimate
    is_specific = is_below(benign, allowed)
    checks = {
        "benign answers": "not run" if effect is None or benign is None else "passed",
        "full response": same_side(rows, "C5c", KEPT_BY_FIRST_TOKEN, "full response", 0.6, labels),
    }
    decision = decide(supported=is_high(kept) and is_specific, contradicted=is_low(kept))
    reason = f"the first token alone keeps {interval(kept)} of the effect on all tokens"
    reason += f" ({kept.note})" if kept.note else ""
    if effect is not None:
        reason += f"; effect of all tokens {interval(effect)}"
    if benign is not None:
        reason += f"; benign answers changed {interval(benign)}, {'' if is_specific else 'not '}specific"
    if hard is not None:
        reason += f"; with a refusing run's values {interval(hard)} of harmless answers change"
    made = conclude(rows, kept, decision, checks, reason)
    # Not a part of the rule: benign pairs whose two runs agree cannot show it.
    closes_all = hard is not None and hard.ci_low > allowed
    return replace(made, tags=(*made.tags, "closes harmless answers too")) if closes_all else made


def rule_c6(rows: Rows) -> Verdict:
    """Supported: harm falls by >= 2 points, phi low >= 0.75, harmless loss high <= 2 points (n >= 300), rivals beaten.

    Contradicted: steering early or mid layers, or along random directions, with the same budget does as well, or harmless loss
    low > 2 points. The rivals enter the rule itself; as controls they must have been run, and fairly.
    """
    found = trial(rows, "C6")
    if isinstance(found, Verdict):
        return found
    harm, phi, loss = (found[name] for name in TRIED)
    rivals = {name: found.get(f"advantage over {name}") for name in RIVALS}
    random = {family: found.get(f"p {family}") for family in RANDOM}
    falls = harm.ci_high < 0 and harm.estimate <= -POINTS and phi.ci_low >= PHI
    is_kept = loss.ci_high <= POINTS and loss.n_pairs >= MIN_HARMLESS
    wins = all(map(is_beaten, rivals.values())) and all(map(beats_chance, random.values()))
    # At least half of the random directions doing as well is no better than chance.
    is_chance = any(row is not None and row.estimate >= 0.5 for row in random.values())
    is_matched = any(not is_beaten(row) and is_below(row, POINTS) for row in rivals.values())
    decision = decide(
        supported=falls and is_kept and wins, contradicted=loss.ci_low > POINTS or is_matched or is_chance
    )
    # What else preservation asks for can spoil support, and no other verdict.
    limits = thresholds.MARGINS.items()
    margins = {f"{name} margin": control(found.get(name), partial(is_below, limit=most)) for name, most in limits}
    checks = {
        **{f"{name} layers at equal budget": equal_budget(rows, name) for name in RIVALS},
        **{f"random directions, {family}": control(row) for family, row in random.items()},
        "refits of the directions": control(found.get("spread over refits")),
        "greedy decoding": same_side(rows, "C6", "harm change", "greedy", 0.0),
        **margins,
    }
    parts = [f"harm {interval(harm)} points", f"phi {interval(phi)}"]
    parts.append(f"harmless loss {interval(loss)} points (n = {loss.n_pairs})")
    parts += [f"advantage over {name} layers {interval(row)} points" for name, row in rivals.items() if row is not None]
    parts += [f"p {row.estimate:.2f} among {name} directions" for name, row in random.items() if row is not None]
    return conclude(rows, harm, decision, checks, "; ".join(parts), for_support=margins)


def trial(rows: Rows, claim: str) -> Verdict | dict[str, pd.Series]:
    """What was measured of the defence, by quantity; where none was tried, the verdict on C6 or a part of it."""
    found = rows.of("C6")
    if set(TRIED) <= set(found):
        return found
    why = str(found["not defined"].note) if "not defined" in found else "steering was not measured: run notebook 06"
    return Verdict(rows.model, claim, "not testable", why)


def beats_chance(p: pd.Series | None) -> bool:
    """Whether random directions of a family were tried, and did surely less."""
    return p is not None and p.estimate <= BEATS


def is_beaten(advantage: pd.Series | None) -> bool:
    """Whether a rival was tried, and does surely less."""
    return advantage is not None and advantage.ci_low > 0


def equal_budget(rows: Rows, rival: str) -> str:
    """The control that a rival was tried, with the budget of the late layers."""
    if rows.find("C6", f"advantage over {rival}") is None:
        return "not run"
    return control(rows.find("C6", f"budget of {rival} over late"), lambda row: abs(row.estimate - 1) <= BUDGET)


def rule_c7(rows: Rows) -> Verdict:
    """Supported: Moran's I of rank |NIE| low >= 0.05. Contradicted: high <= 0.05."""
    moran = rows.find("C7", "Moran's I")
    if moran is None:
        return Verdict(rows.model, "C7", "not testable", NO_NEURONS)
    window, p = rows.find("C7", "best window - best random group"), rows.find("C7", "best window, permutation p")
    agrees = control(p, lambda row: (row.estimate <= 0.05) == (moran.estimate > 0.05))
    reason = f"Moran's I {moran.estimate:.3f} [{moran.ci_low:.3f}, {moran.ci_high:.3f}] ({moran.note})"
    if window is not None and p is not None:
        reason += f"; best window - best random group {interval(window)} of TE, permutation p {p.estimate:.2f}"
    decision = decide(supported=is_high(moran), contradicted=is_low(moran))
    return conclude(rows, moran, decision, {"best window against random groups": agrees}, reason)


RULES: dict[str, Callable[[Rows], Verdict]] = {
    "C1": rule_c1, "C2": rule_c2, "C3": rule_c3, "C4": rule_c4, "C5a": rule_c5a, "C5b": rule_c5b, "C5c": rule_c5c,
    "C6": rule_c6, "C7": rule_c7,
}  # fmt: skip
