"""Corrected rules: each differs from the registered one where it was found to err, and nowhere else."""

import ledger_rows as lr
import pytest
from test_claims_gates import NUMBERS
from test_claims_neurons import MINE
from test_timing import FINE_C5C

from companion.base import thresholds
from companion.base.thresholds import CONTENT_JUDGE, KEPT_BY_FIRST_TOKEN, MLP_SHARE, MLP_SHARE_WITH_OWN
from companion.claims import corrected_rules, registered_rules
from companion.claims.verdict import Rows


def carried(share: lr.Number, above: lr.Number = (0.0, -0.1, 0.1)) -> dict[tuple[str, str, str], lr.Number]:
    """C4's rows: the share of MLPs from the hand-over layer's own on, and of those above it."""
    variants = ("main", "norm frozen", "unsaturated")
    numbers = {
        ("C4", name, variant): value
        for name, value in ((MLP_SHARE_WITH_OWN, share), (MLP_SHARE, above))
        for variant in variants
    }
    return {**numbers, ("C4", "hand-over layer", "main"): (3, 3, 4)}


def computed(share: lr.Number, centroid: lr.Number = (0.2, 0.1, 0.3)) -> Rows:
    numbers = {("C1", thresholds.COMPUTED, variant): share for variant in ("main", "unsaturated")}
    numbers |= carried((0.9, 0.8, 1.0))
    return Rows("m", lr.table(lr.FINE | numbers | {("C1", "centroid difference", "main"): centroid}, "m"))


def test_every_correction_says_why_and_is_asked() -> None:
    made = [one.claim for one in corrected_rules.corrected_rules_of(computed((0.9, 0.8, 1.0)))]
    assert made == list(corrected_rules.WHY)


def test_c1_has_no_corrected_verdict_where_the_interaction_was_not_measured() -> None:
    assert "C1" not in [one.claim for one in corrected_rules.corrected_rules_of(Rows("m", lr.table(lr.FINE, "m")))]


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
def test_c1_asks_where_the_interaction_is_computed(share: lr.Number, centroid: lr.Number, said: str) -> None:
    made = corrected_rules.corrected_c1(computed(share, centroid))
    assert made is not None and made.verdict == said


@pytest.mark.parametrize(
    ("share", "said"),
    [((0.9, 0.8, 1.0), "supported"), ((0.2, 0.1, 0.3), "contradicted"), ((0.6, 0.5, 0.7), "inconclusive")],
)
def test_c2_reads_direct_effects_alone(share: tuple[float, float, float], said: str) -> None:
    half = {("C2", lr.NIE, "main"): (0.5, 0.48, 0.52), ("C2", lr.DIRECT, "main"): share}
    evidence = Rows("m", lr.table(lr.FINE | half, "m"))
    assert corrected_rules.corrected_c2(evidence).verdict == said
    assert registered_rules.rule_c2(evidence).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("share", "said"),
    [((0.9, 0.6, 1.0), "supported"), ((0.9, 0.59, 1.0), "inconclusive"), ((0.2, 0.1, 0.4), "contradicted")],
)
def test_c4_counts_the_hand_over_layers_own_mlp(share: lr.Number, said: str) -> None:
    evidence = Rows("m", lr.table(lr.FINE | carried(share)))
    assert registered_rules.rule_c4(evidence, corrected=True).verdict == said
    assert registered_rules.rule_c4(evidence).verdict == "contradicted", "nothing is left to the MLPs above"


def test_c4_has_no_corrected_verdict_where_its_share_was_not_measured() -> None:
    old = {key: value for key, value in carried((0.9, 0.8, 1.0)).items() if key[1] != MLP_SHARE_WITH_OWN}
    assert "C4" not in [one.claim for one in corrected_rules.corrected_rules_of(Rows("m", lr.table(lr.FINE | old)))]


def test_a_probe_that_fails_spoils_a_support_of_c3_and_no_contradiction() -> None:
    chance = {("C3", "AUROC probe", "main"): (0.5, 0.4, 0.6)}
    assert (
        registered_rules.rule_c3(Rows("m", lr.table(lr.FINE | chance, "m")), corrected=True).verdict == "inconclusive"
    )
    nothing = {("C3", "psi0 early, shared tokens", "main"): (0.0, -0.01, 0.01)}
    nothing |= {("C3", "psi0 early, shared tokens", "unsaturated"): (0.0, -0.01, 0.01)}
    evidence = Rows("m", lr.table(lr.FINE | chance | nothing, "m"))
    assert registered_rules.rule_c3(evidence).verdict == "inconclusive"
    assert registered_rules.rule_c3(evidence, corrected=True).verdict == "contradicted"


def test_a_random_order_that_is_no_worse_spoils_a_support_of_c5a_and_no_contradiction() -> None:
    same = lr.FINE | MINE | {("C5a", "k90", "random order"): (5.0, 4.0, 7.0)}
    assert registered_rules.rule_c5a(Rows("m", lr.table(same)), corrected=True).verdict == "inconclusive"
    low = same | {("C5a", "psi1", variant): (0.01, 0.0, 0.02) for variant in ("main", "norm frozen", "unsaturated")}
    assert registered_rules.rule_c5a(Rows("m", lr.table(low))).verdict == "inconclusive"
    assert registered_rules.rule_c5a(Rows("m", lr.table(low)), corrected=True).verdict == "contradicted"


def gates(inside: tuple[float, float, float], **changed: tuple[float, float, float]) -> Rows:
    """A last-layer set that is a readout, with an index inside its neurons; below the last layer there is no gate."""
    none, form = (0.0, 0.0, 0.05), "b: gate by wrapper x up by harm"
    numbers = dict(NUMBERS) | {("C5b", "gate index", name): none for name in ("main", "norm frozen")}
    numbers |= {("C5b", "gate index, signed", "main"): none, ("C5b", "gate index, form", "c: below"): none}
    numbers |= {("C5b", f"gate index, form{end}", form): inside for end in ("", ", signed")}
    numbers |= {("C5b", "gate index, form", f"{form}, norm frozen"): inside}
    own = {
        "readout share": (1.0, 0.99, 1.01),
        "benign share": (0.1, 0.05, 0.15),
        "perplexity ratio": (1.0, 0.99, 1.005),
    }
    numbers |= {("C5b", name, "last layer"): value for name, value in (own | changed).items()}
    made = lr.table(numbers)
    made.loc[made.variant == "last layer", "note"] = "6 benign behaviours; last"
    made.loc[made.variant.str.startswith("b:"), "note"] = f"{form}, last"
    return Rows("m", made)


def test_a_gate_inside_last_layer_neurons_is_seen_by_the_corrected_rule() -> None:
    made = gates((0.9, 0.8, 1.0))
    assert registered_rules.rule_c5b(made).verdict == "inconclusive"
    assert registered_rules.rule_c5b(made, corrected=True).verdict == "supported"
    assert registered_rules.rule_c5b(gates((0.7, 0.5, 0.9)), corrected=True).verdict == "inconclusive"
    assert (
        registered_rules.rule_c5b(gates((0.9, 0.8, 1.0), **{"benign share": (0.3, 0.2, 0.4)}), corrected=True).verdict
        != "supported"
    )


def test_c5c_asks_for_labels_that_do_not_rest_on_the_opener() -> None:
    by_opener = Rows("m", lr.table(lr.FINE | FINE_C5C))
    assert registered_rules.rule_c5c(by_opener).verdict == "supported"
    made = registered_rules.rule_c5c(by_opener, corrected=True)
    assert made.verdict == "not testable" and "--judge" in made.reason
    content = {
        ("C5c", KEPT_BY_FIRST_TOKEN, CONTENT_JUDGE): (0.0, 0.0, 0.1),
        ("C5c", "effect of all tokens", CONTENT_JUDGE): (0.8, 0.7, 0.9),
    }
    content |= {("C5c", KEPT_BY_FIRST_TOKEN, "full response"): (0.1, 0.0, 0.2)}
    assert (
        registered_rules.rule_c5c(Rows("m", lr.table(lr.FINE | FINE_C5C | content)), corrected=True).verdict
        == "contradicted"
    )
