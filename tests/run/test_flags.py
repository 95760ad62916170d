"""A list of models: every mistake in it is one clear sentence before anything starts."""

import argparse
import os
from pathlib import Path

import pytest

from companion.base import hub
from companion.base.errors import InputError
from companion.base.paths import ROOT
from companion.run import cli, flags, settings


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
    "models:\n- {name: ../x, pairs: 20}": "entry 1: '../x' cannot name a run",
    "models:\n- {name: embedded, pairs: 20}": "entry 1: --name embedded is the run with no flags",
    "models:\n- {model: nowhere}": "entry 1: no model 'nowhere'",
    "models:\n- {prompts: nowhere}": "entry 1: no prompt set 'nowhere'",
    "models:\n- {judge: nowhere}": "entry 1: --judge: no model 'nowhere'",
    "models:\n- {judge: ''}": "entry 1: 'judge' names nothing; leave the key out",
    "models:\n- {prompts: xstest, wrappers: nowhere.jsonl}": "nowhere.jsonl: expected a file of JSON lines",
    "models:\n- {wrappers: models.yml}": "models.yml, line 1: broken JSON",
    "models:\n- {device: gpu}": "entry 1: --device gpu",
    "models:\n- {dtype: float16}": "entry 1: argument --dtype: invalid choice",
    "models: {a: 1}": "expected one key 'models' with a list",
    "models: []": "at least one entry",
    "- a": "expected one key 'models'",
    "models:\n- a": "entry 1: expected keys and values (model, prompts",
    "models: [": "cannot be read as YAML",
    "models: &a [*a]": "entry 1: expected keys and values",
    "models:\n- {name: 2024-99-99}": "cannot be read as YAML",
    "": "expected one key 'models'",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_in_a_list_of_models_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text + "\n")
    with pytest.raises(InputError) as error:
        cli.models_command(flags.parse([f"--models={path}"]))
    assert WRONG[text] in str(error.value)


def test_auto_and_the_device_that_it_means_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "resolve_device", lambda device: "cpu" if device == "auto" else device)
    path = written(tmp_path, "models:\n- {model: full-0, pairs: 20}\n- {model: full-0, pairs: 20, device: auto}\n")
    with pytest.raises(InputError, match="entries 1 and 2 are both named 'full-0-pairs20'"):
        cli.models_command(flags.parse([f"--models={path}"]))


def test_folders_and_files_count_from_the_list(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.jsonl").write_text('{"family": "f", "neutral": "a {request}", "jailbreak": "b {request}"}')
    path = written(
        tmp_path,
        "models:\n- {model: mine, prompts: embedded}\n"
        "- {prompts: xstest, wrappers: mine.jsonl, judge: window-1}\n- {prompts: xstest, judge: org/judge@v1}\n",
    )
    first, second, third = flags.read_model_list(path)
    assert first == [f"--model={tmp_path / 'mine'}", "--prompts=embedded"]
    assert second == ["--prompts=xstest", f"--wrappers={tmp_path / 'mine.jsonl'}", "--judge=window-1"]
    assert flags.parse(third).judge == "org/judge@v1"
    assert len(flags.read_model_list(ROOT / "models.example.yml")) == 2


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
