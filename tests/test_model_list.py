"""A list of models: every mistake in it is one clear line before anything starts; one run that fails stops no other."""

import argparse
import os
from pathlib import Path

import pytest
from toys import Toy

from companion.base import hub
from companion.base.errors import InputError
from companion.base.paths import ROOT
from companion.run import cli, flags, model_list, settings


def written(folder: Path, text: str) -> Path:
    path = folder / "models.yml"
    path.write_text(text, encoding="utf-8")
    return path


WRONG = {
    "models:\n- {modle: a}": "entry 1: unknown key 'modle': did you mean 'model'?",
    "models:\n- {model: embedded, x: 1}": "unknown key 'x': known are model, prompts, wrappers, judge",
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
    "models:\n- {judge: nowhere}": "entry 1, 'judge': no model 'nowhere'",
    "models:\n- {judge: ''}": "entry 1: 'judge' names nothing; leave the key out",
    "models:\n- {wrappers: 3}": "'wrappers' must be text",
    "models:\n- {prompts: xstest, wrappers: nowhere.jsonl}": "nowhere.jsonl: expected a file of JSON lines",
    "models:\n- {wrappers: models.yml}": "models.yml, line 1: broken JSON",
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


def test_auto_and_the_device_that_it_means_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "resolve_device", lambda device: "cpu" if device == "auto" else device)
    path = written(tmp_path, "models:\n- {model: full-0, pairs: 20}\n- {model: full-0, pairs: 20, device: auto}\n")
    with pytest.raises(InputError, match="entries 1 and 2 are both named 'full-0-pairs20'"):
        cli.models_command(flags.parse([f"--models={path}"]))


def test_a_list_that_is_not_there_and_flags_that_belong_into_it(toy_done: Toy, tmp_path: Path) -> None:
    assert "no list of models at" in toy_done.run("--models", "nowhere.yml").stderr
    path = written(tmp_path, "models:\n- {pairs: 20}\n")
    assert "--models goes without --pairs" in toy_done.run("--models", str(path), "--pairs", "30").stderr
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as YAML in UTF-8" in toy_done.run("--models", str(path)).stderr


def test_folders_count_from_the_list(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    path = written(tmp_path, "models:\n- {model: mine, prompts: embedded}\n- {model: embedded}\n")
    assert model_list.read_model_list(path) == [
        [f"--model={tmp_path / 'mine'}", "--prompts=embedded"],
        ["--model=embedded"],
    ]


def test_wrappers_and_judge_count_from_the_list_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jsonl").write_text('{"family": "f", "neutral": "a {request}", "jailbreak": "b {request}"}')
    monkeypatch.chdir(ROOT)
    path = written(
        tmp_path,
        "models:\n- {prompts: xstest, wrappers: mine.jsonl, judge: window-1}\n- {prompts: xstest, judge: org/judge@v1}\n",
    )
    first, second = model_list.read_model_list(path)
    assert first == ["--prompts=xstest", f"--wrappers={tmp_path / 'mine.jsonl'}", "--judge=window-1"]
    assert (flags.parse(first).wrappers, flags.parse(second).judge) == (str(tmp_path / "mine.jsonl"), "org/judge@v1")


def test_every_entry_has_its_own_judge_and_wrappers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge of one entry, once resolved, does not label the answers of the next."""
    seen: list[tuple[str, str | None, str | None]] = []

    def run(flags: argparse.Namespace) -> int:
        seen.append((flags.model, os.environ.get(hub.JUDGE), flags.wrappers))
        os.environ[hub.JUDGE] = "resolved"
        return 0

    monkeypatch.setenv(hub.JUDGE, "")
    monkeypatch.setattr(cli, "run_command", run)
    (tmp_path / "w.jsonl").write_text('{"family": "f", "neutral": "a {request}", "jailbreak": "b {request}"}')
    entries = "- {model: full-0, judge: window-1}\n- {model: full-0, prompts: xstest, wrappers: w.jsonl}\n"
    assert cli.main(["--models", str(written(tmp_path, f"models:\n{entries}"))]) == 0
    assert seen == [("full-0", "window-1", None), ("full-0", None, str(tmp_path / "w.jsonl"))]


def test_the_example_is_valid() -> None:
    assert len(model_list.read_model_list(ROOT / "models.example.yml")) == 2


def test_one_that_fails_does_not_stop_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> int:
        raise InputError("no such thing:\ndo this")

    def full() -> int:
        raise OSError(28, "No space left on device")

    def unforeseen() -> int:
        raise KeyError("logits")

    def memory() -> int:
        raise RuntimeError("out of memory.\nTried to allocate 2 GiB")

    def silent() -> int:
        raise AssertionError

    runs = {"a": lambda: 1, "b": wrong, "c": full, "d": unforeseen, "e": memory, "f": silent, "g": lambda: 0}
    assert model_list.run_model_list(runs) == 1
    shown = capsys.readouterr()
    assert "1 of 7 models finished" in shown.out and "=== model 7 of 7: g" in shown.out
    assert "b: no such thing: do this\nc: [Errno 28] No space" in shown.err
    assert "d: KeyError: 'logits'\ne: RuntimeError: out of memory. Tried to allocate 2 GiB\n" in shown.err
    assert "f: AssertionError\n" in shown.err and "not finished: a, b, c, d, e, f;" in shown.err


def test_ctrl_c_stops_the_list() -> None:
    def stopped() -> int:
        raise KeyboardInterrupt

    started: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        model_list.run_model_list({"a": stopped, "b": lambda: started.append("b") or 0})
    assert not started


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
