"""What a run notes beside its results: damaged times are only forgotten, and files that are no longer written are known."""

import json
import shutil
from pathlib import Path

from companion.base.paths import ORGANISM
from companion.run import freshness


def test_times_are_read_as_far_as_they_can_be(tmp_path: Path) -> None:
    path = tmp_path / "run_times.json"
    torn = ("", '{"01_toy": 3', "[1]", "7", "null", '"x"', '{"01_toy": ' + "9" * 5000 + "}")
    for text in (*torn, '{"01_toy": "3", "02_toy": null, "03_toy": true, "08_toy": 1e999, "00_toy": -1}'):
        path.write_text(text)
        assert freshness.run_times(tmp_path) == {}
        freshness.note_time(tmp_path, "02_toy", 0.2)
        assert json.loads(path.read_text()) == {"02_toy": 1}
    path.write_text('{"01_toy": 3, "02_toy": "x"}')
    assert freshness.run_times(tmp_path) == {"01_toy": 3}


def test_what_another_notebook_writes_by_now_is_not_outdated(tmp_path: Path) -> None:
    old, new, both = (tmp_path / f"{name}.csv" for name in ("old", "new", "both"))
    for path in (old, new, both):
        path.write_text("a")
    freshness.remember(tmp_path, "02", "key", [old, both])
    assert freshness.outdated(tmp_path, "02", [new, both]) == [old]
    freshness.remember(tmp_path, "03", "key", [old])
    assert freshness.outdated(tmp_path, "02", [new, both]) == []


def test_a_run_killed_between_two_of_its_files_is_stale(tmp_path: Path) -> None:
    """Its new table is there and its note is not, so that the old note does not hold for it."""
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


def test_a_repository_for_which_git_does_not_answer_is_not_taken_for_one_without(tmp_path, monkeypatch):
    monkeypatch.setattr(freshness, "_git", lambda *_: "")
    assert freshness.git_state(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert freshness.git_state(tmp_path) == {"commit": "unknown: git does not answer, or another user owns the folder"}


def test_prompts_count_as_the_model_reads_them(tmp_path: Path) -> None:
    """A template may depend on more than its file; where it changes a prompt, the results are stale."""
    model = shutil.copytree(ORGANISM / "window-0", tmp_path / "model")
    parameters = {"MODEL": str(model), "PROMPTS": "embedded"}
    before, template = freshness.rendered(parameters), model / "chat_template.jinja"
    assert before == freshness.rendered(parameters) != ""
    text = template.read_text()
    template.write_text("{# another comment #}" + text)
    assert freshness.rendered(parameters) == before
    template.write_text("x" + text)
    assert freshness.rendered(parameters) not in (before, "")
    template.unlink()
    assert freshness.rendered(parameters) == ""
