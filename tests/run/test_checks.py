"""The project's own tests of results and notebooks, what a run notes beside its results, and the overview of all runs."""

import json
import shutil
from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from book import build
from companion.base import files
from companion.base.errors import InputError
from companion.base.paths import NOTEBOOKS, RESULTS, ROOT
from companion.claims.corrected_rules import STATEMENTS
from companion.run import checks, freshness, overview
from companion.run.runner import NEEDS

# ---- checks ----


def write(folder: Path, number: float, verdict: str, processor: str = "") -> None:
    (folder / "embedded").mkdir(parents=True, exist_ok=True)
    (folder / "embedded" / "claims.csv").write_text(f"model,claim,rule,answer\nembedded,C1,corrected,{verdict}\n")
    (folder / "embedded" / "manifest.json").write_text(json.dumps({"processor": processor or freshness.processor()}))
    (folder / "embedded" / "02_layers.csv").write_text(f"site,te\nhead,{number}\n")


@pytest.mark.parametrize(
    ("number", "verdict", "processor", "passes"),
    [
        (1.0, "supported", "", True), (1.0005, "supported", "", True), (1.01, "supported", "", False),
        (1.01, "supported", "another", True), (1.01, "contradicted", "another", False),
    ],
)  # fmt: skip
def test_another_processor_may_differ_in_numbers_only(tmp_path, monkeypatch, number, verdict, processor, passes):
    monkeypatch.setattr(checks, "RESULTS", tmp_path / "old")
    write(tmp_path / "old", number, verdict, processor)
    write(tmp_path / "new", 1.0, "supported")
    assert checks.compare(tmp_path / "new", "embedded")[1] is passes
    (tmp_path / "new" / "embedded" / "02_layers.csv").unlink()
    assert checks.compare(tmp_path / "new", "embedded")[1] is (passes and bool(processor))


def test_a_lock_without_wheels_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, uv = tmp_path / "requirements.lock", tmp_path / "uv"
    lock.write_text("numpy==2 ; python_version > '3'\n")
    uv.write_text('#!/bin/sh\ncase "$*" in *3.13*) exit 1 ;; esac\n')
    uv.chmod(0o755)
    monkeypatch.setattr(checks, "LOCK", lock)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"wheel for Python 3\.13 on linux"):
        checks.make_lock([])
    assert lock.read_text() == "numpy==2 ; python_version > '3'\n"
    uv.write_text("#!/bin/sh\n")
    assert checks.make_lock([]) == 0 and lock.read_text() == "numpy==2\n"


# ---- freshness ----


@pytest.mark.parametrize("text", ["", '{"01_toy": 3', "[1]", '{"01_toy": "3"}'])
def test_times_are_read_as_far_as_they_can_be(tmp_path: Path, text: str) -> None:
    (tmp_path / "run_times.json").write_text(text)
    freshness.note_time(tmp_path, "02_toy", 0.2)
    assert freshness.run_times(tmp_path) == {"02_toy": 1}


def test_what_another_notebook_writes_by_now_is_not_outdated(tmp_path: Path) -> None:
    old, new, both = (tmp_path / f"{name}.csv" for name in ("old", "new", "both"))
    for path in (old, new, both):
        path.write_text("a")
    freshness.remember(tmp_path, "02", "key", [old, both])
    assert freshness.outdated(tmp_path, "02", [new, both]) == [old]
    freshness.remember(tmp_path, "04b", "key", [old])
    assert freshness.outdated(tmp_path, "02", [new, both]) == []


def test_a_run_killed_between_two_of_its_files_is_stale(tmp_path: Path) -> None:
    table, figure = tmp_path / "02.csv", tmp_path / "02.svg"
    for path in (table, figure):
        path.write_text("old")
    freshness.remember(tmp_path, "02", "key", [table, figure])
    assert freshness.is_fresh(tmp_path, "02", "key", {}) and not freshness.is_fresh(tmp_path, "02", "new", {})
    table.write_text("new")
    assert not freshness.is_fresh(tmp_path, "02", "key", {}) and not freshness.is_fresh(tmp_path, "02", "new", {})


def test_the_processor_is_named_by_what_rounds(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: X\nmodel\t: 7\nflags\t: sse avx2 avx512f\n\nprocessor\t: 1\n")
    assert freshness.processor(path) == "X, 7, avx2, avx512f" and freshness.processor()


# ---- book ----


def site(folder: Path, body: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "other.html").write_text("<p id='here'>x</p>")
    (folder / "index.html").write_text(body)
    return list(build.broken_links(folder))


def test_links_that_lead_nowhere_are_named_and_no_others(tmp_path: Path) -> None:
    for target in ("other.html", "other.html#here", "#top", "https://example.org/x", "mailto:a@b"):
        assert site(tmp_path, f"<a id='top' href='{target}'>x</a>") == []
    for target in ("none.html", "other.html#there", "#bottom", "../outside/none.png"):
        for link in (f"<a href='{target}'>x</a>", f"<img src='{target}'>"):
            assert site(tmp_path, link) == [f"index.html: {target} leads nowhere"]


def test_every_document_has_its_page(tmp_path: Path) -> None:
    build.stage(tmp_path / "source")
    assert all((tmp_path / "source" / "notebooks" / path.name).is_file() for path in NOTEBOOKS.glob("*.ipynb"))
    listed = (tmp_path / "source" / "index.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert f"docs/{path.stem}" in listed, f"put docs/{path.stem} into book/index.md"
    assert (tmp_path / "source" / "results" / "claims.md").read_text(encoding="utf-8").startswith("# ")


# ---- overview ----

COLUMNS = ["model", "claim", "rule", "verdict"]
PAGE = "# {run}\n\nwhat holds\n\n| table |\n\nthe files\n"


def judged(folder: Path, **verdicts: str) -> None:
    """A run's files: models with a verdict on C1 by both rules, of which the corrected one answers."""
    pairs = product(verdicts.items(), ("registered", "corrected"))
    table = pd.DataFrame(
        [(name.replace("_", "-"), "C1", rule, found) for (name, found), rule in pairs], columns=COLUMNS
    )
    files.write_table(table, folder / "claims.csv")
    rows = [
        row | {"answer": row["verdict"] if row["rule"] == "corrected" else None} for row in table.to_dict("records")
    ]
    files.write_json(rows, folder / "claims.json")
    files.write_text(PAGE.format(run=folder.name), folder / "claims.md")


def joined(results: Path) -> list[str]:
    """Models and verdicts, which both tables hold alike, a row a rule."""
    overview.join_claims(results)
    found = pd.DataFrame(json.loads((results / "claims.json").read_text()))[COLUMNS]
    assert found.equals(pd.read_csv(results / "claims.csv")) and found.rule.tolist()[::2] == ["registered"] * (
        len(found) // 2
    )
    return [f"{one.model} {one.verdict}" for one in found[found.rule == "corrected"].itertuples()]


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
    lines = ["model,claim,reason,verdict,answer,grade", "mine,C1,x,supported,,", "mine,C1,y,supported,cannot tell,-"]
    (tmp_path / "claims.csv").write_text("\n".join([*lines, "kin,C1,y,?,?,?"]) + "\n")
    shown = ["claim  verdict    answer       grade", "C1     supported  cannot tell  -"]
    assert overview.claims_table(tmp_path / "claims.csv", "mine").splitlines() == shown
    assert overview.claims_table(tmp_path / "none.csv", "mine") == ""


def test_the_map_shows_the_answers_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    assert "run ./run_all.sh" in str(overview.verdict_table("mine")) and not overview.verdict_table("mine")
    rows = ["mine,C6c,late,cannot tell,-13.0 points,cannot tell", "kin,C1,x,supported,,weak"]
    files.write_text("\n".join([",".join(overview.ANSWERS), *rows]) + "\n", tmp_path / "mine" / "08_claims.csv")
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
    own = sorted((RESULTS / overview.DEFAULT).glob("claims.*"))
    (tmp_path / overview.DEFAULT).mkdir()
    for path in own:
        shutil.copy(path, tmp_path / overview.DEFAULT)
    overview.join_claims(tmp_path)
    for path in own:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


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
