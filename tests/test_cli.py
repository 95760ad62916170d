"""Every mistake on the command line: one clear line, exit status 2, nothing overwritten. Each in a real process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from toys import PARAMETERS, Toy

from companion.base.paths import ORGANISM

MODEL = ORGANISM / "window-0"


def refused(toy: Toy, *flags: str, **variables: str) -> str:
    """The one line on stderr of a command that must be refused."""
    before = toy.contents()
    done = toy.run(*flags, **variables)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert toy.contents() == before
    return done.stderr


FLAGS = {
    "--modle x": "unknown flag --modle: did you mean --model?",
    "--mod x": "unknown flag --mod",
    "--zzz=1": "unknown flag --zzz=1: ./run_all.sh --help lists the flags",
    "02": "unknown word 02",
    "--only 09": "no notebook 09; there are 00, 01, 02, 03, 08",
    "--only ,": "no notebook named",
    "--name ../x": "'../x' cannot name a run",
    "--name .x": "no leading dot",
    "--name embedded --pairs 20": "choose another name",
    "--name embedded --judge embedded": "choose another name",
    "--device gpu": "expected auto, cpu, cuda or cuda:N",
    "--device cuda:x": "expected auto, cpu, cuda or cuda:N",
    "--device cuda": "torch sees no CUDA device here",
    "--dtype float16": "'float16' (choose from",
    "--profile fast": "'fast' (choose from",
    "--pairs 5": "at least 10, or 0 for all",
    "--pairs -1": "at least 10, or 0 for all",
    "--shards -1": "--shards -1: expected 1 to 1000",
    "--shards x": "invalid int value: 'x'",
    "--pairs many": "invalid int value: 'many'",
    "--model": "expected one argument",
    "--model nowhere": "no model 'nowhere': give a folder or one of the shipped models (embedded",
    "--prompts nowhere": "no prompt set 'nowhere': give a folder or one of the shipped (embedded",
    "--list --judge nowhere": "--judge: no model 'nowhere': give a folder or one of the shipped models (embedded",
    "--figures --judge nowhere": "--judge: no model 'nowhere'",
    "--list --judge org/nowhere": "--judge: org/nowhere is not in the hub's cache yet: a run without --list downloads it",
    "--figures --name none": "no results of 'none'",
    "--figures": "no result tables in results/embedded",
    "--test --force": "--test goes alone",
    "--book --only 02": "--book goes alone",
    "--lab --force": "--lab goes alone",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_a_wrong_flag_is_one_clear_line(toy_done: Toy, flags: str) -> None:
    assert FLAGS[flags] in refused(toy_done, *flags.split())


def test_an_empty_name_is_refused(toy_done: Toy) -> None:
    assert "empty name" in refused(toy_done, "--model", "")
    assert "empty name" in refused(toy_done, "--judge", "")
    assert "--wrappers names nothing" in refused(toy_done, "--prompts", "xstest", "--wrappers", "")


def prompt_set(folder: Path, lines: list[str], outcome: str = '{"comply": ["a"], "refuse": ["b"]}') -> Path:
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "outcome.json").write_text(outcome, encoding="utf-8")
    return folder


def pair(number: int, treated: str = "say b", **fields: str) -> str:
    base = {"id": f"p{number}", "treatment": "T1", "topic": f"t{number}", "control": "say a", "treated": treated}
    return json.dumps(base | fields)


PAIRS = [pair(number) for number in range(12)]


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def own_code(folder: Path) -> None:
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "m.M"}}')


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model')


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


BREAKS: dict[Callable[[Path], None], str] = {
    no_config: "has no config.json",
    no_weights: "its weights are pickled",
    no_tokenizer: "has no tokenizer files",
    no_template: "has no chat template",
    own_code: "asks to run code of its own",
    broken_config: "config.json is not valid JSON",
    broken_tokenizer: "its tokenizer cannot be loaded",
}


@pytest.mark.parametrize("damage", BREAKS)
def test_a_folder_that_is_no_model_is_refused(toy_done: Toy, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    damage(folder)
    prompts = prompt_set(tmp_path / "set", PAIRS)
    assert BREAKS[damage] in refused(toy_done, "--model", str(folder), "--prompts", str(prompts))


SETS: dict[str, tuple[list[str], str]] = {
    "broken JSON": ([*PAIRS, "{"], "line 13: broken JSON"),
    "duplicate id": ([*PAIRS, pair(3)], "line 13: id 'p3' was used in line 4"),
    "few pairs": (PAIRS[:9], "9 pairs, at least 10 are needed"),
    "no topic": ([*PAIRS, '{"id": "x"}'], "line 13: 'treatment' must be"),
    "unequal lengths": ([pair(n, "say b b b b b") for n in range(12)], "0 usable pairs of 12 (12 with unequal"),
}


@pytest.mark.parametrize("name", SETS)
def test_a_wrong_prompt_set_is_one_clear_line(toy_done: Toy, tmp_path: Path, name: str) -> None:
    lines, message = SETS[name]
    assert message in refused(toy_done, "--prompts", str(prompt_set(tmp_path / "set", lines)))


def test_a_prompt_set_without_its_files_is_refused(toy_done: Toy, tmp_path: Path) -> None:
    assert "no pairs.jsonl" in refused(toy_done, "--prompts", str(tmp_path))
    broken = prompt_set(tmp_path / "set", PAIRS, outcome='{\n"comply": [')
    assert "outcome.json, line 2: broken JSON" in refused(toy_done, "--prompts", str(broken))


def test_outcomes_that_share_their_first_token_are_refused(toy_done: Toy, tmp_path: Path) -> None:
    same = prompt_set(tmp_path / "set", PAIRS, outcome='{"comply": ["a"], "refuse": ["a b"]}')
    assert "comply and refuse share the first token" in refused(toy_done, "--prompts", str(same))


def test_notebooks_that_the_runner_does_not_understand_are_named(toy: Toy) -> None:
    toy.write("99")
    assert "notebooks/99_toy.ipynb has no line in NEEDS" in refused(toy)
    toy.notebook("99").rename(toy.root / "notebooks" / "01_again.ipynb")
    assert "have the same number" in refused(toy)
    (toy.root / "notebooks" / "01_again.ipynb").unlink()
    toy.write("02", parameters=PARAMETERS.replace("PAIRS = 0", "N_PAIRS = 0"))
    assert "notebooks/02_toy.ipynb: its cell tagged 'parameters' must be exactly" in refused(toy)
    toy.notebook("02").write_text("{")
    assert "notebooks/02_toy.ipynb is not valid JSON" in refused(toy)


def test_help_lists_every_flag(toy_done: Toy) -> None:
    text = toy_done.run("--help").stdout
    flags = "model prompts name device dtype profile pairs only models shards figures force list test"
    assert all(f"--{flag} " in text for flag in flags.split())


def one_line(done: CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    return done.stderr


def test_the_wrong_python_is_one_clear_line(toy_done: Toy, tmp_path: Path) -> None:
    for name in ("python3.11", "python3", "python"):
        (tmp_path / name).write_text("#!/bin/sh\necho Python 3.9.2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    done = toy_done.shell(PATH=f"{tmp_path}:/usr/bin:/bin", COMPANION_VENV=str(tmp_path / "venv"))
    assert "Python 3.11 is needed and was not found (Python 3.9.2)" in one_line(done)
    assert not (tmp_path / "venv").exists()


def test_a_mistake_shows_before_anything_is_installed(toy_done: Toy, tmp_path: Path) -> None:
    done = toy_done.shell("--modle", "x", COMPANION_VENV=str(tmp_path / "venv"))
    assert "did you mean --model?" in one_line(done)
    assert not (tmp_path / "venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(toy_done: Toy, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "is no working Python 3.11 environment" in one_line(toy_done.shell(COMPANION_VENV=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_environment_is_made_once_from_the_lock(toy: Toy, tmp_path: Path) -> None:
    place, lock = tmp_path / "venv", toy.root / "requirements.lock"
    lock.write_text("no-such-package==1\n")
    failing = toy.shell("--figures", "--name", "none", COMPANION_VENV=str(place), PIP_NO_INDEX="1")
    assert failing.returncode == 2 and "the packages could not be installed" in failing.stderr
    lock.write_text("# nothing\n")
    for first in (True, False):
        done = toy.shell("--figures", "--name", "none", COMPANION_VENV=str(place))
        assert ("3 to 6 minutes, about 2 GB" in done.stdout) == first
        assert "no results of 'none'" in one_line(done)


def test_folders_count_from_where_the_user_stands(
    toy_done: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    done = toy_done.shell("--prompts", "mine", "--model", "mine", COMPANION_VENV=str(tmp_path / "venv"))
    assert "mine is no model folder" in one_line(done)
