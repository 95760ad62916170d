"""The rules of C5a and C7: both sides of every threshold, every control, and what is missing."""

import pandas as pd
import pytest
from ledger_rows import FINE, Number, row, table

from companion.claims.registered_rules import rule_c5a, rule_c7
from companion.claims.verdict import Rows, Verdict

LAYER = (1000.0, 1000.0, 1000.0)
MINE: dict[tuple[str, str, str], Number] = {
    ("C5a", "psi1", "main"): (0.5, 0.4, 0.6),
    ("C5a", "psi1", "norm frozen"): (0.5, 0.4, 0.6),
    ("C5a", "psi1", "unsaturated"): (0.4, 0.2, 0.6),
    ("C5a", "k90", "main"): (5.0, 4.0, 7.0),
    ("C5a", "k90", "random order"): (900.0, 880.0, 920.0),
    ("C5a", "neurons in the layer", "main"): LAYER,
    **{("C5a", f"k90 B{i}", "main"): (10.0 * i, 9.0, 70.0) for i in range(1, 6)},
    ("C7", "Moran's I", "main"): (0.2, 0.15, 0.25),
    ("C7", "best window - best random group", "main"): (0.2, 0.1, 0.3),
    ("C7", "best window, permutation p", "main"): (0.05, 0.05, 0.05),
}
PSI, K90 = ("C5a", "psi1"), ("C5a", "k90")


def judge(claim: str, changes: dict | None = None, n_topics: int = 36) -> Verdict:
    rows = table({**FINE, **MINE, **(changes or {})}, n_topics=n_topics)
    return {"C5a": rule_c5a, "C7": rule_c7}[claim](Rows("m", rows))


def test_c5a_supported() -> None:
    made = judge("C5a")
    assert (made.verdict, made.quantity, made.estimate) == ("supported", "k90", 5.0)
    assert set(made.controls.values()) == {"passed"}
    assert (
        "k90 5 [4, 7] of 1000 neurons (sparse: at most 10, distributed: at least 100), benign median 30" in made.reason
    )


C5A_RULE = {
    "psi at the threshold": ((0.5, 0.30, 0.6), (5.0, 4.0, 7.0), "supported"),
    "psi too wide": ((0.5, 0.29, 0.6), (5.0, 4.0, 7.0), "inconclusive"),
    "k90 at 1 %": ((0.5, 0.4, 0.6), (10.0, 9.0, 12.0), "supported"),
    "k90 above": ((0.5, 0.4, 0.6), (11.0, 9.0, 12.0), "inconclusive"),
    "k90 below 10 %": ((0.5, 0.4, 0.6), (99.0, 90.0, 110.0), "inconclusive"),
    "k90 at 10 %": ((0.5, 0.4, 0.6), (100.0, 90.0, 110.0), "contradicted"),
    "layer not needed": ((0.1, 0.05, 0.15), (5.0, 4.0, 7.0), "contradicted"),
    "layer not needed, too wide": ((0.1, 0.05, 0.16), (5.0, 4.0, 7.0), "inconclusive"),
}


@pytest.mark.parametrize("case", C5A_RULE)
def test_c5a_rule(case: str) -> None:
    psi, k90, verdict = C5A_RULE[case]
    changes = row(*PSI, psi) | row(*PSI, psi, "norm frozen") | row(*K90, k90)
    assert judge("C5a", changes).verdict == verdict


def test_in_a_small_layer_8_neurons_count_as_few() -> None:
    small = row("C5a", "neurons in the layer", (384.0, 384.0, 384.0))
    assert judge("C5a", small | row(*K90, (8.0, 8.0, 8.0))).verdict == "supported"
    made = judge("C5a", small | row(*K90, (9.0, 8.0, 9.0)))
    assert made.verdict == "inconclusive"
    assert "at most 8, distributed: at least 38.4" in made.reason
    assert judge("C5a", small | row(*K90, (39.0, 38.0, 40.0))).verdict == "contradicted"


def test_c5a_must_be_sparser_than_benign_behaviours() -> None:
    dense = {("C5a", f"k90 B{i}", "main"): (5.0, 5.0, 5.0) for i in range(1, 6)}
    assert judge("C5a", dense).verdict == "inconclusive"  # equal to the median is not below it
    assert (
        judge("C5a", {**dense, ("C5a", "k90 B5", "main"): (4.0, 4.0, 4.0)} | row(*K90, (4.0, 4.0, 5.0))).verdict
        == "supported"
    )


C5A_CONTROLS = {
    "benign behaviours, failed": row("C5a", "k90 B5", None),
    "benign behaviours, not run": {("C5a", f"k90 B{i}", "main"): None for i in range(1, 6)},
    "random order, failed": row(*K90, (8.0, 6.0, 9.0), "random order"),
    "random order, not run": row(*K90, None, "random order"),
    "final norm frozen, failed": row(*PSI, (0.2, 0.1, 0.3), "norm frozen"),
    "final norm frozen, not run": row(*PSI, None, "norm frozen"),
    "sign in unsaturated pairs, failed": row(*PSI, (-0.1, -0.2, 0.1), "unsaturated"),
    "sign in unsaturated pairs, not run": row(*PSI, None, "unsaturated"),
    "joint probability, failed": row("gate", "joint probability T2", (0.5, 0.4, 0.6)),
    "joint probability, not run": row("gate", "joint probability T2", None),
}


@pytest.mark.parametrize("case", C5A_CONTROLS)
def test_c5a_controls_cap(case: str) -> None:
    made = judge("C5a", C5A_CONTROLS[case])
    name, state = case.split(", ")
    assert made.verdict == "inconclusive"
    assert made.controls[name] == state
    assert f"capped: {name} {state}" in made.reason


def test_k90_none_supports_nothing_and_needs_no_random_order() -> None:
    none = row(*K90, None) | row(*K90, None, "random order")
    made = judge("C5a", none)
    assert (made.verdict, made.quantity) == ("inconclusive", "psi1")
    assert "k90 none" in made.reason
    low = (
        none
        | row(*PSI, (0.0, -0.1, 0.1))
        | row(*PSI, (0.0, -0.1, 0.1), "norm frozen")
        | row(*PSI, (-0.1, -0.2, 0.1), "unsaturated")
    )
    assert judge("C5a", low).verdict == "contradicted"


def test_c7_supported() -> None:
    made = judge("C7")
    assert (made.verdict, made.quantity, made.ci_low) == ("supported", "Moran's I", 0.15)
    assert "0.200 [0.150, 0.250]" in made.reason and "permutation p 0.05" in made.reason


C7_RULE = {
    "at the threshold": ((0.1, 0.05, 0.2), 0.05, "supported"),
    "too wide": ((0.1, 0.049, 0.2), 0.05, "inconclusive"),
    "no neighbours": ((0.0, -0.05, 0.05), 0.5, "contradicted"),
    "no neighbours, too wide": ((0.0, -0.05, 0.051), 0.5, "inconclusive"),
    "windows win all the same": ((0.0, -0.05, 0.04), 0.05, "inconclusive"),
    "windows do not win": ((0.1, 0.06, 0.2), 0.1, "inconclusive"),
}


@pytest.mark.parametrize("case", C7_RULE)
def test_c7_rule(case: str) -> None:
    moran, p, verdict = C7_RULE[case]
    changes = row("C7", "Moran's I", moran) | row("C7", "best window, permutation p", (p, p, p))
    assert judge("C7", changes).verdict == verdict


def test_c7_controls_cap() -> None:
    for changes, name, state in (
        (row("C7", "best window, permutation p", None), "best window against random groups", "not run"),
        (row("gate", "joint probability T2", (0.5, 0.4, 0.6)), "joint probability", "failed"),
    ):
        made = judge("C7", changes)
        assert made.verdict == "inconclusive"
        assert made.controls[name] == state


@pytest.mark.parametrize("claim", ["C5a", "C7"])
def test_what_stops_a_rule(claim: str) -> None:
    missing = dict.fromkeys(MINE)
    assert judge(claim, missing).verdict == "not testable"
    assert "run notebook 04" in judge(claim, missing).reason
    assert judge(claim, row("gate", "TE T2-T2b", (0.2, 0.1, 0.3))).verdict == "inconclusive"
    assert "nothing to mediate" in judge(claim, row("gate", "TE T2-T2b", (0.2, 0.1, 0.3))).reason
    assert judge(claim, n_topics=19).verdict == "inconclusive"
    assert "no harmless twin" in judge(claim, row("gate", "TE T2-T2b", None)).tags
    bare = Rows("m", pd.DataFrame(columns=table({}).columns))
    assert {"C5a": rule_c5a, "C7": rule_c7}[claim](bare).verdict == "not testable"
