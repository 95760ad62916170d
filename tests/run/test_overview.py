"""A run's evidence, and the verdicts of all runs in one file."""

import json
from pathlib import Path

import pandas as pd
import pytest

from companion.base import files
from companion.base.errors import InputError
from companion.base.paths import RESULTS
from companion.run import overview


def judged(folder: Path, **verdicts: str) -> None:
    folder.mkdir()
    rows = [{"model": name.replace("_", "-"), "claim": "C1", "verdict": found} for name, found in verdicts.items()]
    files.write_json(rows, folder / "claims.json")
    files.write_table(pd.DataFrame(rows), folder / "claims.csv")
    lines = ["| model | claim | verdict |", "| --- | --- | --- |"]
    lines += ["| " + " | ".join(one.values()) + " |" for one in rows]
    files.write_text("\n".join(lines) + "\n", folder / "claims.md")


def joined(results: Path) -> list[str]:
    """Models and verdicts, which all three files hold alike."""
    overview.join_claims(results)
    found = [f"{one['model']} {one['verdict']}" for one in json.loads((results / "claims.json").read_text())]
    for name, mark in (("claims.csv", ","), ("claims.md", " | ")):
        lines = [line.strip("| ").split(mark) for line in (results / name).read_text().splitlines()]
        assert [f"{line[0]} {line[2]}" for line in lines[1 if mark == "," else 2 :]] == found
    return found


def test_every_model_is_judged_by_its_own_run(tmp_path: Path) -> None:
    overview.join_claims(tmp_path)
    assert not list(tmp_path.iterdir())
    judged(tmp_path / "mine", mine="supported", window_1="inconclusive", plant="contradicted")
    assert joined(tmp_path) == ["mine supported", "window-1 inconclusive", "plant contradicted"]
    judged(tmp_path / "window-1", window_1="supported", mine="contradicted", full_0="inconclusive")
    four = ["mine supported", "window-1 supported", "plant contradicted", "full-0 inconclusive"]
    assert joined(tmp_path) == four
    (tmp_path / "empty").mkdir()
    judged(tmp_path / "torn", torn="supported")
    for name in ("claims.csv", "claims.json", "claims.md"):
        path = tmp_path / "torn" / name
        path.write_bytes(path.read_bytes()[:-2])
    assert joined(tmp_path) == four


def test_the_shipped_verdicts_are_those_of_the_shipped_run(tmp_path: Path) -> None:
    judged(tmp_path / "embedded")
    for name in ("claims.csv", "claims.json", "claims.md"):
        (tmp_path / "embedded" / name).write_bytes((RESULTS / "embedded" / name).read_bytes())
    overview.join_claims(tmp_path)
    for name in ("claims.csv", "claims.json", "claims.md"):
        assert (tmp_path / name).read_bytes() == (RESULTS / "embedded" / name).read_bytes(), name


def test_the_evidence_of_a_run_is_that_of_its_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    with pytest.raises(InputError, match=r"mine holds no evidence: run \./run_all\.sh first"):
        overview.run_evidence("mine")
    numbers = {"estimate": 1.0, "ci_low": 0.0, "ci_high": 1.0, "n_pairs": 3, "n_topics": 3, "note": ""}
    same = {"model": "mine", "claim": "C1", "variant": "main", **numbers}
    rows = [same | {"quantity": name} for name in ("TE T2", "late share")]
    files.write_table(pd.DataFrame(rows[:1]), tmp_path / "mine" / "02_evidence.csv")
    files.write_table(pd.DataFrame(rows[::-1]), tmp_path / "mine" / "03_evidence.csv")
    assert overview.run_evidence("mine")["quantity"].tolist() == ["TE T2", "late share"]
    (tmp_path / "mine" / "03_evidence.csv").write_text("model,cl")
    with pytest.raises(InputError, match=r"03_evidence\.csv"):
        overview.run_evidence("mine")
