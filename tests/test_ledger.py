"""Gates and tags of all claims, and the ledger that gathers them into files."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ledger_rows import FINE, NIE, TWIN, Number, judge, row, table

from companion.base import files, thresholds
from companion.base.errors import InputError
from companion.base.thresholds import UNTRAINED
from companion.claims import ledger, registered_rules, verdict
from companion.claims.verdict import Rows
from companion.run import freshness, overview

# ---- gates, twins, tags ----


GATES = {"C1": "T2-T2b", "C2": "T2-T2b", "C3": "T1"}


@pytest.mark.parametrize("claim", GATES)
def test_the_gate_asks_for_topics(claim: str) -> None:
    assert judge(claim, n_topics=20).verdict == "supported"
    made = judge(claim, n_topics=19)
    assert made.verdict == "inconclusive"
    assert made.reason == f"19 topics of {GATES[claim]} in the test split, 20 needed"


@pytest.mark.parametrize("claim", GATES)
@pytest.mark.parametrize(
    ("numbers", "is_open"),
    [
        ((0.5, 0.1, 0.9), True), ((-0.5, -0.9, -0.1), True), ((0.49, 0.4, 0.6), False), ((3.0, -0.1, 6.0), False),
        ((-3.0, -6.0, 0.0), False), ((3.0, -math.inf, math.inf), False), ((3.0, math.nan, math.nan), False),
        ((math.nan, 1.0, 2.0), False),
    ],
)  # fmt: skip
def test_the_gate_asks_for_an_effect(claim: str, numbers: Number, is_open: bool) -> None:
    made = judge(claim, row("gate", f"TE {GATES[claim]}", numbers))
    assert made.verdict == ("supported" if is_open else "inconclusive")
    assert is_open or "nothing to mediate (gate: |TE| >= 0.5)" in made.reason
    assert is_open or made.quantity == f"TE {GATES[claim]}"


def test_without_the_treatment_nothing_is_testable() -> None:
    without = row("gate", "TE T2", None) | row("gate", "TE T2-T2b", None)
    for claim in ("C1", "C2"):
        made = judge(claim, without)
        assert made.verdict == "not testable"
        assert made.reason == thresholds.NO_WRAPPERS
    made = judge("C3", row("gate", "TE T1", None))
    assert made.verdict == "not testable"
    assert "no harmless/harmful pairs (T1): supply some" in made.reason


@pytest.mark.parametrize("claim", ["C1", "C2"])
def test_without_twins_t2_alone_is_judged_and_the_verdict_says_so(claim: str) -> None:
    made = judge(claim, row("gate", "TE T2-T2b", None))
    assert made.verdict == "supported"
    assert "no harmless twin" in made.tags
    weak = judge(claim, row("gate", "TE T2-T2b", None) | row("gate", "TE T2", (0.1, 0.0, 0.2)))
    assert "TE of T2 is" in weak.reason
    assert judge("C3", row("gate", "TE T2-T2b", None)).tags == ()


@pytest.mark.parametrize("claim", ["C1", "C2"])
@pytest.mark.parametrize("variant", ["full response", "sufficiency", "necessity"])
def test_robust_asks_for_y2_and_each_direction(claim: str, variant: str) -> None:
    quantity = {"C1": "late share", "C2": NIE}[claim]
    for numbers in (None, (0.45, 0.3, 0.6)):
        made = judge(claim, row(claim, quantity, numbers, variant))
        assert made.verdict == "supported"
        assert "robust" not in made.tags


def test_late_by_architecture_is_tagged() -> None:
    tagged = [judge("C1", row("gate", "earliest possible depth", (at, at, at))).tags for at in (0.33, 0.34, 0.9)]
    assert [("architecture-imposed" in tags) for tags in tagged] == [False, True, True]
    assert "architecture-imposed" not in judge("C1", row("gate", "earliest possible depth", None)).tags


# ---- the ledger ----


def test_the_ledger_covers_every_claim_once_and_no_twin() -> None:
    evidence = pd.concat([table(TWIN, "a" + UNTRAINED), table(FINE, "a"), table(FINE, "b")], ignore_index=True)
    made = ledger.ledger(evidence, runs=("b",))
    assert [one.model for one in made] == ["b"] * 9 + ["a"] * 3
    assert [one.claim for one in made[:9]] == list(registered_rules.STATEMENTS)
    for one in made[3:9]:
        assert one.verdict == "not testable"
        assert "run notebook 0" in one.reason
    assert {one.verdict for one in made} <= {"supported", "contradicted", "inconclusive", "not testable"}


def test_a_twin_belongs_to_its_own_model() -> None:
    evidence = pd.concat([table(TWIN, "a" + UNTRAINED), table(FINE, "a"), table(FINE, "b")], ignore_index=True)
    made = {one.model: one for one in ledger.ledger(evidence) if one.claim == "C1"}
    assert made["a"].verdict == "supported"
    assert made["b"].controls["untrained twin"] == "not run"


def test_evidence_survives_its_file(tmp_path: Path) -> None:
    own = table(FINE | row("gate", "TE T1", (1.0, -math.inf, math.inf)), "m")
    evidence = pd.concat([own, table(TWIN, "m" + UNTRAINED)], ignore_index=True)
    path = files.write_table(evidence, tmp_path / "02_evidence.csv")
    assert ledger.ledger(files.read_table(path, files.EVIDENCE)) == ledger.ledger(evidence)


def test_records_are_json(tmp_path: Path) -> None:
    own = table(
        FINE | row("gate", "TE T1", (1.0, -math.inf, math.inf)) | row("gate", "TE T2-T2b", (math.nan,) * 3), "m"
    )
    made = ledger.ledger(own, runs=("m",))
    saved = files.read_json(files.write_json(ledger.records(made), tmp_path / "claims.json"))
    assert [one["verdict"] for one in saved] == [one.verdict for one in made]
    by_claim = {one["claim"]: one for one in saved}
    assert by_claim["C3"]["ci_low"] is None
    assert by_claim["C3"]["estimate"] == 1.0
    assert by_claim["C1"]["estimate"] is None


def test_tables_of_the_ledger() -> None:
    made = ledger.ledger(pd.concat([table(FINE), table(TWIN, "m" + UNTRAINED)], ignore_index=True), runs=("m",))
    frame = ledger.table(made)
    assert frame.loc[frame.claim == "C1", ["verdict", "estimate", "tags"]].values.tolist() == [
        ["supported", 0.7, "robust"]
    ]
    assert frame.columns[-1] == "reason"
    lines = ledger.markdown(made).splitlines()
    assert len(lines) == 2 + 9
    assert lines[2].startswith("| m | C1 | supported | 0.70 [0.60, 0.80] |  |  |  | robust |")
    assert all(line.count("|") == 10 for line in lines)


def test_the_ledger_says_how_often_a_rule_errs_and_what_its_correction_says() -> None:
    evidence = pd.concat([table(FINE), table(TWIN, "m" + UNTRAINED)], ignore_index=True)
    made = ledger.ledger(evidence, runs=("m",))
    rates = {
        "C1": {"false_supported": {"hits": 3, "n": 60, "rate": 0.05, "upper": 0.12}},
        "C2*": {"false_supported": {"hits": 1, "n": 90, "rate": 0.0111, "upper": 0.051}},
    }
    others = ledger.corrected(evidence, runs=("m",))
    frame = ledger.table(made, rates, others).set_index("claim")
    assert frame.loc["C1", "error_rate"] == "said of 3 of 60 false claims (at most 12 %)"
    assert frame.loc["C1", "corrected_rule"] == "" and frame.loc["C2", "corrected_rule"] == "supported"
    assert frame.loc["C2", "error_rate"] == ""
    assert frame.loc["C2", "corrected_error_rate"] == "said of 1 of 90 false claims (at most 5 %)"
    by_claim = {one["claim"]: one for one in ledger.records(made, rates, others)}
    assert by_claim["C1"]["corrected"] is None
    assert by_claim["C2"]["corrected"]["verdict"] == "supported"
    assert by_claim["C2"]["corrected"]["error_rates"] == rates["C2*"]
    assert by_claim["C1"]["error_rates"] == rates["C1"] and by_claim["C2"]["error_rates"] is None


def test_a_reason_does_not_break_the_markdown_table() -> None:
    made = ledger.ledger(table(FINE | row("gate", "TE T1", (0.1, 0.0, 0.2))))
    line = ledger.markdown(made).splitlines()[4]
    assert "(gate: \\|TE\\| >= 0.5) |" in line
    assert line.replace("\\|", "").count("|") == 10


def run(results: Path, name: str, model: str, estimate: float) -> None:
    numbers = {("gate", "TE T2", "main"): (estimate, 0.0, 1.0)}
    (results / name).mkdir()
    evidence = pd.concat([table(numbers, model), table(numbers, model + UNTRAINED), table(numbers, "window-1")])
    files.write_table(evidence, results / name / "02_evidence.csv")


def test_runs_are_collected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run with evidence"):
        overview.collect(tmp_path, "embedded")
    run(tmp_path, "embedded", "embedded", 1.0)
    run(tmp_path, "other", "other", 2.0)
    run(tmp_path, "window-1", "window-1", 3.0)
    files.write_table(table(row("C2", NIE, (0.5, 0.4, 0.6)), "other"), tmp_path / "other" / "03_evidence.csv")
    (tmp_path / "empty").mkdir()
    evidence, runs, left_out = overview.collect(tmp_path, "embedded")
    assert left_out == () and runs == ("embedded", "other", "window-1")
    found = evidence.set_index(["model", "quantity"]).estimate.to_dict()
    assert found == {
        ("embedded", "TE T2"): 1.0, ("embedded" + UNTRAINED, "TE T2"): 1.0, ("other", "TE T2"): 2.0, ("other", NIE): 0.5,
        ("other" + UNTRAINED, "TE T2"): 2.0, ("window-1", "TE T2"): 3.0, ("window-1" + UNTRAINED, "TE T2"): 3.0,
    }  # fmt: skip


def test_half_a_run_spoils_no_other(tmp_path: Path) -> None:
    """Its 02 finished anew and its 03 did not, so they may be of two models; a torn file is its own run's trouble."""
    for name in ("mine", "other", "torn"):
        run(tmp_path, name, name, 1.0)
        files.write_table(table(row("C2", NIE, (0.5, 0.4, 0.6)), name), tmp_path / name / "03_evidence.csv")
    other = tmp_path / "other"
    freshness.remember(other, "01", "a", [], {})
    freshness.remember(other, "02", "b", [other / "02_evidence.csv"], {"01": "a"})
    freshness.remember(other, "03", "c", [other / "03_evidence.csv"], {"02": "b"})
    (tmp_path / "torn" / "03_evidence.csv").write_text("model,cl")

    def found(own: str = "mine") -> tuple[set[tuple[str, str]], tuple[str, ...]]:
        evidence, _, left_out = overview.collect(tmp_path, own)
        return set(zip(evidence.model, evidence.quantity, strict=True)), left_out

    rows, left_out = found()
    assert {("mine", NIE), ("other", NIE), ("torn", "TE T2")} <= rows and ("torn", NIE) not in rows
    assert len(left_out) == 1 and left_out[0].startswith("torn: ") and "03_evidence.csv" in left_out[0]
    freshness.remember(other, "02", "new", [other / "02_evidence.csv"], {"01": "a"})
    rows, left_out = found()
    assert ("other", "TE T2") in rows and ("other", NIE) not in rows
    assert "other: 03_evidence.csv is older than what it rests on" in left_out[0]
    freshness.remember(other, "01", "new", [], {})
    rows, left_out = found()
    assert not {model for model, _ in rows if model.startswith("other")} and len(left_out) == 3
    freshness.remember(other, "01", "a", [], {})
    freshness.forget(other, "02", [other / "02_evidence.csv"])  # and it is killed before they are all in place
    assert ("other", "TE T2") not in found()[0]
    with pytest.raises(InputError, match=r"03_evidence\.csv"):
        found("torn")


def test_a_missing_row_is_none() -> None:
    rows = Rows("m", table(FINE))
    assert rows.find("C1", "late share", "full response").estimate == 0.7
    assert rows.find("C1", "late share", "nothing") is None
    assert verdict.same_side(rows, "C1", "late share", "nothing", 0.5) == "not run"
    assert np.isfinite(rows.table.estimate).all()


def test_a_run_in_half_precision_gives_no_verdict() -> None:
    bits = ("gate", "significand bits", "main")
    assert judge("C2").verdict == "supported"
    capped = judge("C2", {bits: (8, 8, 8)})
    assert capped.verdict == "inconclusive" and "half precision" in capped.reason


def test_with_t1_only_every_claim_on_generation_names_the_missing_wrapper() -> None:
    """As the rows of a real run on a public set without wrappers: a gate for T1, C3, and notes of what was not defined."""
    t1 = {key: numbers for key, numbers in FINE.items() if key[0] == "C3" or key[1].endswith(" T1")}
    notes = {("C6", "not defined", "main"): (0.0, 0.0, 0.0), ("C1", "early computed share", "T1"): (0.2, 0.1, 0.3)}
    found = ledger.ledger(table(t1 | notes), runs=("m",))
    assert [one.claim for one in found] == ["C1", "C2", "C3", "C4", "C5a", "C5b", "C5c", "C6", "C7"]
    told = {one.claim: (one.verdict, one.reason) for one in found if one.claim != "C3"}
    assert set(told.values()) == {("not testable", thresholds.NO_WRAPPERS)}
    assert (
        thresholds.NO_WRAPPERS.startswith("not testable: no jailbreak wrapper; supply ")
        and "--wrappers FILE" in thresholds.NO_WRAPPERS
    )
    assert next(one for one in found if one.claim == "C3").verdict != "not testable"
    assert {one.reason for one in ledger.corrected(table(t1 | notes), runs=("m",)).values()} <= {
        thresholds.NO_WRAPPERS, *(one.reason for one in found)
    }  # fmt: skip
