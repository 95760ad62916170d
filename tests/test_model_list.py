"""A list of models: every mistake in it is one clear line before anything starts; one run that fails stops no other."""

from pathlib import Path

import pytest
from toys import Toy

from helpers import model_list
from helpers.errors import InputError
from helpers.paths import ROOT


def written(folder: Path, text: str) -> Path:
    path = folder / "models.yml"
    path.write_text(text, encoding="utf-8")
    return path


WRONG = {
    "models:\n- {modle: a}": "entry 1: unknown key 'modle': did you mean 'model'?",
    "models:\n- {model: embedded, x: 1}": "unknown key 'x': known are model, prompts",
    "models:\n- {name: 2024}": "'name' must be text (quote it if it looks like a number or a date), not 2024",
    "models:\n- {name: 2024-01-01}": "'name' must be text",
    "models:\n- {pairs: yes}": "'pairs' must be a whole number, not True",
    "models:\n- {pairs: 5}": "entry 1: --pairs 5: expected at least 10",
    "models:\n- {pairs: 20, name: a}\n- {name: A, pairs: 30}": "entries 1 and 2 are both named 'A'",
    "models:\n- {pairs: 20}\n- {pairs: 20}": "entries 1 and 2 are both named",
    "models:\n- {name: ../x, pairs: 20}": "entry 1: '../x' cannot name a run",
    "models:\n- {name: embedded, pairs: 20}": "entry 1: --name embedded is the run with no flags",
    "models:\n- {model: nowhere}": "entry 1: no model 'nowhere'",
    "models:\n- {prompts: nowhere}": "entry 1: no prompt set 'nowhere'",
    "models:\n- {device: gpu}": "entry 1: --device gpu",
    "models:\n- {dtype: float16}": "entry 1: argument --dtype: invalid choice",
    "models:\n- {pairs: 20, pairs: 30}": "line 2: 'pairs' is given twice",
    "models: {a: 1}": "expected one key 'models' with a list",
    "models: []": "at least one entry",
    "- a": "expected one key 'models'",
    "models:\n- a": "entry 1: expected keys and values (model, prompts",
    "models: [": "broken YAML (",
    "models: &a [*a]": "entry 1: expected keys and values",
    "models:\n- {name: 2024-99-99}": "cannot be read as YAML",
    "": "expected one key 'models'",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_one_clear_line_and_nothing_starts(toy_done: Toy, tmp_path: Path, text: str) -> None:
    before = toy_done.contents()
    done = toy_done.run("--models", str(written(tmp_path, text + "\n")))
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, ""), done.stderr
    assert WRONG[text] in done.stderr
    assert toy_done.contents() == before


def test_a_list_that_is_not_there_and_flags_that_belong_into_it(toy_done: Toy, tmp_path: Path) -> None:
    assert "no list of models at" in toy_done.run("--models", "nowhere.yml").stderr
    path = written(tmp_path, "models:\n- {pairs: 20}\n")
    assert "--models goes without --pairs" in toy_done.run("--models", str(path), "--pairs", "30").stderr
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as YAML in UTF-8" in toy_done.run("--models", str(path)).stderr


def test_folders_count_from_the_list(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    path = written(tmp_path, "models:\n- {model: mine, prompts: embedded}\n- {model: embedded}\n")
    assert model_list.read(path) == [[f"--model={tmp_path / 'mine'}", "--prompts=embedded"], ["--model=embedded"]]


def test_the_example_is_valid() -> None:
    assert len(model_list.read(ROOT / "models.example.yml")) == 2


def test_one_that_fails_does_not_stop_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> int:
        raise InputError("no such thing:\ndo this")

    def full() -> int:
        raise OSError(28, "No space left on device")

    assert model_list.in_turn({"a": lambda: 1, "b": wrong, "c": full, "d": lambda: 0}) == 1
    shown = capsys.readouterr()
    assert "1 of 4 models finished" in shown.out and "=== model 4 of 4: d" in shown.out
    assert "b: no such thing: do this\nc: [Errno 28] No space" in shown.err
    assert "not finished: a, b, c;" in shown.err


def test_every_entry_gets_its_own_folders(toy: Toy, tmp_path: Path) -> None:
    toy.write("01", 'if PAIRS == 20: raise InputError("not today")\n_ = store.write_text(SLUG, out / "01_toy.csv")')
    path = written(tmp_path, "models:\n- {name: one, pairs: 20}\n- {name: two, pairs: 30}\n")
    done = toy.run("--models", str(path), "--only", "01")
    assert done.returncode == 1
    assert "=== model 2 of 2: two" in done.stdout and "1 of 2 models finished" in done.stdout
    assert "01_toy: code cell 3: not today" in done.stderr and "not finished: one;" in done.stderr
    assert (toy.root / "results/two/01_toy.csv").read_text() == "two"
    assert not (toy.root / "results/one/01_toy.csv").exists()
    assert "fresh, skipped" in toy.run("--models", str(path), "--only", "01").stdout
