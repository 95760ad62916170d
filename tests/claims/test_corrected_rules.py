"""Corrected rules: each differs from the registered one where it was found to err, and nowhere else."""

import pytest
from ledger_rows import DIRECT, FINE, LATER, NIE, PSI, Number, judge, row, table

from companion.base.thresholds import COMPUTED, CONTENT_JUDGE, KEPT_BY_FIRST_TOKEN, MLP_SHARE, MLP_SHARE_WITH_OWN
from companion.claims import corrected_rules, registered_rules
from companion.claims.verdict import Rows, Verdict

FROZEN = ("main", "norm frozen", "unsaturated")


def correct(claim: str, changes: dict | None = None) -> Verdict:
    made = corrected_rules.RULES[claim](Rows("m", table({**FINE, **LATER, **(changes or {})})))
    assert made is not None and (made.model, made.claim) == ("m", claim)
    return made


def computed(share: Number | None) -> dict:
    return row("C1", COMPUTED, share, "main", "unsaturated")


def test_every_correction_says_why_and_is_asked() -> None:
    """C1 and C4 have none where their share was not measured, as in older runs."""
    own = row("C4", MLP_SHARE_WITH_OWN, (0.9, 0.8, 1.0), *FROZEN)
    for changes, missing in (({}, {"C1", "C4"}), (own, {"C1"}), (own | computed((0.9, 0.8, 1.0)), set())):
        made = corrected_rules.corrected_verdicts(Rows("m", table(FINE | LATER | changes)))
        assert [one.claim for one in made] == [claim for claim in corrected_rules.WHY if claim not in missing]


@pytest.mark.parametrize(
    ("share", "centroid", "said"),
    [
        ((0.9, 0.8, 1.0), (0.2, 0.1, 0.3), "supported"),
        ((0.9, 0.8, 1.0), (0.0, -0.1, 0.1), "inconclusive"),  # computed late, as benign decisions are
        ((0.9, 0.8, 1.0), (-0.2, -0.3, -0.1), "inconclusive"),  # what fetches the wrapper is early: no contradiction
        ((0.5, 0.3, 0.7), (0.2, 0.1, 0.3), "inconclusive"),
        ((0.2, 0.1, 0.3), (0.2, 0.1, 0.3), "contradicted"),  # copied late, computed before
    ],
)
def test_c1_asks_where_the_interaction_is_computed(share: Number, centroid: Number, said: str) -> None:
    assert correct("C1", computed(share) | row("C1", "centroid difference", centroid)).verdict == said


@pytest.mark.parametrize(
    ("share", "said"),
    [((0.9, 0.8, 1.0), "supported"), ((0.2, 0.1, 0.3), "contradicted"), ((0.6, 0.5, 0.7), "inconclusive")],
)
def test_c2_reads_direct_effects_alone(share: Number, said: str) -> None:
    half = row("C2", NIE, (0.5, 0.48, 0.52)) | row("C2", DIRECT, share)
    assert (judge("C2", half).verdict, correct("C2", half).verdict) == ("inconclusive", said)


@pytest.mark.parametrize(
    ("share", "said"),
    [((0.9, 0.6, 1.0), "supported"), ((0.9, 0.59, 1.0), "inconclusive"), ((0.2, 0.1, 0.4), "contradicted")],
)
def test_c4_counts_the_hand_over_layers_own_mlp(share: Number, said: str) -> None:
    """Nothing is left to the MLPs above."""
    numbers = row("C4", MLP_SHARE_WITH_OWN, share, *FROZEN) | row("C4", MLP_SHARE, (0.0, -0.1, 0.1), *FROZEN)
    assert (judge("C4", numbers).verdict, correct("C4", numbers).verdict) == ("contradicted", said)


# A control that failed, and numbers that contradict the claim.
FAILED = {
    "C3": (row("C3", "AUROC probe", (0.5, 0.4, 0.6)), row("C3", PSI, (0.0, -0.01, 0.01), "main", "unsaturated")),
    "C5a": (row("C5a", "k90", (5.0, 4.0, 7.0), "random order"), row("C5a", "psi1", (0.01, 0.0, 0.02), *FROZEN)),
}


@pytest.mark.parametrize("claim", FAILED)
def test_a_control_that_fails_spoils_a_support_and_no_contradiction(claim: str) -> None:
    failed, against = FAILED[claim]
    assert judge(claim, failed).verdict == correct(claim, failed).verdict == "inconclusive"
    assert judge(claim, failed | against).verdict == "inconclusive"
    assert correct(claim, failed | against).verdict == "contradicted"


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


def test_c5c_asks_for_labels_that_do_not_rest_on_the_opener() -> None:
    made = correct("C5c")
    assert made.verdict == "not testable" and "--judge" in made.reason
    content = row("C5c", KEPT_BY_FIRST_TOKEN, (0.0, 0.0, 0.1), CONTENT_JUDGE) | row(
        "C5c", KEPT_BY_FIRST_TOKEN, (0.1, 0.0, 0.2), "full response"
    )
    content |= row("C5c", "effect of all tokens", (0.8, 0.7, 0.9), CONTENT_JUDGE)
    assert correct("C5c", content).verdict == "contradicted"


def test_an_equal_rival_contradicts_c6_by_the_registered_rule_only() -> None:
    equal = row("C6", "advantage over mid", (0.0, -1.0, 1.0))
    assert (judge("C6", equal).verdict, correct("C6", equal).verdict) == ("contradicted", "inconclusive")
    assert correct("C6").verdict == "supported"
    for changes in (row("C6", "p isotropic", (0.6, 0.6, 0.6)), row("C6", "harmless loss", (5.0, 4.0, 6.0))):
        assert correct("C6", changes).verdict == "contradicted"
