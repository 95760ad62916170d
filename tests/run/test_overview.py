"""The overview of all runs: their verdicts joined, and the tables that notebooks show of a run."""

import json
from pathlib import Path

import pandas as pd
import pytest

from companion.base import files
from companion.base.errors import InputError
from companion.base.paths import NOTEBOOKS, RESULTS
from companion.claims.corrected_rules import STATEMENTS
from companion.run import overview
from companion.run.runner import NEEDS

PAGE = "# {run}\n\nwhat holds\n\n| table |\n\nthe files\n"


def judged(folder: Path, **verdicts: str) -> None:
    """A run's files: models with a verdict on C1 by both rules, of which the corrected one answers."""
    folder.mkdir()
    rows = [
        {"model": name.replace("_", "-"), "claim": "C1", "rule": rule, "verdict": found}
        for name, found in verdicts.items()
        for rule in ("registered", "corrected")
    ]
    files.write_json(
        [{**row, "answer": row["verdict"] if row["rule"] == "corrected" else None} for row in rows],
        folder / "claims.json",
    )
    files.write_table(pd.DataFrame(rows), folder / "claims.csv")
    files.write_text(PAGE.format(run=folder.name), folder / "claims.md")


def joined(results: Path) -> list[str]:
    """Models and verdicts, which both tables hold alike, a row a rule."""
    overview.join_claims(results)
    found = [
        f"{one['model']} {one['rule']} {one['verdict']}" for one in json.loads((results / "claims.json").read_text())
    ]
    lines = [line.split(",") for line in (results / "claims.csv").read_text().splitlines()[1:]]
    assert [f"{line[0]} {line[2]} {line[3]}" for line in lines] == found
    assert found[::2] == [one.replace("corrected ", "registered ") for one in found[1::2]]
    return [one.replace("corrected ", "") for one in found[1::2]]


def test_every_model_is_judged_by_its_own_run(tmp_path: Path) -> None:
    overview.join_claims(tmp_path)
    assert not list(tmp_path.iterdir())
    judged(tmp_path / "mine", mine="supported", window_1="inconclusive", plant="contradicted")
    assert joined(tmp_path) == ["mine supported", "window-1 inconclusive", "plant contradicted"]
    assert (tmp_path / "claims.md").read_text() == PAGE.format(run="mine")
    judged(tmp_path / "window-1", window_1="supported", mine="contradicted", full_0="inconclusive")
    four = ["mine supported", "window-1 supported", "plant contradicted", "full-0 inconclusive"]
    assert joined(tmp_path) == four
    (tmp_path / "empty").mkdir()
    judged(tmp_path / "torn", torn="supported")
    for name in ("claims.csv", "claims.json", "claims.md"):
        path = tmp_path / "torn" / name
        path.write_bytes(path.read_bytes()[:-2])
    assert joined(tmp_path) == four and "torn" not in (tmp_path / "claims.md").read_text()


def test_the_page_is_the_default_runs_with_a_line_for_every_other_model(tmp_path: Path) -> None:
    judged(tmp_path / "smollm2-refuser", smollm2_refuser="supported", other="cannot tell")
    for name, answer in (("a", "supported"), ("b", "not testable"), ("other", "cannot tell")):
        judged(tmp_path / name, **{name: answer, "relative": "supported"})
    overview.join_claims(tmp_path)
    above, lines = (tmp_path / "claims.md").read_text().split("**Other models with a run.**\n\n")
    assert above == PAGE.format(run="smollm2-refuser").removesuffix("the files\n")
    assert lines.splitlines() == [
        "- `a`: holds: C1. Same answer as `smollm2-refuser` in 1 of 1.",
        "- `b`: not measured: C1. Same answer as `smollm2-refuser` in 0 of 1.",
        "- `other`: cannot tell: C1. Same answer as `smollm2-refuser` in 0 of 1.",
        "", "the files",
    ]  # fmt: skip


def test_the_terminal_shows_the_answers_of_a_runs_own_model(tmp_path: Path) -> None:
    rows = [
        ("mine", "C1", "x", "supported", "", ""),
        ("mine", "C1", "y", "supported", "cannot tell", "-"),
        ("kin", "C1", "y", "?", "?", "?"),
    ]
    columns = ["model", "claim", "reason", "verdict", "answer", "grade"]
    files.write_table(pd.DataFrame(rows, columns=columns), tmp_path / "claims.csv")
    shown = ["claim  verdict    answer       grade", "C1     supported  cannot tell  -"]
    assert overview.claims_table(tmp_path / "claims.csv", "mine").splitlines() == shown
    assert overview.claims_table(tmp_path / "none.csv", "mine") == ""


def test_the_map_shows_the_answers_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    assert "run ./run_all.sh" in str(overview.verdict_table("mine")) and not overview.verdict_table("mine")
    rows = [
        ("mine", "C6c", "late", "cannot tell", "-13.0 points", "cannot tell"),
        ("kin", "C1", "x", "supported", "", "weak"),
    ]
    files.write_table(pd.DataFrame(rows, columns=list(overview.ANSWERS)), tmp_path / "mine" / "08_claims.csv")
    (row,) = overview.verdict_table("mine").itertuples(index=False)
    assert row == ("C6c", STATEMENTS["C6c"], "cannot tell")


def test_every_notebook_has_a_question_and_its_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    assert {path.stem.partition("_")[0] for path in NOTEBOOKS.glob("*.ipynb")} <= set(overview.QUESTIONS) == set(NEEDS)
    files.write_json({"01_data_prep": 150}, tmp_path / "mine" / "run_times.json")
    table = overview.notebook_table("mine").set_index("notebook")
    assert table.pop("minutes to run").dropna().to_dict() == {"01_data_prep": 2.5}


@pytest.mark.parametrize(("windows", "slides"), [([], False), ([3], True)])
def test_the_shape_of_a_model_is_read_from_its_facts(windows, slides, tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    assert overview.shape_of("mine") is None
    files.write_json({"layers": 6, "windows": windows}, tmp_path / "mine" / "model_facts.json")
    assert overview.shape_of("mine") == (6, slides)


def test_the_shipped_verdicts_are_those_of_the_shipped_run(tmp_path: Path) -> None:
    judged(tmp_path / overview.DEFAULT)
    for name in ("claims.csv", "claims.json", "claims.md"):
        (tmp_path / overview.DEFAULT / name).write_bytes((RESULTS / overview.DEFAULT / name).read_bytes())
    overview.join_claims(tmp_path)
    for name in ("claims.csv", "claims.json", "claims.md"):
        assert (tmp_path / name).read_bytes() == (RESULTS / overview.DEFAULT / name).read_bytes(), name


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
