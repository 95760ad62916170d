"""p-values that agree with intervals, and which answers are left when many are given."""

import numpy as np
import pytest

from companion.claims import ledger, multiplicity
from companion.claims.multiplicity import AT_LEAST, AT_MOST, adjusted, p_value, sentence_of_changes
from companion.claims.registered_rules import POINTS
from companion.claims.verdict import Verdict


def one(claim: str, verdict: str, quantity: str, *numbers: float, model: str = "m") -> Verdict:
    return Verdict(model, claim, verdict, "", quantity, *numbers)


@pytest.mark.parametrize(
    ("verdict", "quantity", "numbers", "passes"),
    [
        ("supported", "psi1", (0.5, 0.301, 0.6), True),
        ("supported", "psi1", (0.5, 0.299, 0.9), False),
        ("contradicted", "psi1", (0.1, 0.0, 0.149), True),
        ("contradicted", "psi1", (0.1, 0.09, 0.151), False),
        ("supported", "harm change", (-20.0, -40.0, -0.1), True),
        ("supported", "harm change", (-20.0, -21.0, 0.1), False),
        ("contradicted", "harm change", (-1.0, -POINTS + 0.1, 3.0), True),
        ("contradicted", "harmless loss", (5.0, POINTS + 0.1, 6.0), True),
        ("supported", "harmless loss", (1.0, 0.9, POINTS + 0.1), False),
        ("inconclusive", "psi1", (0.5, 0.301, 0.6), True),
        ("inconclusive", "psi1", (0.2, 0.1, 0.4), False),
    ],
)
def test_p_is_small_where_the_interval_clears_the_threshold(
    verdict: str, quantity: str, numbers: tuple, passes: bool
) -> None:
    assert (p_value(one("C5a", verdict, quantity, *numbers)) <= 0.05) == passes


def test_what_has_no_interval_has_no_p() -> None:
    for verdict in (one("C5a", "supported", "k90", 5, 4, 7), one("C1", "supported", "psi1", 0.9, -np.inf, np.inf),
                    one("C1", "supported", "psi1", 0.9, 0.9, 0.9), Verdict("m", "C1", "not testable", "")):  # fmt: skip
        assert np.isnan(p_value(verdict))
    assert not set(AT_LEAST) & set(AT_MOST)


def test_a_bare_verdict_falls_among_many_and_stands_alone() -> None:
    """Of ten tests one at p = 0.04 is what chance gives: Benjamini and Hochberg let it fall, and keep the clear one."""
    bare, clear = one("C5a", "supported", "psi1", 0.505, 0.31, 0.7), one("C2", "contradicted", "psi1", 0.0, -0.01, 0.01)
    rest = [one(f"C{i}", "inconclusive", "psi1", 0.2, 0.0, 0.4, model="other") for i in range(8)]
    verdicts = [bare, clear, *rest, Verdict("m", "C3", "not testable", "")]
    table = adjusted(verdicts, [v.verdict for v in verdicts]).set_index(["model", "claim"])
    assert table.adjusted["m", "C5a"] == "inconclusive" and table.adjusted["m", "C2"] == "contradicted"
    assert table.p["m", "C5a"] < 0.05 < table.adjusted_p["m", "C5a"] and table.adjusted["m", "C3"] == "not testable"
    said = sentence_of_changes("m", verdicts, [v.verdict for v in verdicts])
    assert (
        "10 tests" in said and said.endswith("undecided: C5a.") and not sentence_of_changes("m", [bare], ["supported"])
    )
    assert sentence_of_changes("other", verdicts, [v.verdict for v in verdicts]) == ""
    frame = ledger.to_table(verdicts, {("m", "C2"): clear}, {}).set_index(["model", "claim", "rule"])
    assert frame.adjusted["m", "C2", "corrected"] == "contradicted" and np.isnan(frame.p["m", "C2", "registered"])


def test_a_verdict_that_rests_on_another_condition_is_not_tested_and_stays() -> None:
    """Few neurons: contradicted by k90, while psi1, which is shown, lies between its thresholds."""
    made = Verdict("m", "C5a", "contradicted", "", "psi1", 0.22, 0.16, 0.28)
    table = multiplicity.adjusted([made], ["contradicted"])
    assert table.p.isna().all() and table.adjusted.tolist() == ["contradicted"]
