"""The rules: both sides of every threshold, every control that caps, and where a corrected rule says something else."""

import math

import numpy as np
import pytest
from rows import DIRECT, FINE, LATER, NIE, PSI, REGISTERED, TWIN, Number, Numbers, judge, row, table

from companion.base import thresholds
from companion.base.thresholds import COMPUTED, KEPT_BY_FIRST_TOKEN, MLP_SHARE, MLP_SHARE_WITH_OWN
from companion.claims import corrected_rules, registered_rules
from companion.claims.verdict import Rows, Verdict

# ---- registered rules ----

ON_GENERATION = [claim for claim in REGISTERED if claim != "C3"]
GATES = {claim: "T1" if claim == "C3" else "T2-T2b" for claim in REGISTERED}
FROZEN = ("main", "norm frozen", "unsaturated")
ALL = (*FROZEN, "per patch norm", "per parameter")
LOW, HALF = (0.3, 0.2, 0.4), (0.45, 0.3, 0.6)


def every(quantity: str, claim: str) -> dict:
    return {key: None for key in FINE | LATER if key[:2] == (claim, quantity)}


# By claim: the evidence that shows, and what its reason says.
SHOWN = {
    "C1": ("late share", 0.7, ("robust",), ["0.70 [0.60, 0.80]", "harm - benign: 0.20 [0.10, 0.30]"]),
    "C2": (NIE, 0.8, ("robust",), ["MLP share 0.85", "no normalisation moves either across one half"]),
    "C3": (PSI, 0.6, (), ["psi0 0.60 [0.50, 0.70]", "by 0.20 [0.10, 0.30] AUROC"]),
    "C4": (MLP_SHARE, 0.8, (), ["above the hand-over layer carry 0.80 [0.70, 0.90]", "hand-over after layer 3 [3, 4]"]),
    "C5a": ("k90", 5.0, (), ["k90 5 [4, 7] of 1000 neurons (sparse: at most 10, distributed: at least 100), benign median 30"]),
    "C5b": ("gate index", 0.8, (), ["readout share 0.20 [0.10, 0.30]", "timing share not measured"]),
    "C5c": (KEPT_BY_FIRST_TOKEN, 0.95, (), ["keeps 0.95 [0.85, 1.00]", "benign answers changed 0.05 [0.00, 0.15], specific"]),
    "C6": ("harm change", -60.0, (), ["harmless loss 0.30 [-0.50, 1.10] points (n = 400)", "p 0.01 among isotropic"]),
    "C7": ("Moran's I", 0.2, (), ["0.200 [0.150, 0.250]", "permutation p 0.05"]),
}  # fmt: skip


@pytest.mark.parametrize("claim", REGISTERED)
def test_fine_evidence_supports_every_claim(claim: str) -> None:
    made, (quantity, estimate, tags, said) = judge(claim), SHOWN[claim]
    assert (made.verdict, made.quantity, made.estimate, made.tags) == ("supported", quantity, estimate, tags)
    assert made.n_pairs == 72 and made.n_topics == 36 and set((made.controls or {}).values()) == {"passed"}
    assert not [part for part in said if part not in made.reason]


# By claim: the quantities that its rule holds against thresholds, and their variants.
ASKED = {
    "C1": {"late share": FROZEN, "centroid difference": ()}, "C2": {NIE: ALL, DIRECT: ALL}, "C3": {PSI: (), "AUROC gain": ()},
    "C5a": {"psi1": ("main", "norm frozen"), "k90": (), "neurons in the layer": ()},
    "C7": {"Moran's I": (), "best window, permutation p": ()},
}  # fmt: skip


def case(claim: str, *numbers: Number | float) -> tuple[str, Numbers]:
    """A claim, and numbers of the quantities that its rule asks about; one alone stands for an interval without width."""
    changes: Numbers = {}
    for (quantity, variants), found in zip(ASKED[claim].items(), numbers, strict=False):
        changes |= row(claim, quantity, found if isinstance(found, tuple) else (found,) * 3, *variants)
    return claim, changes


def at(claim: str, quantity: str, numbers: Number, *variants: str) -> tuple[str, Numbers]:
    return claim, row(claim, quantity, numbers, *variants)


FINE_PSI, FINE_K90 = (0.5, 0.4, 0.6), (5.0, 4.0, 7.0)
DENSE = {("C5a", f"k90 B{i}", "main"): (5.0, 5.0, 5.0) for i in range(1, 6)}
NO_GATE = row("C5b", "gate index", (0.1, 0.05, 0.15), "main", "norm frozen")
NO_GATE |= row("C5b", "gate index, signed", (0.1, 0.05, 0.15))
RULES = {
    "supported": [
        case("C1", (0.7, 0.5, 0.8), (0.2, 0.05, 0.3)), case("C2", (0.7, 0.6, 0.8), (0.7, 0.6, 0.8)),
        case("C3", (0.4, 0.3, 0.5), (0.1, 0.01, 0.2)), at("C4", MLP_SHARE, (0.8, 0.6, 0.9), *FROZEN),
        case("C5a", (0.5, 0.30, 0.6), FINE_K90), case("C5a", FINE_PSI, (10.0, 9.0, 12.0)),
        case("C5a", FINE_PSI, (8.0, 8.0, 8.0), 384.0),  # in a small layer 8 neurons count as few
        ("C5a", {**DENSE, **row("C5a", "k90 B5", (4.0, 4.0, 4.0)), **row("C5a", "k90", (4.0, 4.0, 5.0))}),
        at("C5c", KEPT_BY_FIRST_TOKEN, (0.9, 0.8, 1.0)), at("C5c", "benign answers changed", (0.1, 0.0, 0.16)),
        case("C7", (0.1, 0.05, 0.2), 0.05),
    ],
    "inconclusive": [
        case("C1", (0.7, 0.49, 0.8), (0.2, 0.1, 0.3)), case("C1", (0.7, 0.6, 0.8), (0.2, 0.04, 0.3)),
        case("C1", (0.7, 0.6, 0.8), (0.1, -0.1, 0.3)), case("C1", (0.3, 0.2, 0.41), (0.2, 0.1, 0.3)),
        case("C1", (0.7, 0.6, 0.8), (-0.1, -0.2, 0.01)), case("C1", (0.7, -math.inf, math.inf), (0.2, 0.1, 0.3)),
        case("C1", (0.7, math.nan, math.nan), (0.2, 0.1, 0.3)), ("C1", every("late share", "C1")),
        case("C2", (0.7, 0.59, 0.8), (0.8, 0.7, 0.9)), case("C2", (0.8, 0.7, 0.9), (0.7, 0.59, 0.8)),
        case("C2", (0.4, 0.3, 0.5), (0.8, 0.7, 0.9)), case("C2", (0.4, 0.3, 0.51), LOW),
        case("C2", (0.8, math.nan, math.nan), (0.8, 0.7, 0.9)), case("C3", (0.4, 0.29, 0.5), (0.1, 0.01, 0.2)),
        case("C3", (0.6, 0.5, 0.7), (0.049, 0.01, 0.1)), case("C3", (0.6, 0.5, 0.7), (0.2, -0.01, 0.4)),
        case("C3", (0.05, 0.0, 0.11), (0.1, 0.01, 0.2)), at("C4", MLP_SHARE, (0.8, 0.59, 0.9), *FROZEN),
        at("C4", MLP_SHARE, (0.3, 0.2, 0.41), *FROZEN), case("C5a", (0.5, 0.29, 0.6), FINE_K90),
        case("C5a", FINE_PSI, (11.0, 9.0, 12.0)), case("C5a", FINE_PSI, (99.0, 90.0, 110.0)),
        case("C5a", (0.1, 0.05, 0.16), FINE_K90), case("C5a", FINE_PSI, (9.0, 8.0, 9.0), 384.0),
        ("C5a", DENSE),  # equal to the median is not below it
        at("C5b", "gate index", (0.8, 0.55, 0.9)), at("C5b", "gate index, signed", (-0.8, -0.9, -0.7)),
        at("C5b", "readout share", (0.4, 0.3, 0.5)), at("C5b", "benign share", (0.15, 0.1, 0.25)),
        at("C5b", "perplexity ratio", (1.005, 1.0, 1.02)), ("C5b", NO_GATE),  # form c is high
        at("C5c", KEPT_BY_FIRST_TOKEN, (0.9, 0.79, 1.0)), at("C5c", "benign answers changed", (0.1, 0.0, 0.17)),
        at("C6", "harm change", (-1.9, -3.0, -0.8)), at("C6", "harm change", (-5.0, -10.5, 0.5)),
        at("C6", "phi", (0.8, 0.74, 0.9)), at("C6", "harmless loss", (1.5, 0.5, 2.1)),
        *(at("C6", f"p {family}", (0.06, 0.06, 0.06)) for family in ("isotropic", "covariance-matched")),
        *(at("C6", f"advantage over {rival}", (2.0, -1.0, 5.0)) for rival in ("early", "mid")),
        case("C7", (0.1, 0.049, 0.2), 0.05), case("C7", (0.0, -0.05, 0.051), 0.5), case("C7", (0.0, -0.05, 0.04), 0.05),
        case("C7", (0.1, 0.06, 0.2), 0.1),  # windows say the opposite
    ],
    "contradicted": [
        case("C1", LOW, (0.2, 0.1, 0.3)), case("C1", (0.7, 0.6, 0.8), (-0.1, -0.2, 0.0)),
        case("C2", (0.4, 0.3, 0.5), LOW), case("C3", (0.05, 0.0, 0.1), (0.1, 0.01, 0.2)),
        at("C4", MLP_SHARE, LOW, *FROZEN), case("C5a", FINE_PSI, (100.0, 90.0, 110.0)),
        case("C5a", (0.1, 0.05, 0.15), FINE_K90), case("C5a", FINE_PSI, (39.0, 38.0, 40.0), 384.0),
        ("C5b", NO_GATE | row("C5b", "gate index, form", (0.1, 0.05, 0.15), "c: below")),
        at("C5c", KEPT_BY_FIRST_TOKEN, LOW, "main", "full response"), at("C6", "harmless loss", (4.0, 2.1, 6.0)),
        at("C6", "advantage over mid", (0.0, -2.0, 2.0)), at("C6", "p isotropic", (0.5, 0.5, 0.5)),
        at("C6", "advantage over early", (-30.0, -35.0, -25.0)), case("C7", (0.0, -0.05, 0.05), 0.5),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("claim", "changes", "said"), [(*case, said) for said in RULES for case in RULES[said]])
def test_both_sides_of_every_threshold(claim: str, changes: dict, said: str) -> None:
    made = judge(claim, changes)
    assert made.verdict == said, made.reason


# Claim, control, whose row, and the numbers by which the control fails; without the row it was not run.
CONTROLS = [
    *((claim, "joint probability", "gate", f"joint probability {'T1' if claim == 'C3' else 'T2'}", "main", (0.79, 0.7, 0.9))
      for claim in REGISTERED),
    *((claim, control, claim, quantity, variant, HALF)
      for claim, quantity in (("C1", "late share"), ("C2", NIE), ("C4", MLP_SHARE))
      for control, variant in (("final norm frozen", "norm frozen"), ("unsaturated pairs", "unsaturated"))),
    ("C3", "probe above chance on held-out topics", "C3", "AUROC probe", "main", (0.6, 0.5, 0.7)),
    ("C3", "sign in unsaturated pairs", "C3", PSI, "unsaturated", (-0.1, -0.2, 0.0)),
    ("C5a", "random order", "C5a", "k90", "random order", (8.0, 6.0, 9.0)),
    ("C5a", "final norm frozen", "C5a", "psi1", "norm frozen", (0.2, 0.1, 0.3)),
    ("C5a", "sign in unsaturated pairs", "C5a", "psi1", "unsaturated", (-0.1, -0.2, 0.1)),
]  # fmt: skip
CAPS = {
    **{(claim, f"{control}, {state}"): row(whose, quantity, numbers, variant)
       for claim, control, whose, quantity, variant, fails in CONTROLS
       for state, numbers in (("failed", fails), ("not run", None))},
    ("C1", "benign behaviours, failed"): row("C1", "centroid B5", None),
    ("C1", "benign behaviours, not run"): row("C1", "centroid difference", None) | row("C1", "late share", LOW, *FROZEN),
    **{("C2", f"{name}, not run"): row("C2", NIE, None, name) for name in ("per patch norm", "per parameter")},
    ("C5a", "benign behaviours, failed"): row("C5a", "k90 B5", None),
    ("C5a", "benign behaviours, not run"): {("C5a", f"k90 B{i}", "main"): None for i in range(1, 6)},
    ("C5b", "final norm frozen, failed"): row("C5b", "gate index", (0.1, 0.0, 0.2), "norm frozen"),
    ("C5c", "full response, failed"): row("C5c", KEPT_BY_FIRST_TOKEN, LOW, "full response"),
    ("C6", "mid layers at equal budget, failed"): row("C6", "budget of mid over late", (1.2, 1.2, 1.2)),
    ("C6", "refits of the directions, not run"): row("C6", "spread over refits", None),
    ("C6", "greedy decoding, failed"): row("C6", "harm change", (5.0, 1.0, 9.0), "greedy"),
    **{("C6", f"{name} margin, failed"): row("C6", name, (3.0, 2.5, 3.5)) for name in thresholds.MARGINS},
}  # fmt: skip


@pytest.mark.parametrize(("claim", "case"), CAPS)
def test_a_control_that_fails_or_was_not_run_caps(claim: str, case: str) -> None:
    made, (name, state) = judge(claim, CAPS[claim, case]), case.split(", ")
    assert made.verdict == "inconclusive" and "robust" not in made.tags
    assert made.controls is not None and made.controls[name] == state
    assert {other for key, other in made.controls.items() if key != name} == {"passed"}
    assert f"by its numbers, capped: {name} {state}" in made.reason


# A condition of the rule that is a control as well: without it nothing is supported, so nothing is capped.
MISSING = [
    ("C5b", "specificity measured", "perplexity ratio"), ("C5c", "benign answers", "benign answers changed"),
    ("C6", "early layers at equal budget", "advantage over early"), ("C6", "random directions, isotropic", "p isotropic"),
    ("C7", "best window against random groups", "best window, permutation p"),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "name", "quantity"), MISSING)
def test_a_missing_condition_is_a_control_that_was_not_run(claim: str, name: str, quantity: str) -> None:
    made = judge(claim, row(claim, quantity, None))
    assert made.verdict == "inconclusive" and (made.controls or {})[name] == "not run"


def test_the_untrained_twin_of_c1() -> None:
    """Any network's components are late to some degree: a twin fails by the whole rule alone, and must have been run."""
    late = judge("C1", twin=row("C1", "centroid difference", (0.1, 0.05, 0.2)))
    assert late.verdict == "inconclusive" and "capped: untrained twin failed" in late.reason
    none = judge("C1", twin=dict.fromkeys(TWIN))
    assert none.verdict == "inconclusive" and (none.controls or {})["untrained twin"] == "not run"
    for quantity, numbers in (("late share", None), ("centroid difference", None), ("late share", (0.99, 0.98, 1.0))):
        assert judge("C1", twin=row("C1", quantity, numbers)).verdict == "supported"


NO_JOINT, NO_K90 = row("gate", "joint probability T2", None), row("C5a", "k90", None, "main", "random order")
EQUAL = row("C6", "advantage over mid", (0.0, -1.0, 1.0))
RENAMED = {("C1", f"centroid B{i}", "main"): None for i in range(1, 6)}
RENAMED |= {("C1", f"centroid {name}", "main"): (0.5, 0.4, 0.6) for name in ("B1", "B10", "Btone", "B-unit", "B3")}
LOW_PSI = row("C5a", "psi1", (0.0, -0.1, 0.1), *FROZEN)
HARD = row("C5c", "harmless answers changed, refusing run's values", (0.9, 0.8, 1.0))
UNMEASURED = {"C2": "notebook 03", "C3": "not measured", "C4": "notebook 05", "C5a": "notebook 04", "C5b": "notebook 04",
              "C5c": "notebook 05", "C6": "notebook 06", "C7": "notebook 04"}  # fmt: skip
NO_EFFECTS = {("gate", f"TE {name}", "main"): None for name in ("T1", "T2", "T2-T2b")}
SAYS = [  # claim, evidence, verdict, the quantity that it shows, a part of its reason or a tag
    ("C1", row("C1", "late share", LOW, *FROZEN) | NO_JOINT, "inconclusive", "late share", "contradicted by its numbers"),
    ("C1", row("C1", "centroid difference", None), "inconclusive", "late share", "no benign behaviour to compare with"),
    ("C1", RENAMED, "supported", "late share", ""),  # benign behaviours of any name count
    (*case("C2", (0.9, 0.8, 1.0), (0.8, 0.7, 0.9)), "supported", DIRECT, ""),  # the number that decides is shown
    (*case("C2", (0.45, 0.4, 0.49), (0.3, 0.25, 0.35)), "contradicted", NIE, ""),
    (*case("C2", (0.45, 0.4, 0.49), (0.48, 0.3, 0.5)), "contradicted", DIRECT, ""),
    *(("C2", row("C2", quantity, (0.4, 0.3, 0.5), name), "supported", NIE, said)  # raw shares decide, the reader is told
      for quantity in (NIE, DIRECT) for name in ("per patch norm", "per parameter")
      for said in ("normalisation-dependent", f"the side changes {name}")),
    ("C5a", NO_K90, "inconclusive", "psi1", "k90 none"),
    ("C5a", NO_K90 | LOW_PSI, "contradicted", "psi1", "k90 none"),
    ("C5b", every("gate index", "C5b"), "inconclusive", "", "nothing of which"),
    ("C5c", HARD, "supported", KEPT_BY_FIRST_TOKEN, "closes harmless answers too"),
    ("C6", row("C6", "KL", (3.0, 2.5, 3.5)) | EQUAL, "contradicted", "harm change", ""),  # a margin caps support only
    ("C3", row("C3", PSI, None), "not testable", "", ""), ("C3", row("C3", "AUROC gain", None), "not testable", "", ""),
    ("C6", row("C6", "phi", None), "not testable", "", ""),
    ("C2", row("gate", "significand bits", (8, 8, 8)), "inconclusive", NIE, "half precision"),
    *((claim, dict.fromkeys(key for key in FINE | LATER if key[0] == claim), "not testable", "", part)
      for claim, part in UNMEASURED.items()),
    *((claim, NO_EFFECTS, "not testable", "", thresholds.NO_WRAPPERS) for claim in ON_GENERATION),
    ("C3", NO_EFFECTS, "not testable", "", "the prompt set has no harmless/harmful pairs (T1): supply some"),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "changes", "said", "quantity", "part"), SAYS)
def test_what_a_verdict_shows_and_says(claim: str, changes: dict, said: str, quantity: str, part: str) -> None:
    made = judge(claim, changes)
    assert (made.verdict, made.quantity) == (said, quantity) and part in "; ".join([made.reason, *made.tags])


def test_an_open_question_is_not_called_capped_and_c6_needs_enough_prompts() -> None:
    made = judge("C1", row("C1", "centroid difference", (0.1, -0.1, 0.3)) | NO_JOINT)
    assert made.verdict == "inconclusive" and "capped" not in made.reason
    assert [judge("C6", n_harmless=n).verdict for n in (299, 300)] == ["inconclusive", "supported"]


@pytest.mark.parametrize("claim", REGISTERED)
def test_the_precondition_asks_for_topics(claim: str) -> None:
    assert judge(claim, n_topics=20).verdict == "supported"
    made = judge(claim, n_topics=19)
    assert (made.verdict, made.reason) == ("inconclusive", f"19 topics of {GATES[claim]} in the test split, 20 needed")
    assert not made.controls


@pytest.mark.parametrize("claim", ["C1", "C3"])
@pytest.mark.parametrize(
    ("numbers", "is_open"),
    [
        ((0.5, 0.1, 0.9), True), ((-0.5, -0.9, -0.1), True), ((0.49, 0.4, 0.6), False), ((3.0, -0.1, 6.0), False),
        ((-3.0, -6.0, 0.0), False), ((3.0, -math.inf, math.inf), False), ((3.0, math.nan, math.nan), False),
        ((math.nan, 1.0, 2.0), False),
    ],
)  # fmt: skip
def test_the_precondition_asks_for_an_effect(claim: str, numbers: tuple, is_open: bool) -> None:
    made = judge(claim, row("gate", f"TE {GATES[claim]}", numbers))
    assert made.verdict == ("supported" if is_open else "inconclusive")
    assert is_open or ("nothing to mediate" in made.reason and made.quantity == f"TE {GATES[claim]}")


@pytest.mark.parametrize("claim", ON_GENERATION)
def test_without_twins_t2_alone_is_judged_and_the_verdict_says_so(claim: str) -> None:
    alone = row("gate", "TE T2-T2b", None)
    made = judge(claim, alone)
    assert made.verdict == "supported" and "no harmless twin" in made.tags
    assert "TE of T2 is" in judge(claim, alone | row("gate", "TE T2", (0.1, 0.0, 0.2))).reason


@pytest.mark.parametrize("quantity", [("C1", "late share"), ("C2", NIE)])
@pytest.mark.parametrize("variant", ["full response", "sufficiency", "necessity"])
def test_robust_asks_for_y2_and_each_direction(quantity: tuple[str, str], variant: str) -> None:
    for numbers in (None, HALF):
        made = judge(quantity[0], row(*quantity, numbers, variant))
        assert made.verdict == "supported" and "robust" not in made.tags


@pytest.mark.parametrize(("at", "tagged"), [(0.33, False), (0.34, True), (0.9, True)])
def test_late_by_architecture_is_tagged(at: float, tagged: bool) -> None:
    assert ("architecture-imposed" in judge("C1", row("gate", "earliest possible depth", (at,) * 3)).tags) == tagged


# ---- corrected rules ----


def correct(claim: str, changes: dict | None = None) -> Verdict:
    made = corrected_rules.corrected_verdicts(Rows("m", table({**FINE, **LATER, **(changes or {})})))
    (one,) = [one for one in made if one.claim == claim]
    assert (one.model, one.rule) == ("m", "corrected")
    return one


def computed(share: Number | None) -> dict:
    return row("C1", COMPUTED, share, "main", "unsaturated")


def test_every_correction_is_asked() -> None:
    own = row("C4", MLP_SHARE_WITH_OWN, (0.9, 0.8, 1.0), *FROZEN)
    for changes, missing in (({}, {"C1", "C4"}), (own, {"C1"}), (own | computed((0.9, 0.8, 1.0)), set())):
        made = corrected_rules.corrected_verdicts(Rows("m", table(FINE | LATER | changes)))
        assert [one.claim for one in made] == [claim for claim in corrected_rules.RULES if claim not in missing]


HALF_NIE, NOTHING_ABOVE = row("C2", NIE, (0.5, 0.48, 0.52)), row("C4", MLP_SHARE, (0.0, -0.1, 0.1), *FROZEN)
CENTROID, WITH_OWN = ("C1", "centroid difference"), ("C4", MLP_SHARE_WITH_OWN)
LATE, EARLY = (0.9, 0.8, 1.0), (0.2, 0.1, 0.3)
# A control that failed, and numbers that contradict the claim.
NO_PROBE, NO_PSI0 = row("C3", "AUROC probe", (0.5, 0.4, 0.6)), row("C3", PSI, (0.0, -0.01, 0.01), "main", "unsaturated")
NO_ORDER, NO_PSI1 = row("C5a", "k90", (5.0, 4.0, 7.0), "random order"), row("C5a", "psi1", (0.01, 0.0, 0.02), *FROZEN)
BY_CONTENT = row("C5c", KEPT_BY_FIRST_TOKEN, (0.0, 0.0, 0.1), thresholds.CONTENT_JUDGE, "full response")
BY_CONTENT |= row("C5c", "effect of all tokens", (0.8, 0.7, 0.9), thresholds.CONTENT_JUDGE)
NIL, PART, WHOLE = (0.0, -0.01, 0.01), (0.4, 0.2, 0.6), (1.0, 0.99, 1.01)  # psi0 of a family


def families(*numbers: Number) -> Numbers:
    return {("C3", PSI, f"family {name}"): found for name, found in zip("abc", numbers, strict=False)}


SIGNS = {"supported": "+", "contradicted": "-", "inconclusive": "?", "not testable": "0"}
# Claim, evidence, and what the registered rule says of it, and the corrected one, by `SIGNS`.
CASES = [
    ("C1", computed(LATE), "++"), ("C1", computed(LATE) | row(*CENTROID, (0.0, -0.1, 0.1)), "??"),
    ("C1", computed(LATE) | row(*CENTROID, (-0.2, -0.3, -0.1)), "-?"),  # what fetches the wrapper is early
    ("C1", computed((0.5, 0.3, 0.7)), "+?"), ("C1", computed(EARLY), "+-"),  # copied late, computed before
    # The interval of the centroid difference holds spread over behaviours, and over the topics of harm.
    ("C1", computed(LATE) | row("C1", "centroid B1", (0.1, 0.1, 0.1)), "+?"),
    ("C1", computed(LATE) | row("C1", "centroid T2-T2b", (0.7, 0.5, 0.9)), "+?"),
    ("C1", computed(LATE) | row("C1", "centroid B1", None), "??"), ("C2", HALF_NIE | row("C2", DIRECT, LATE), "?+"),
    ("C2", HALF_NIE | row("C2", DIRECT, EARLY), "?-"), ("C2", HALF_NIE | row("C2", DIRECT, (0.6, 0.5, 0.7)), "??"),
    ("C3", NO_PROBE, "??"), ("C3", NO_PROBE | NO_PSI0, "?-"),
    # Every named family must pass, whatever the mean over them.
    ("C3", families(WHOLE, WHOLE, (0.4, 0.3, 0.5)), "++"), ("C3", families(WHOLE, WHOLE, PART), "+?"),
    ("C3", families(WHOLE, NIL, NIL), "+?"), ("C3", families(NIL, NIL, (0.05, 0.0, 0.1)), "+-"),
    ("C3", NO_PSI0 | families(NIL, NIL, PART), "-?"),
    ("C3", families(WHOLE, WHOLE) | row("C3", "AUROC gain", (0.04, 0.01, 0.07)), "??"),
    ("C4", NOTHING_ABOVE | row(*WITH_OWN, (0.9, 0.6, 1.0), *FROZEN), "-+"),
    ("C4", NOTHING_ABOVE | row(*WITH_OWN, (0.9, 0.59, 1.0), *FROZEN), "-?"),
    ("C4", NOTHING_ABOVE | row(*WITH_OWN, (0.2, 0.1, 0.4), *FROZEN), "--"), ("C5a", NO_ORDER, "??"),
    ("C5a", NO_ORDER | NO_PSI1, "?-"), ("C5c", {}, "+0"),  # answers were labelled by their opener
    ("C5c", BY_CONTENT, "?-"),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "changes", "said"), CASES)
def test_a_corrected_rule_beside_the_registered_one(claim: str, changes: dict, said: str) -> None:
    assert SIGNS[judge(claim, changes).verdict] + SIGNS[correct(claim, changes).verdict] == said


def test_behaviours_are_a_sample_in_the_interval_of_the_centroid_difference() -> None:
    benign = [0.773, 0.815, 0.811, 0.736, 0.738, 0.763]
    numbers = {("C1", f"centroid B{i}", "main"): (value,) * 3 for i, value in enumerate(benign, start=1)}
    numbers |= row("C1", "centroid difference", (0.0676, 0.0635, 0.0719))
    numbers |= row("C1", "centroid T2-T2b", (0.84, 0.8, 0.88))
    found = corrected_rules.centroid_over_behaviours(Rows("m", table(FINE | numbers)))
    half = 2.5706 * (np.var(benign, ddof=1) / 6 + (0.08 / 3.92) ** 2) ** 0.5
    assert found is not None
    assert [found.ci_low, found.ci_high] == pytest.approx([0.0676 - half, 0.0676 + half], abs=1e-5)
    alone = {("C1", f"centroid B{i}", "main"): None for i in range(2, 6)}
    made = correct("C1", computed(LATE) | alone)
    assert made.verdict == "inconclusive" and "[-inf, inf], behaviours resampled" in made.reason
    assert corrected_rules.centroid_over_behaviours(Rows("m", table({}))) is None


NOTHING_KEPT = row("C5c", KEPT_BY_FIRST_TOKEN, None) | row("C5c", "not defined", (0.0, 0.0, 0.0))
REASONS = [  # claim, evidence, what the corrected rule says of it, and why
    ("C1", computed(LATE) | row("C1", "centroid B1", (0.1, 0.1, 0.1)), "inconclusive", "resampled, which leaves 0.05 open"),
    ("C1", computed(LATE) | row("C1", "centroid B5", None), "inconclusive", "capped: benign behaviours failed"),
    ("C5c", {}, "not testable", "--judge"),
    ("C5c", NOTHING_KEPT, "inconclusive", ""),  # where clamping does nothing no label is needed
]  # fmt: skip


@pytest.mark.parametrize(("claim", "changes", "verdict", "reason"), REASONS)
def test_a_corrected_rule_says_why(claim: str, changes: dict, verdict: str, reason: str) -> None:
    made = correct(claim, changes)
    assert made.verdict == verdict and reason in made.reason


def test_c3_names_every_family_and_shows_the_weakest() -> None:
    made = correct("C3", families(WHOLE, NIL, PART))
    assert (made.estimate, made.ci_low, made.ci_high) == NIL
    said = ["a 1.00 [0.99, 1.01] early", "b 0.00 [-0.01, 0.01] not early", "c 0.40 [0.20, 0.60] undecided"]
    assert made.reason.endswith("; ".join(f"family {one}" for one in said)) and made.tags == ("families differ",)
    few = (0.06, 0.01, 0.18)  # surely not early, and not surely next to nothing: what keeps the claim from contradicted
    assert correct("C3", families(NIL, few)).ci_high == 0.18
    assert not {" early", " undecided"} & set(judge("C3", families(WHOLE, NIL, PART)).reason.split("]"))


def c6(quantity: str, *numbers: float, variant: str = "main") -> dict:
    return row("C6", quantity, (numbers[0], numbers[-2], numbers[-1]) if numbers else None, variant)


# Evidence, and what the rules say of C6a, C6b and C6c, by `SIGNS`.
PARTS = [
    ({}, "+++"), (c6("harm change", -1.9, -2.5, -1.0), "?++"), (c6("harm change", -1.0, -1.9, -0.5), "-++"),
    (c6("harm change", -30.0, -60.0, 0.5), "?++"), (c6("phi", 0.8, 0.7, 0.9), "?++"),
    (c6("p isotropic", 0.06, 0.06, 0.06), "?++"), (c6("p covariance-matched"), "?++"),
    (c6("p covariance-matched", 0.5, 0.5, 0.5), "-++"), (c6("spread over refits"), "?++"),
    (c6("harm change", 1.0, -1.0, 3.0, variant="greedy"), "?++"),
    (c6("harm change", 0.0, -1.0, 1.0) | c6("spread over refits"), "-++"),  # a control of support stops no contradiction
    (c6("harmless loss", 1.5, 0.5, 2.1), "+?+"), (c6("harmless loss", 4.0, 2.1, 6.0), "+-+"),
    *((c6(name, most, 0.0, 1.01 * most), "+?+") for name, most in thresholds.MARGINS.items()),
    *((c6(name), "+?+") for name in thresholds.MARGINS),
    *((c6(name, 2 * most, 1.01 * most, 3 * most), "+-+") for name, most in thresholds.MARGINS.items()),
    *((c6(f"advantage over {rival}", 2.0, -1.0, 5.0), "++?") for rival in ("early", "mid")),
    *((c6(f"advantage over {rival}", -1.0, -3.0, 1.9), "++-") for rival in ("early", "mid")),
    (c6("advantage over mid", 1.0, 0.1, 1.9), "+++"),  # small, but surely more
    (c6("advantage over mid", 0.0, -2.0, 2.0), "++?"), (c6("advantage over mid"), "++?"),
    (c6("budget of early over late", 1.2, 1.2, 1.2), "++?"),
    (row("gate", "joint probability T2", (0.7, 0.7, 0.7)), "???"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), PARTS)
def test_each_part_of_c6_is_asked_alone(changes: dict, said: str) -> None:
    assert "".join(SIGNS[correct(part, changes).verdict] for part in corrected_rules.C6_PARTS) == said


def test_preservation_rests_on_enough_prompts_and_shows_the_cost_that_decides() -> None:
    few = corrected_rules.corrected_c6b(Rows("m", table(FINE | LATER, n_harmless=299)))
    assert few.verdict == "inconclusive"
    dear = c6("over-refusal", 3.0, 0.9, 5.7) | c6("harmless loss", 0.7, -0.3, 2.2)
    assert [correct("C6b", changes).quantity for changes in ({}, dear)] == ["over-refusal", "over-refusal"]
    assert correct("C6b", c6("KL", 0.05, 0.04, 0.06) | dear).quantity == "KL"
    assert correct("C6c", c6("advantage over mid", -3.0, -5.0, -1.0)).estimate == -3


@pytest.mark.parametrize("part", corrected_rules.C6_PARTS)
def test_without_a_trial_no_part_of_c6_can_be_asked(part: str) -> None:
    told = [correct(part, c6("phi")).reason, correct(part, row("gate", "TE T2-T2b", (0.1, 0.0, 0.2))).verdict]
    assert "notebook 06" in told[0] and told[1] == "inconclusive"
    undefined = table(FINE | LATER | c6("phi") | row("C6", "not defined", (0.0, 0.0, 0.0)))
    undefined.loc[undefined.quantity == "not defined", "note"] = "no strength is allowed"
    assert corrected_rules.RULES[part](Rows("m", undefined)).reason == "no strength is allowed"
    assert correct("C6c", c6("advantage over early") | c6("advantage over mid")).verdict == "not testable"


def gates(inside: Number, benign: Number = (0.1, 0.05, 0.15)) -> Rows:
    """A last-layer set that is a readout, with an index inside its neurons; below the last layer there is no gate."""
    none, form, last = (0.0, 0.0, 0.05), "b: gate by wrapper x up by harm", "last layer"
    numbers = row("C5b", "gate index", none, "main", "norm frozen") | row("C5b", "gate index, signed", none)
    numbers |= row("C5b", "gate index, form", none, "c: below") | row("C5b", "gate index, form, signed", inside, form)
    numbers |= row("C5b", "gate index, form", inside, form, f"{form}, norm frozen")
    numbers |= row("C5b", "readout share", (1.0, 0.99, 1.01), last) | row("C5b", "benign share", benign, last)
    made = table(FINE | LATER | numbers | row("C5b", "perplexity ratio", (1.0, 0.99, 1.005), last))
    made.loc[made.variant == last, "note"] = "6 benign behaviours; last"
    made.loc[made.variant.str.startswith("b:"), "note"] = f"{form}, last"
    return Rows("m", made)


def test_a_gate_inside_last_layer_neurons_is_seen_by_the_corrected_rule() -> None:
    assert registered_rules.rule_c5b(gates(LATE)).verdict == "inconclusive"
    unspecific = gates(LATE, benign=(0.3, 0.2, 0.4))
    found = [corrected_rules.corrected_c5b(one).verdict for one in (gates(LATE), gates((0.7, 0.5, 0.9)), unspecific)]
    assert found == ["supported", "inconclusive", "inconclusive"]
