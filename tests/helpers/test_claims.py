"""Steps of notebook 08 on the committed evidence of the quick model: answers, their controls and counts, and the files."""

import json
from pathlib import Path

import pandas as pd
import pytest

from companion.base import paths
from companion.claims.corrected_rules import STATEMENTS
from helpers import claims


@pytest.fixture(scope="module")
def judged() -> claims.Judged:
    return claims.judge_run("embedded")


def test_each_claim_has_one_answer_with_its_rows_and_its_counts(judged: claims.Judged) -> None:
    assert [one.verdict.claim for one in judged.own] == list(STATEMENTS)
    rows = judged.evidence_of("C2").set_index(["quantity", "variant"])
    answer = next(one for one in judged.own if one.verdict.claim == "C2").verdict
    assert rows.loc[(answer.quantity, "main"), "estimate"] == answer.estimate
    counts = judged.error_counts("C2")
    assert set(counts) >= {"false_supported", "power_to_support"} and all(" of " in text for text in counts.values())
    assert judged.error_counts("C99") == {}


def test_a_control_is_blank_where_it_does_not_belong_to_the_claim(judged: claims.Judged) -> None:
    table = judged.controls()
    assert set(table.to_numpy().ravel()) <= {"", "passed", "failed", "not run"}
    assert table.loc["joint probability", "C2"] == "passed" and table.loc["per parameter", "C1"] == ""


def test_files_hold_every_verdict_and_the_page(
    judged: claims.Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    shown = claims.write_claims(judged)
    kept = pd.read_csv(tmp_path / "embedded" / "claims.csv")
    assert len(shown) == (kept.model == "embedded").sum() and set(kept.rule) == {"registered", "corrected"}
    assert len(json.loads((tmp_path / "embedded" / "claims.json").read_text())) == len(kept)
    text = judged.page(invented=True).data
    assert (tmp_path / "embedded" / "claims.md").read_text() == text and "Model and language are invented" in text
