"""A run killed before any one of its renames and removals: the next one goes on, and ends where an undisturbed one does."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toys import Toy

from companion.base import files
from companion.run import freshness, notebooks, runner

FIRST = {"embedded/01.csv": "one", "embedded/folder/01.txt": "one"}
OLD = {"embedded/02.csv": "old", "embedded/02_more.csv": "old", "embedded/02.svg": "old", "claims.csv": "old"}
NEW = {"embedded/02.csv": "new", "embedded/02_other.csv": "new", "embedded/02.svg": "new", "claims.csv": "new"}
KILLED = 9


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two notebooks that ran; then the second was changed, and writes other files with other content. No kernel is needed."""
    root = tmp_path / "place"
    for name in ("notebooks", "results", "figures"):
        (root / name).mkdir(parents=True)
        monkeypatch.setattr(runner, name.upper(), root / name)
    monkeypatch.setattr(freshness, "FIGURES", root / "figures")
    monkeypatch.setattr(runner, "NEEDS", {"01": (), "02": ("01",)})
    monkeypatch.setattr(notebooks, "execute", execute)
    # The manifest changes with the notebook, as it does with a commit.
    monkeypatch.setattr(freshness, "git_state", lambda _: "new" in Toy(root).notebook("02").read_text())
    Toy(root).write("01", "1")
    Toy(root).write("02", "'old'")
    assert run() == 0
    Toy(root).write("02", "'new'")
    return root


def execute(notebook: notebooks.Notebook, _: object, results: Path, figures: Path, log: Path) -> tuple[str, str]:
    """In place of `notebooks.execute`: the files of this notebook, and the notebook as if it had run."""
    cells = notebooks.code_cells(notebook)
    second = NEW if "new" in notebooks.source(cells[-1]) else OLD
    for name, content in (FIRST if log.stem.startswith("01") else second).items():
        files.write_text(content, (figures if name.endswith(".svg") else results) / name)
    for count, cell in enumerate(cells, start=1):
        cell["execution_count"] = count
    return notebooks.notebook_text(notebooks.prepared(notebook)), ""


def run() -> int:
    plan = runner.make_plan(runner.DEFAULTS)
    return runner.run_notebooks(plan, list(plan.paths), {})


def contents(place: Path) -> dict[str, bytes]:
    """Everything but times."""
    return {name: data for name, data in Toy(place).contents().items() if "run_times" not in name}


def killed(end: int) -> bool:
    """Run in a process that ends before step number `end`; False if it took fewer and finished."""
    child = os.fork()
    if child == 0:
        steps = iter(range(1, end))
        for owner, name in ((os, "replace"), (Path, "unlink"), (shutil, "rmtree")):
            setattr(owner, name, counted(getattr(owner, name), steps))
        os._exit(run())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


def counted(real: Any, steps: Iterator[int]) -> Any:
    def step(*words: Any, **more: Any) -> Any:
        return os._exit(KILLED) if next(steps, None) is None else real(*words, **more)

    return step


@pytest.mark.parametrize("then", ["'new'", "'old'"])
def test_a_run_killed_at_any_step_goes_on_and_ends_the_same(place: Path, tmp_path: Path, then: str) -> None:
    """Also where the user takes the change of the notebook back before the next run."""
    before = shutil.copytree(place, tmp_path / "before")
    assert run() == 0
    new, end = contents(place), 1
    Toy(place).write("02", "'old'")
    assert run() == 0
    old = contents(place)
    assert set(new) ^ set(old) == {"results/embedded/02_more.csv", "results/embedded/02_other.csv"}
    while True:
        shutil.rmtree(place)
        shutil.copytree(before, place)
        if not killed(end):
            break
        for name, data in contents(place).items():
            known = name == "notebooks/02_toy.ipynb" or "/." in name  # as it was written, or a file half written
            assert known or data in (old.get(name), new.get(name)), (end, name)
        if then == "'old'":
            Toy(place).write("02", then)
        assert run() == 0
        assert contents(place) == (old if then == "'old'" else new), end
        assert not list(place.rglob("stage*")) and not list(place.rglob(".0*")), end
        end += 1
    assert contents(place) == new and end > 15


def test_killed_again_and_again_it_still_ends_the_same(place: Path) -> None:
    """Each attempt gets one step further than the last; what finished is kept, so it comes to an end."""
    end = 1
    while killed(end):
        end += 1
    after = contents(place)
    Toy(place).write("02", "'old'")
    assert run() == 0
    Toy(place).write("02", "'new'")
    assert run() == 0
    assert contents(place) == after
