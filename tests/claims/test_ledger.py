"""The ledger: every claim once, what its answer is worth, and which answers are left when many are given."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rows import FINE, LATER, REGISTERED, TWIN, row, table

from companion.base import files, paths, thresholds
from companion.base.paths import NOTEBOOKS
from companion.base.thresholds import UNTRAINED
from companion.claims import ledger, page
from companion.claims.corrected_rules import STATEMENTS
from companion.claims.ledger import AT_LEAST, AT_MOST, Answer, adjusted, p_value
from companion.claims.registered_rules import POINTS
from companion.claims.verdict import Verdict
from helpers import claims

# ---- ledger ----

EVIDENCE = pd.concat([table(TWIN, "a" + UNTRAINED), table(FINE, "a"), table(FINE, "b")], ignore_index=True)


def registered(evidence: pd.DataFrame, *runs: str) -> list[Verdict]:
    return [one for one in ledger.ledger(evidence, runs) if one.rule == "registered"]


def test_the_ledger_covers_every_claim_once_and_no_twin() -> None:
    made = registered(EVIDENCE, "b")
    expected = [*(("b", claim) for claim in REGISTERED), *(("a", claim) for claim in ("C1", "C2", "C3"))]
    assert [(one.model, one.claim) for one in made] == expected
    assert all(one.verdict == "not testable" and "run notebook 0" in one.reason for one in made[3:9])
    first = {one.model: one for one in made if one.claim == "C1"}  # a twin belongs to its own model
    assert first["a"].verdict == "supported" and (first["b"].controls or {})["untrained twin"] == "not run"


@pytest.mark.parametrize("run", sorted(path.parent.name for path in paths.RESULTS.glob("*/claims.csv")))
def test_committed_verdicts_are_what_the_rules_of_today_say_of_the_committed_evidence(run: str) -> None:
    judged, committed = claims.judge_run(run), pd.read_csv(paths.RESULTS / run / "claims.csv")
    today = pd.DataFrame([(one.model, one.claim, one.rule, one.verdict, one.reason) for one in judged.verdicts])
    assert today.to_numpy().tolist() == committed[["model", "claim", "rule", "verdict", "reason"]].to_numpy().tolist()


def test_evidence_and_records_survive_their_files(tmp_path: Path) -> None:
    unlimited = row("gate", "TE T1", (1.0, -math.inf, math.inf)) | row("gate", "TE T2-T2b", (math.nan,) * 3)
    evidence = pd.concat([table(FINE | unlimited), table(TWIN, "m" + UNTRAINED)], ignore_index=True)
    path, made = files.write_table(evidence, tmp_path / "02_evidence.csv"), ledger.ledger(evidence, runs=("m",))
    again = ledger.ledger(files.read_table(path, files.EVIDENCE), runs=("m",))
    assert list(map(str, again)) == list(map(str, made))  # as text, since NaN equals nothing
    saved = files.read_json(files.write_json(ledger.to_records(made, {}), tmp_path / "claims.json"))
    assert [one["verdict"] for one in saved] == [one.verdict for one in made]
    numbers = {(one["claim"], one["rule"]): (one["estimate"], one["ci_low"]) for one in saved}
    assert numbers["C3", "registered"] == (1.0, None) and numbers["C1", "registered"] == (None, None)


def of(power: tuple[int, int], wrong: tuple[int, int], false: tuple[int, int], upper: float = 0.04) -> dict:
    """Error rates of a rule, by hits and number of draws."""
    counts = {"power_to_support": power, "false_contradicted": wrong, "false_supported": false}
    return {name: {"hits": k, "n": n, "rate": k / n, "upper": upper} for name, (k, n) in counts.items()}


def test_files_have_a_row_a_rule_and_say_how_often_it_errs() -> None:
    evidence = pd.concat([table(TWIN, "a" + UNTRAINED), table(FINE | LATER, "a")])
    made = ledger.ledger(evidence, runs=("a",))
    rates = {"C1": of((30, 60), (3, 60), (3, 60), 0.12), "C2*": of((60, 60), (0, 60), (1, 90), 0.051)}
    frame = ledger.to_table(made, rates).set_index(["claim", "rule"])
    assert frame.loc[("C1", "registered"), ["verdict", "estimate", "tags"]].tolist() == ["supported", 0.7, "robust"]
    assert frame.error_rate[("C1", "registered")] == "said of 3 of 60 false claims (at most 12 %)"
    assert frame.error_rate[("C2", "corrected")] == "said of 1 of 90 false claims (at most 5 %)"
    rows = [claim for claim, rule in frame.index if claim.startswith("C6")]
    assert rows == ["C6", "C6a", "C6b", "C6c"] and frame.columns[-1] == "reason"
    assert {claim for claim, rule in frame.index if rule == "corrected"} == {*STATEMENTS} - {"C1", "C4", "C7"}
    records = {(one["claim"], one["rule"]): one for one in ledger.to_records(made, rates)}
    assert list(records) == list(frame.index) and records["C3", "registered"]["error_rates"] is None
    assert records["C2", "corrected"]["error_rates"] == rates["C2*"]
    answers = {key: one["answer"] for key, one in records.items() if one["answer"]}
    assert [claim for claim, _ in answers] == list(STATEMENTS) and answers["C6b", "corrected"] == "supported"
    assert records["C2", "registered"]["answer"] is records["C6", "registered"]["grade"] is None


TRUE, FALSE, NEVER = (60, 60), (0, 60), (0, 60)
FOOLED = of(TRUE, NEVER, FALSE) | {"held_out_supported": {"hits": 1, "n": 8}}  # by a held-out kind
GRADES = [  # verdict, rates, grade
    ("supported", of(TRUE, NEVER, FALSE), "strong"),
    ("supported", of((48, 60), NEVER, FALSE), "strong"),
    ("supported", of((47, 60), NEVER, FALSE), "weak"),  # little power
    ("supported", FOOLED, "weak"), ("contradicted", FOOLED, "strong"),
    ("supported", of(TRUE, NEVER, (3, 60), 0.051), "weak"),  # says it of false claims
    ("contradicted", of((12, 60), NEVER, FALSE), "strong"),
    ("contradicted", of(TRUE, (3, 60), FALSE, 0.051), "weak"),
    ("inconclusive", of(TRUE, NEVER, FALSE), ""),
    *((verdict, own, "cannot tell") for verdict in ("supported", "contradicted", "inconclusive")
      for own in (of((11, 60), NEVER, FALSE), of(TRUE, (13, 60), FALSE))),
    ("contradicted", of(TRUE, (12, 60), FALSE, 0.3), "weak"),
    ("contradicted", of((0, 19), (19, 19), FALSE), "not calibrated"),
    ("contradicted", of((0, 20), (20, 20), FALSE), "cannot tell"),
    ("supported", {}, "not calibrated"),
    ("supported", {"false_supported": of(TRUE, NEVER, FALSE)["false_supported"]}, "not calibrated"),
    ("not testable", of((0, 60), (60, 60), FALSE), ""),
]  # fmt: skip


@pytest.mark.parametrize(("verdict", "own", "expected"), GRADES)
def test_a_verdict_is_worth_what_its_rule_is(verdict: str, own: dict, expected: str) -> None:
    found, numbers = ledger.grade(verdict, own)
    assert found == expected and bool(numbers) == (verdict != "not testable")
    says = Answer(Verdict("m", "C2", verdict, ""), found, numbers).says
    assert says == ("cannot tell" if expected == "cannot tell" else verdict)


def test_the_corrected_rule_answers_where_there_is_one() -> None:
    made = [Verdict("m", claim, "supported", "") for claim in ("C1", "C6")]
    made += [Verdict("m", claim, "contradicted", "", rule="corrected") for claim in ("C6a", "C6b", "C6c")]
    rates = {"C1": of(TRUE, NEVER, FALSE), "C1*": {}, "C6": of(TRUE, NEVER, FALSE), "C6c*": of(NEVER, TRUE, FALSE)}
    found = [(one.verdict.claim, one.verdict.rule, one.says, one.grade) for one in ledger.answers(made, rates)]
    assert found == [
        ("C1", "registered", "supported", "strong"), ("C6a", "corrected", "contradicted", "not calibrated"),
        ("C6b", "corrected", "contradicted", "not calibrated"), ("C6c", "corrected", "cannot tell", "cannot tell"),
    ]  # fmt: skip


def test_with_t1_only_every_claim_on_generation_names_the_missing_wrapper() -> None:
    t1 = {key: numbers for key, numbers in FINE.items() if key[0] == "C3" or key[1].endswith(" T1")}
    t1 |= row("C6", "not defined", (0.0, 0.0, 0.0)) | row("C1", "early computed share", (0.2, 0.1, 0.3), "T1")
    told = {(one.claim, one.rule): (one.verdict, one.reason) for one in ledger.ledger(table(t1), runs=("m",))}
    assert [claim for claim, rule in told if rule == "registered"] == list(REGISTERED)
    assert {told.pop(("C3", rule))[0] for rule in ("registered", "corrected")} == {"supported"}
    assert set(told.values()) == {("not testable", thresholds.NO_WRAPPERS)} and ("C6b", "corrected") in told


def test_every_claim_has_an_opposite_the_notebook_that_would_show_it_and_how_often_it_was_shown() -> None:
    assert list(ledger.OPPOSITE) == list(STATEMENTS)
    for claim, (_, analysis) in ledger.OPPOSITE.items():
        number = analysis.rpartition("(")[2].rstrip(")")
        assert len(list(NOTEBOOKS.glob(f"{number}_*.ipynb"))) == 1, claim
    rates = {name: {"power_to_contradict": {"hits": n, "n": 100}} for name, n in (("C2", 100), ("C2*", 90))}
    rules = (("C2", "corrected"), ("C2", "registered"), ("C6a", "corrected"))
    given = [Answer(Verdict("m", claim, "inconclusive", "", rule=rule), "weak", "") for claim, rule in rules]
    found = ledger.opposite_table(given, rates)
    assert found[["claim", "shown"]].values.tolist() == [["C2", "90 of 100"], ["C2", "100 of 100"], ["C6a", ""]]
    assert set(found.answer) == {"inconclusive"}


# ---- multiplicity ----


def one(claim: str, verdict: str, quantity: str, *numbers: float, model: str = "m") -> Verdict:
    return Verdict(model, claim, verdict, "", quantity, *numbers)


CLEARED = [  # verdict, quantity, its numbers, and whether they clear the threshold
    ("supported", "psi1", (0.5, 0.301, 0.6), True), ("supported", "psi1", (0.5, 0.299, 0.9), False),
    ("contradicted", "psi1", (0.1, 0.0, 0.149), True), ("contradicted", "psi1", (0.1, 0.09, 0.151), False),
    ("supported", "harm change", (-20.0, -40.0, -0.1), True), ("supported", "harm change", (-20.0, -21.0, 0.1), False),
    ("contradicted", "harm change", (-1.0, -POINTS + 0.1, 3.0), True),
    ("contradicted", "harmless loss", (5.0, POINTS + 0.1, 6.0), True),
    ("supported", "harmless loss", (1.0, 0.9, POINTS + 0.1), False),
    ("inconclusive", "psi1", (0.5, 0.301, 0.6), True), ("inconclusive", "psi1", (0.2, 0.1, 0.4), False),
]  # fmt: skip


@pytest.mark.parametrize(("verdict", "quantity", "numbers", "passes"), CLEARED)
def test_p_is_small_where_the_interval_clears_the_threshold(verdict, quantity, numbers, passes):
    assert (p_value(one("C5a", verdict, quantity, *numbers)) <= 0.05) == passes


def test_what_has_no_interval_has_no_p() -> None:
    numbers = (("k90", 5, 4, 7), ("psi1", 0.9, -np.inf, np.inf), ("psi1", 0.9, 0.9, 0.9), ())
    assert all(np.isnan(p_value(Verdict("m", "C5a", "inconclusive", "", *some))) for some in numbers)
    assert not set(AT_LEAST) & set(AT_MOST)


def test_a_bare_verdict_falls_among_many_and_stands_alone() -> None:
    """Of ten tests one at p = 0.04 is what chance gives: Benjamini and Hochberg let it fall, and keep the clear one."""
    bare, clear = one("C5a", "supported", "psi1", 0.505, 0.31, 0.7), one("C2", "contradicted", "psi1", 0.0, -0.01, 0.01)
    rest = [one(claim, "inconclusive", "psi1", 0.2, 0.0, 0.4, model="other") for claim in [*STATEMENTS][:8]]
    verdicts = [bare, clear, replace(clear, rule="corrected"), *rest, Verdict("m", "C3", "not testable", "")]
    given = ledger.answers(verdicts, {})
    left = adjusted(given).set_index(["model", "claim"])
    assert left.adjusted["m", "C5a"] == "inconclusive" and left.adjusted["m", "C2"] == "contradicted"
    assert left.p["m", "C5a"] < 0.05 < left.adjusted_p["m", "C5a"] and left.adjusted["m", "C3"] == "not testable"
    evidence, asked = (
        pd.concat([table(FINE | LATER, name) for name in ("m", "other")]),
        (("m", given), ("m", given[:1])),
    )
    said, alone, other = (page.to_markdown(*one, evidence, "", invented=False) for one in (*asked, ("other", given)))
    assert "With the 10 tests" in said and "would be undecided: C5a." in said
    assert "Many questions" not in alone + other
    frame = ledger.to_table(verdicts, {}).set_index(["model", "claim", "rule"])
    assert frame.adjusted["m", "C2", "corrected"] == "contradicted" and np.isnan(frame.p["m", "C2", "registered"])


def test_a_verdict_that_rests_on_another_condition_is_not_tested_and_stays() -> None:
    """Few neurons: contradicted by k90, while the interval of psi1, which is shown, holds its threshold."""
    made = adjusted([Answer(one("C5a", "contradicted", "psi1", 0.1, 0.02, 0.18), "weak", "")])
    assert made.p.isna().all() and made.adjusted.tolist() == ["contradicted"]
