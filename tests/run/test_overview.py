"""Evidence of all runs is collected, and half a run spoils no other."""

from pathlib import Path

import pandas as pd
import pytest
from ledger_rows import NIE, row, table

from companion.base import files
from companion.base.errors import InputError
from companion.base.thresholds import UNTRAINED
from companion.run import freshness, overview


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
