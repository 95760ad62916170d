"""The project's own tests of results and notebooks, and what a run notes beside its results."""

import json
import re
from pathlib import Path

import pytest

from book import build
from companion.base.paths import NOTEBOOKS, ROOT
from companion.run import checks, freshness

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
    assert freshness.run_times(tmp_path) == {}
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


def test_the_book_asks_nothing_of_the_web() -> None:
    settings = (ROOT / "book" / "conf.py").read_text(encoding="utf-8")
    assert 'nb_execution_mode = "off"' in settings and "http" not in settings
    assert re.search(r'^mathjax_path = "MathJax', settings, re.M)
