"""Steps of notebook 07: rates of the rules that answer, what was measured of a built model, and grades."""

import numpy as np
import pandas as pd
import pytest

from companion.calibration import rates
from companion.claims.corrected_rules import STATEMENTS
from helpers import calibration


def test_each_claim_is_judged_by_one_rule_and_counts_are_those_of_the_page() -> None:
    table = calibration.draws()
    assert set(table.claim) == set(STATEMENTS) and (table.groupby("claim").rule.nunique() == 1).all()
    page = rates.claim_rates(rates.main_draws())
    for row in calibration.error_rates(table).itertuples():
        claim = row.claim.split()[0]
        own = page.get(f"{claim}*", page.get(claim, {}))[row.error.replace(" ", "_")]
        assert (own["hits"], own["n"]) == (row.hits, row.n) and row.low < row.estimate + 1e-9 < row.high + 2e-9
    assert set(calibration.draws("registered").rule) == {"registered"}


def test_grades_are_those_of_hand_made_rates() -> None:
    rows = [("true", "supported", 57), ("true", "inconclusive", 3), ("false", "contradicted", 60)]
    table = pd.DataFrame([(t, v) for t, v, n in rows for _ in range(n)], columns=["truth", "verdict"])
    table = table.assign(claim="C2", gate="passed")
    assert calibration.grades(table).loc["C2"].tolist() == ["strong", "strong"]
    silent = table.assign(verdict=table.verdict.where(table.truth == "false", "inconclusive"))
    assert calibration.grades(silent).loc["C2"].tolist() == ["cannot tell", "cannot tell"]


def test_the_drawing_has_a_role_and_a_share_for_each_component() -> None:
    one = calibration.built_model("late", 11)
    table = one.measured("A", pd.Series(np.arange(len(one.parts)) / 100))
    assert table.share.tolist() == pytest.approx([k / 100 for k in range(12)]) and "decides" in table.role.tolist()


def test_along_a_row_of_power_the_number_of_models_stays() -> None:
    for by in ("topics", "effect"):
        table = calibration.power(by)
        counts = table.map(lambda text: int(text.split(" of ")[1]))
        assert len(table.columns) > 2 and (counts.nunique(axis=1) == 1).all()
        assert not {"C2", "C5c"} & set(table.index.get_level_values("claim")), "the corrected rule answers"


def test_held_out_kinds_fool_the_rules_that_the_lesson_names_and_no_other() -> None:
    table = calibration.held_out().reset_index()
    wrong = table[(table.truth == "false") & (table.supported > 0) | (table.truth == "true") & (table.contradicted > 0)]
    assert wrong[["kind", "claim", "supported"]].to_numpy().tolist() == [
        ["recovers", "C5c", 4],
        ["understudy", "C4", 8],
    ]
    draws = rates.held_out_draws()
    own = rates.with_held_out({name: {} for name in ("C1*", "C4*", "C5c*")}, draws)
    assert own["C1*"] == {} and own["C4*"]["held_out_supported"] == {"hits": 8, "n": 24}
    assert calibration.grades(calibration.draws()).loc[["C2", "C4", "C5c"], "supported"].tolist() == [
        "strong",
        "weak",
        "weak",
    ]
