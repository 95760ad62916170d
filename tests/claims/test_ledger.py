"""The ledger: every claim once, its files and tables, and what would show the opposite."""

import json
import math
from pathlib import Path

import pandas as pd
from ledger_rows import FINE, TWIN, row, table

from companion.base import files, thresholds
from companion.base.paths import NOTEBOOKS
from companion.base.thresholds import UNTRAINED
from companion.claims import ledger
from companion.claims.registered_rules import STATEMENTS
from companion.claims.verdict import Verdict

EVIDENCE = pd.concat([table(TWIN, "a" + UNTRAINED), table(FINE, "a"), table(FINE, "b")], ignore_index=True)


def test_the_ledger_covers_every_claim_once_and_no_twin() -> None:
    made = ledger.ledger(EVIDENCE, runs=("b",))
    expected = [*(("b", claim) for claim in STATEMENTS), *(("a", claim) for claim in ("C1", "C2", "C3"))]
    assert [(one.model, one.claim) for one in made] == expected
    assert all(one.verdict == "not testable" and "run notebook 0" in one.reason for one in made[3:9])
    first = {one.model: one for one in made if one.claim == "C1"}  # a twin belongs to its own model
    assert first["a"].verdict == "supported" and (first["b"].controls or {})["untrained twin"] == "not run"


def test_evidence_and_records_survive_their_files(tmp_path: Path) -> None:
    unlimited = row("gate", "TE T1", (1.0, -math.inf, math.inf)) | row("gate", "TE T2-T2b", (math.nan,) * 3)
    evidence = pd.concat([table(FINE | unlimited), table(TWIN, "m" + UNTRAINED)], ignore_index=True)
    path, made = files.write_table(evidence, tmp_path / "02_evidence.csv"), ledger.ledger(evidence, runs=("m",))
    again = ledger.ledger(files.read_table(path, files.EVIDENCE), runs=("m",))
    assert list(map(str, again)) == list(map(str, made))  # as text, since NaN equals nothing
    saved = files.read_json(files.write_json(ledger.to_records(made, {}, {}), tmp_path / "claims.json"))
    assert [one["verdict"] for one in saved] == [one.verdict for one in made]
    by_claim = {one["claim"]: one for one in saved}
    assert by_claim["C3"]["ci_low"] is None and by_claim["C3"]["estimate"] == 1.0
    assert by_claim["C1"]["estimate"] is None


def test_tables_say_how_often_a_rule_errs_and_what_its_correction_says() -> None:
    evidence = EVIDENCE[EVIDENCE.model != "b"]
    made, others = ledger.ledger(evidence, runs=("a",)), ledger.corrected_ledger(evidence, runs=("a",))
    rates = {
        "C1": {"false_supported": {"hits": 3, "n": 60, "rate": 0.05, "upper": 0.12}},
        "C2*": {"false_supported": {"hits": 1, "n": 90, "rate": 0.0111, "upper": 0.051}},
    }
    frame = ledger.to_table(made, rates, others).set_index("claim")
    columns = ["verdict", "estimate", "tags", "error_rate", "corrected_rule", "corrected_error_rate"]
    said = ["said of 3 of 60 false claims (at most 12 %)", "said of 1 of 90 false claims (at most 5 %)"]
    assert frame.loc["C1", columns].tolist() == ["supported", 0.7, "robust", said[0], "", ""]
    assert frame.loc["C2", columns[3:]].tolist() == ["", "supported", said[1]] and frame.columns[-1] == "reason"
    by_claim = {one["claim"]: one for one in ledger.to_records(made, rates, others)}
    assert by_claim["C1"]["corrected"] is None and by_claim["C2"]["corrected"]["verdict"] == "supported"
    assert by_claim["C2"]["corrected"]["error_rates"] == rates["C2*"]
    assert by_claim["C1"]["error_rates"] == rates["C1"] and by_claim["C2"]["error_rates"] is None


def test_markdown_has_a_line_a_verdict_and_a_reason_does_not_break_it() -> None:
    evidence = table(FINE | row("gate", "TE T1", (0.1, 0.0, 0.2)), "a")
    made = ledger.ledger(pd.concat([evidence, table(TWIN, "a" + UNTRAINED)]), runs=("a",))
    lines = ledger.to_markdown(made, {}, {}).splitlines()
    assert len(lines) == 2 + 9 and all(line.replace("\\|", "").count("|") == 10 for line in lines)
    assert lines[2].startswith("| a | C1 | supported | 0.70 [0.60, 0.80] |  |  |  | robust |")
    assert "(gate: \\|TE\\| >= 0.5) |" in lines[4]


def test_with_t1_only_every_claim_on_generation_names_the_missing_wrapper() -> None:
    """As the rows of a real run on a public set without wrappers: a gate for T1, C3, and notes of what was not defined."""
    t1 = {key: numbers for key, numbers in FINE.items() if key[0] == "C3" or key[1].endswith(" T1")}
    t1 |= row("C6", "not defined", (0.0, 0.0, 0.0)) | row("C1", "early computed share", (0.2, 0.1, 0.3), "T1")
    found = ledger.ledger(table(t1), runs=("m",))
    told = {one.claim: (one.verdict, one.reason) for one in found}
    assert list(told) == list(STATEMENTS) and told.pop("C3")[0] == "supported"
    assert set(told.values()) == {("not testable", thresholds.NO_WRAPPERS)}
    corrected = ledger.corrected_ledger(table(t1), runs=("m",)).values()
    assert {one.reason for one in corrected} <= {one.reason for one in found}


def headings(number: str) -> str:
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "markdown" for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if line.startswith("## "))


def test_every_claim_has_an_opposite_and_its_analysis_is_a_section() -> None:
    assert list(ledger.OPPOSITE) == list(STATEMENTS)
    for claim, (_, analysis) in ledger.OPPOSITE.items():
        number, _, rest = analysis.partition(", ")
        first = rest.split(" and ")[0].split(":")[0].split(",")[0]
        assert f"## {first}" in headings(number), (claim, first)


def test_it_counts_how_often_the_opposite_was_shown() -> None:
    rates = {name: {"power_to_contradict": {"hits": n, "n": 100}} for name, n in (("C2", 100), ("C2*", 90))}
    found = ledger.opposite_table([Verdict("m", claim, "inconclusive", "") for claim in ("C2", "C3")], rates)
    expected = [["C2", "100 of 100", "90 of 100", "inconclusive"], ["C3", "", "", "inconclusive"]]
    assert found[["claim", "shown", "shown_corrected", "verdict"]].values.tolist() == expected
