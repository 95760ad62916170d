"""Corrected rules: each differs from the registered one where it was found to err, and nowhere else."""

import numpy as np
import pytest
from ledger_rows import DIRECT, FINE, LATER, NIE, PSI, Number, Numbers, judge, row, table

from companion.base.thresholds import (
    COMPUTED,
    CONTENT_JUDGE,
    KEPT_BY_FIRST_TOKEN,
    MARGINS,
    MLP_SHARE,
    MLP_SHARE_WITH_OWN,
)
from companion.claims import corrected_rules, registered_rules
from companion.claims.verdict import Rows, Verdict

FROZEN = ("main", "norm frozen", "unsaturated")


def correct(claim: str, changes: dict | None = None) -> Verdict:
    made = corrected_rules.RULES[claim](Rows("m", table({**FINE, **LATER, **(changes or {})})))
    assert made is not None and (made.model, made.claim) == ("m", claim)
    return made


def computed(share: Number | None) -> dict:
    return row("C1", COMPUTED, share, "main", "unsaturated")


def test_every_correction_is_asked() -> None:
    """C1 and C4 have none where their share was not measured, as in older runs."""
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
BY_CONTENT = row("C5c", KEPT_BY_FIRST_TOKEN, (0.0, 0.0, 0.1), CONTENT_JUDGE, "full response")
BY_CONTENT |= row("C5c", "effect of all tokens", (0.8, 0.7, 0.9), CONTENT_JUDGE)
NONE, HALF, ALL = (0.0, -0.01, 0.01), (0.4, 0.2, 0.6), (1.0, 0.99, 1.01)  # psi0 of a family


def families(*numbers: Number) -> Numbers:
    return {("C3", PSI, f"family {name}"): found for name, found in zip("abc", numbers, strict=False)}


CASES = [  # claim, evidence, what the registered rule says of it, and the corrected one
    ("C1", computed(LATE), "supported", "supported"),
    ("C1", computed(LATE) | row(*CENTROID, (0.0, -0.1, 0.1)), "inconclusive", "inconclusive"),
    # What fetches the wrapper is early: no contradiction.
    ("C1", computed(LATE) | row(*CENTROID, (-0.2, -0.3, -0.1)), "contradicted", "inconclusive"),
    ("C1", computed((0.5, 0.3, 0.7)), "supported", "inconclusive"),
    ("C1", computed(EARLY), "supported", "contradicted"),  # copied late, computed before
    # The interval of the centroid difference holds spread over behaviours, and over the topics of harm.
    ("C1", computed(LATE) | row("C1", "centroid B1", (0.1, 0.1, 0.1)), "supported", "inconclusive"),
    ("C1", computed(LATE) | row("C1", "centroid T2-T2b", (0.7, 0.5, 0.9)), "supported", "inconclusive"),
    ("C1", computed(LATE) | row("C1", "centroid B1", None), "inconclusive", "inconclusive"),
    ("C2", HALF_NIE | row("C2", DIRECT, LATE), "inconclusive", "supported"),
    ("C2", HALF_NIE | row("C2", DIRECT, EARLY), "inconclusive", "contradicted"),
    ("C2", HALF_NIE | row("C2", DIRECT, (0.6, 0.5, 0.7)), "inconclusive", "inconclusive"),
    ("C3", NO_PROBE, "inconclusive", "inconclusive"),
    ("C3", NO_PROBE | NO_PSI0, "inconclusive", "contradicted"),
    # Every named family must pass, whatever the mean over them.
    ("C3", families(ALL, ALL, (0.4, 0.3, 0.5)), "supported", "supported"),
    ("C3", families(ALL, ALL, HALF), "supported", "inconclusive"),
    ("C3", families(ALL, NONE, NONE), "supported", "inconclusive"),
    ("C3", families(NONE, NONE, (0.05, 0.0, 0.1)), "supported", "contradicted"),
    ("C3", NO_PSI0 | families(NONE, NONE, HALF), "contradicted", "inconclusive"),
    ("C3", families(ALL, ALL) | row("C3", "AUROC gain", (0.04, 0.01, 0.07)), "inconclusive", "inconclusive"),
    ("C4", NOTHING_ABOVE | row(*WITH_OWN, (0.9, 0.6, 1.0), *FROZEN), "contradicted", "supported"),
    ("C4", NOTHING_ABOVE | row(*WITH_OWN, (0.9, 0.59, 1.0), *FROZEN), "contradicted", "inconclusive"),
    ("C4", NOTHING_ABOVE | row(*WITH_OWN, (0.2, 0.1, 0.4), *FROZEN), "contradicted", "contradicted"),
    ("C5a", NO_ORDER, "inconclusive", "inconclusive"),
    ("C5a", NO_ORDER | NO_PSI1, "inconclusive", "contradicted"),
    ("C5c", {}, "supported", "not testable"),  # answers were labelled by their opener
    ("C5c", BY_CONTENT, "inconclusive", "contradicted"),
]


@pytest.mark.parametrize(("claim", "changes", "registered", "corrected"), CASES)
def test_a_corrected_rule_beside_the_registered_one(claim: str, changes: dict, registered: str, corrected: str) -> None:
    assert (judge(claim, changes).verdict, correct(claim, changes).verdict) == (registered, corrected)


def test_behaviours_are_a_sample_in_the_interval_of_the_centroid_difference() -> None:
    """Against the formula by hand: a t-interval over six behaviours, widened by the topics of harm."""
    benign = [0.773, 0.815, 0.811, 0.736, 0.738, 0.763]
    numbers = {("C1", f"centroid B{i}", "main"): (value,) * 3 for i, value in enumerate(benign, start=1)}
    numbers |= row("C1", "centroid difference", (0.0676, 0.0635, 0.0719)) | row(
        "C1", "centroid T2-T2b", (0.84, 0.8, 0.88)
    )
    found = corrected_rules.centroid_over_behaviours(Rows("m", table(FINE | numbers)))
    half = 2.5706 * (np.var(benign, ddof=1) / 6 + (0.08 / 3.92) ** 2) ** 0.5
    assert found is not None
    assert [found.ci_low, found.ci_high] == pytest.approx([0.0676 - half, 0.0676 + half], abs=1e-5)
    alone = {("C1", f"centroid B{i}", "main"): None for i in range(2, 6)}
    made = correct("C1", computed(LATE) | alone)
    assert made.verdict == "inconclusive" and "[-inf, inf], behaviours resampled" in made.reason
    assert corrected_rules.centroid_over_behaviours(Rows("m", table({}))) is None


def test_c1_says_why_it_is_open_and_few_behaviours_are_a_cap() -> None:
    wide = correct("C1", computed(LATE) | row("C1", "centroid B1", (0.1, 0.1, 0.1)))
    assert wide.reason.endswith("behaviours resampled, which leaves 0.05 open")
    few = correct("C1", computed(LATE) | row("C1", "centroid B5", None))
    assert "supported by its numbers, capped: benign behaviours failed" in few.reason


def test_c3_names_every_family_and_shows_the_weakest() -> None:
    made = correct("C3", families(ALL, NONE, HALF))
    assert (made.estimate, made.ci_low, made.ci_high) == NONE
    said = ["a 1.00 [0.99, 1.01] early", "b 0.00 [-0.01, 0.01] not early", "c 0.40 [0.20, 0.60] undecided"]
    assert made.reason.endswith("; ".join(f"family {one}" for one in said)) and made.tags == ("families differ",)
    few = (0.06, 0.01, 0.18)  # surely not early, and not surely next to nothing: what keeps the claim from contradicted
    assert correct("C3", families(NONE, few)).ci_high == 0.18
    assert not {" early", " undecided"} & set(judge("C3", families(ALL, NONE, HALF)).reason.split("]"))


def c6(quantity: str, *numbers: float, variant: str = "main") -> dict:
    return row("C6", quantity, (numbers[0], numbers[-2], numbers[-1]) if numbers else None, variant)


# Evidence, and what the rules say of C6a, C6b and C6c: "+" supported, "-" contradicted, "?" inconclusive.
PARTS = [
    ({}, "+++"),
    (c6("harm change", -1.9, -2.5, -1.0), "?++"),
    (c6("harm change", -1.0, -1.9, -0.5), "-++"),
    (c6("harm change", -30.0, -60.0, 0.5), "?++"),
    (c6("phi", 0.8, 0.7, 0.9), "?++"),
    (c6("p isotropic", 0.06, 0.06, 0.06), "?++"),
    (c6("p covariance-matched"), "?++"),
    (c6("p covariance-matched", 0.5, 0.5, 0.5), "-++"),
    (c6("spread over refits"), "?++"),
    (c6("harm change", 1.0, -1.0, 3.0, variant="greedy"), "?++"),
    (
        c6("harm change", 0.0, -1.0, 1.0) | c6("spread over refits"),
        "-++",
    ),  # a control of support stops no contradiction
    (c6("harmless loss", 1.5, 0.5, 2.1), "+?+"),
    (c6("harmless loss", 4.0, 2.1, 6.0), "+-+"),
    *((c6(name, most, 0.0, 1.01 * most), "+?+") for name, most in MARGINS.items()),
    *((c6(name), "+?+") for name in MARGINS),
    *((c6(name, 2 * most, 1.01 * most, 3 * most), "+-+") for name, most in MARGINS.items()),
    *((c6(f"advantage over {rival}", 2.0, -1.0, 5.0), "++?") for rival in ("early", "mid")),
    *((c6(f"advantage over {rival}", -1.0, -3.0, 1.9), "++-") for rival in ("early", "mid")),
    (c6("advantage over mid", 1.0, 0.1, 1.9), "+++"),  # small, but surely more
    (c6("advantage over mid", 0.0, -2.0, 2.0), "++?"),
    (c6("advantage over mid"), "++?"),
    (c6("budget of early over late", 1.2, 1.2, 1.2), "++?"),
    (row("gate", "joint probability T2", (0.7, 0.7, 0.7)), "???"),
]


@pytest.mark.parametrize(("changes", "said"), PARTS)
def test_each_part_of_c6_is_asked_alone(changes: dict, said: str) -> None:
    signs = {"supported": "+", "contradicted": "-", "inconclusive": "?"}
    assert "".join(signs[correct(part, changes).verdict] for part in corrected_rules.C6_PARTS) == said


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
    assert registered_rules.rule_c5b(gates((0.9, 0.8, 1.0))).verdict == "inconclusive"
    assert corrected_rules.corrected_c5b(gates((0.9, 0.8, 1.0))).verdict == "supported"
    assert corrected_rules.corrected_c5b(gates((0.7, 0.5, 0.9))).verdict == "inconclusive"
    assert corrected_rules.corrected_c5b(gates((0.9, 0.8, 1.0), benign=(0.3, 0.2, 0.4))).verdict == "inconclusive"


def test_without_a_content_judge_c5c_names_the_flag() -> None:
    assert "--judge" in correct("C5c").reason
    nothing = row("C5c", KEPT_BY_FIRST_TOKEN, None) | row("C5c", "not defined", (0.0, 0.0, 0.0))
    assert correct("C5c", nothing).verdict == "inconclusive", "where clamping does nothing no label is needed"
