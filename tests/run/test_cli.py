"""Every mistake on the command line: one clear line, exit status 2, nothing overwritten. Each in a real process."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import Mock

import pytest
from toys import PAIRS, PARAMETERS, Toy, chat_folder, pair, prompt_set, put

from companion.base import hub
from companion.base.errors import InputError
from companion.base.files import write_json
from companion.base.paths import ORGANISM, ROOT
from companion.run import checks, cli

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def one_line(done: CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    return done.stderr


def refused(toy: Toy, *flags: str, **variables: str) -> str:
    before = toy.contents()
    said = one_line(toy.run(*flags, **variables))
    assert toy.contents() == before
    return said


FLAGS = {
    "--modle x": "unrecognized arguments: --modle x (./run_all.sh --help lists the flags)",
    "--only 09": "no notebook 09; there are 00, 01, 02, 03, 08", "--only ,": "no notebook named",
    "--name ../x": "'../x' cannot name a run",
    "--device gpu": "expected auto, cpu, cuda or cuda:N", "--device cuda": "torch sees no CUDA device here",
    "--dtype float16": "'float16' (choose from", "--pairs 5": "--pairs 5: expected 10 to 1000000, or 0",
    "--pairs many": "invalid int value: 'many'", "--shards -1": "--shards -1: expected 1 to 1000",
    "--set a=b": "--executor and --set go with --shards", "--executor local": "--executor and --set go with --shards",
    "--shards 2 --set partition": "expected KEY=VALUE", "--model=": "an empty name", "--model": "expected one argument",
    "--model=--": "-- is no value of a flag",
    "--model nowhere": "no model 'nowhere': give a folder or one of the shipped models (embedded",
    "--prompts xstest --wrappers=": "expected a file of JSON lines",
    "--adapter nowhere": "nowhere holds no adapter: expected adapter_config.json and adapter_model.safetensors",
    "--prompts nowhere": "no prompt set 'nowhere': give a folder or one of the shipped (embedded",
    "--prompts xstest,nosuch": "public sets, each once, joined by commas; known are jailbreakbench",
    "--wrappers nowhere": "expected a file of JSON lines",
    "--model org/tiny": "HF_HUB_OFFLINE forbids downloads, and it is not in the cache",
    "--model org/tiny@../x": "names no revision behind its @",
    "--list --model org/tiny": "is not in the hub's cache yet",
    "--list --judge nowhere": "--judge: no model 'nowhere': give a folder or one of the shipped models (embedded",
    "--list --judge org/no": "org/no is not in the hub's cache yet",
    "--figures --name none": "no results of 'none'", "--figures": "no result tables in results/embedded",
    "--models nowhere.yml": "no list of models at",
    "--all --models models.yml": "argument --models: not allowed with argument --all",
    "--all --pairs 30": "--all goes without --pairs: write it into a list", "--test --force": "--test goes alone",
}  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS)
def test_a_wrong_command_line_is_one_clear_line(toy_done: Toy, tmp_path: Path, flags: str) -> None:
    assert FLAGS[flags] in refused(toy_done, *flags.split(), **OFFLINE, HF_HUB_CACHE=str(tmp_path))


def test_a_proxy_that_does_not_answer_is_one_clear_line_and_so_is_a_public_set_offline(toy_done, tmp_path) -> None:
    dead = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9") | {"HF_HUB_OFFLINE": "0"}
    assert "cannot be reached" in refused(toy_done, "--model", "org/tiny", **dead, HF_HUB_CACHE=str(tmp_path))
    said = one_line(toy_done.run("--prompts", "maliciousinstruct", **OFFLINE, HF_HOME=str(tmp_path)))
    assert "none of these sets could be loaded" in said
    assert "left out: maliciousinstruct" in said and "the hub cannot be reached" in said


# What `load` and `check_pairs` say of files is tested with them (test_load.py); here, that it is said before a run, and how.
# File of a model or prompt set, its content (None: it goes), what is said.
DAMAGES: dict[str, tuple[str, str | None, str]] = {
    "no tokenizer": ("tokenizer*.json", None, "has no tokenizer files"),
    "no template": ("chat_template.jinja", None, "has no chat template"),
    "broken pair": ("pairs.jsonl", "\n".join([*PAIRS, "{"]), "line 13: broken JSON"),
    "equal openers": ("outcome.json", '{"comply": ["a"], "refuse": ["a b"]}', "comply and refuse share the first token"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_or_prompt_set_is_one_clear_line(toy_done: Toy, tmp_path: Path, damage: str) -> None:
    model, prompts = shutil.copytree(ORGANISM / "window-0", tmp_path / "model"), prompt_set(tmp_path / "set", PAIRS)
    pattern, content, said = DAMAGES[damage]
    for path in [*model.glob(pattern), *prompts.glob(pattern)]:
        path.unlink() if content is None else path.write_text(content)
    assert said in refused(toy_done, "--model", str(model), "--prompts", str(prompts))


def test_notebooks_that_the_runner_does_not_understand_are_named(toy: Toy) -> None:
    toy.write("99")
    assert "notebooks/99_toy.ipynb has no line of its own in NEEDS" in refused(toy)
    toy.notebook("99").rename(toy.root / "notebooks" / "01_again.ipynb")
    assert "notebooks/01_again.ipynb has no line of its own in NEEDS" in refused(toy)
    (toy.root / "notebooks" / "01_again.ipynb").unlink()
    toy.write("02", parameters=PARAMETERS.replace("PAIRS = 0", "N_PAIRS = 0"))
    assert "notebooks/02_toy.ipynb: its cell tagged 'parameters' must be exactly" in refused(toy)
    toy.notebook("02").write_text("{")
    assert "notebooks/02_toy.ipynb is not valid JSON" in refused(toy)


FAKE = """#!/bin/sh
case " {versions} " in *" ${{0##*python}} "*) ;; *) echo Python 3.9.2; exit 1 ;; esac
if [ "$1" = -V ]; then echo Python ${{0##*python}}; exit; fi
if [ "$3" != -c ]; then echo "found ${{0##*/}}"; exec {real} "$@"; fi
code="$4"; shift 4
exec {real} -I -S -c "import sys; sys.version_info = (3, ${{0##*python3.}})
$code" "$@"
"""


def fake_pythons(folder: Path, versions: str) -> dict[str, str]:
    """Variables with which only these Pythons are found: each says its version, and runs as this one does."""
    for name in ("python3", "python", *(f"python{version}" for version in checks.PYTHONS)):
        (folder / name).write_text(FAKE.format(versions=versions, real=sys.executable))
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_the_wrong_python_is_one_clear_line(toy_done: Toy, tmp_path: Path) -> None:
    done = toy_done.shell(**fake_pythons(tmp_path, ""), COMPANION_VENV=str(tmp_path / "venv"))
    assert "Python 3.11 or 3.12 or 3.13 or 3.14 is needed and was not found (Python 3.9.2)" in one_line(done)
    assert not (tmp_path / "venv").exists()


def test_the_python_that_made_the_results_is_preferred(toy: Toy, tmp_path: Path) -> None:
    for there, made, taken in [("3.12", "3.11", "3.12"), ("3.11 3.13", "3.13", "3.13"), ("3.13 3.14", "", "3.13")]:
        write_json({"python": made} if made else {}, toy.root / "results" / "smollm2-refuser" / "manifest.json")
        done = toy.shell("--list", **fake_pythons(tmp_path, there), COMPANION_VENV=str(tmp_path / "venv"))
        assert (done.returncode, done.stdout.split("\n")[0]) == (0, f"found python{taken}")


def test_an_environment_of_another_python_is_used_and_one_line_says_so(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    fake_pythons(tmp_path / "bin", "3.12")
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\nexec "${0}3.12" "$@"\n')
    stamp = hashlib.sha256((toy.root / "requirements.lock").read_bytes()).hexdigest()
    (tmp_path / "companion-lock.sha256").write_text(stamp)
    said = "results/smollm2-refuser was made with Python 3.11; this is Python 3.12\n"
    for made, name in product(("3.11", "3.12"), ("VIRTUAL_ENV", "COMPANION_VENV")):
        write_json({"python": made}, toy.root / "results" / "smollm2-refuser" / "manifest.json")
        done = toy.shell("--list", **{name: str(tmp_path)})
        assert (done.stdout.split("\n")[0], done.stderr) == ("found python3.12", said if made == "3.11" else "")


def test_a_mistake_shows_before_anything_is_installed_and_folders_count_from_the_user(toy_done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for flags, said in (
        ("--modle x", "unrecognized arguments: --modle x"),
        ("--model mine", "mine is no model folder"),
    ):
        assert said in one_line(toy_done.shell(*flags.split(), COMPANION_VENV=str(tmp_path / "venv")))
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    done = toy_done.shell(COMPANION_VENV=str(tmp_path / "mine"))
    assert "is no working environment of Python 3.11 or" in one_line(done)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


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


def test_a_cached_model_runs_offline_and_its_commit_is_kept(toy: Toy, tmp_path: Path) -> None:
    source, cache = chat_folder(tmp_path / "source"), tmp_path / "cache"
    put(cache, source, [path.name for path in source.iterdir()], COMMIT)
    lines = [pair(n, f"w5 w{20 + n}", control=f"w4 w{20 + n}") for n in range(12)]
    prompts = prompt_set(tmp_path / "set", lines, outcome='{"comply": [" w11"], "refuse": [" w12"]}')
    flags = ("--model", "org/tiny", "--prompts", str(prompts), "--only", "01")
    offline = {**OFFLINE, "HF_HUB_CACHE": str(cache)}
    first = toy.run(*flags, **offline)
    assert first.returncode == 0, first.stderr
    assert "org/tiny (89abcdef0123): 0.00 billion" in first.stdout and "12 of 12 pairs usable" in first.stdout
    manifest = json.loads((toy.root / "results" / "org--tiny-set" / "manifest.json").read_text())
    assert (manifest["model"]["name"], manifest["model"]["revision"]) == ("org/tiny", COMMIT)
    book = (toy.root / "results" / "org--tiny-set" / "notebooks" / "01_toy.ipynb").read_text()
    assert f"org/tiny@{COMMIT}" in book and str(cache) not in book
    assert toy.run("--list", *flags, **offline).stdout.count("fresh") == 1


def test_a_model_that_fails_does_not_stop_the_rest_of_its_list(capsys: pytest.CaptureFixture[str]) -> None:
    errors = [InputError("no such thing:\ndo this"), OSError(28, "full"), RuntimeError("no room.\n2 GiB")]
    runs = dict(zip("abc", (Mock(side_effect=error) for error in errors), strict=True))
    assert cli.run_list({**runs, "e": lambda: 1, "f": lambda: 0}) == 1
    shown = capsys.readouterr()
    assert "1 of 5 models finished" in shown.out and "=== model 5 of 5: f" in shown.out
    said = "a: no such thing: do this\nb: [Errno 28] full\nc: RuntimeError: no room. 2 GiB\n"
    assert said in shown.err and "not finished: a, b, c, e;" in shown.err
    with pytest.raises(KeyboardInterrupt):
        cli.run_list({"a": Mock(side_effect=KeyboardInterrupt), "b": lambda: pytest.fail("it goes on")})


def test_every_entry_of_a_list_gets_its_own_folders(toy: Toy, tmp_path: Path) -> None:
    toy.write("01", 'if PAIRS == 20: raise InputError("not today")\n_ = files.write_text(SLUG, out / "01_toy.csv")')
    path = tmp_path / "models.yml"
    path.write_text("models:\n- {name: one, pairs: 20}\n- {name: two, pairs: 30}\n")
    done = toy.run("--models", str(path), "--only", "01")
    assert done.returncode == 1 and "01_toy: code cell 3: not today" in done.stderr
    assert [path.read_text() for path in toy.root.glob("results/*/01_toy.csv") if path.parent.name != "embedded"] == [
        "two"
    ]
    assert "fresh, skipped" in toy.run("--models", str(path), "--only", "01").stdout
    assert "--models goes without --pairs" in refused(toy, "--models", str(path), "--pairs", "30")


@pytest.mark.parametrize(
    ("flags", "asked"),
    [((), True), (("--only", "02"), True), (("--name", "x"), False), (("--model", "smollm2"), False)],
)
def test_without_its_model_the_default_command_runs_the_embedded_one_and_says_so_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], asked: bool
) -> None:
    run = Mock(return_value=0)
    monkeypatch.setattr(cli.smollm2, "fetch_smollm2", Mock(side_effect=InputError("no network")))
    monkeypatch.setattr(cli, "run_command", run)
    assert cli.one_command(cli.parse(flags)) == 0
    (ran,), given = run.call_args.args, cli.parse(flags)
    model, prompts = ("embedded", "embedded") if asked else (given.model, "english")
    assert (ran.model, ran.prompts, ran.only) == (model, prompts, given.only)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "no network" in line] == said[:1] + said[-1:] if asked else not said


WRONG = {
    "models:\n- {modle: a}": "entry 1: expected keys of model, adapter, prompts",
    "models:\n- {name: 2024-01-01}": "'name' must be a text or a whole number (quote a date), not datetime.date(2024, 1, 1)",
    "models:\n- {pairs: yes}": "'pairs' must be a text or a whole number", "models:\n- {judge: ''}": "'judge' must be a text",
    "models:\n- {pairs: 5}": "entry 1: --pairs 5: expected 10",
    "models:\n- {pairs: 20, name: a}\n- {name: A, pairs: 30}": "entry 2: another is named 'A' as well",
    "models:\n- {name: ../x, pairs: 20}": "entry 1: '../x' cannot name a run",
    "models:\n- {name: embedded, pairs: 20}": "entry 1: --name embedded is the run of that model",
    "models:\n- {model: nowhere}": "entry 1: no model 'nowhere'",
    "models:\n- {prompts: xstest, wrappers: nowhere.jsonl}": "nowhere.jsonl: expected a file of JSON lines",
    "models:\n- {wrappers: models.yml}": "models.yml, line 1: broken JSON",
    "models: {a: 1}": "expected one key 'models' with a list", "models: []": "at least one entry",
    "models:\n- a": "entry 1: expected keys of model, adapter, prompts", "models: [": "cannot be read as YAML",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_in_a_list_of_models_is_one_sentence(tmp_path, monkeypatch, text):
    monkeypatch.setenv("COMPANION_CALLER", str(tmp_path))
    (tmp_path / "models.yml").write_text(text + "\n")
    with pytest.raises(InputError) as error:
        cli.models_command(cli.parse([f"--models={tmp_path / 'models.yml'}"]))
    assert WRONG[text] in str(error.value)


def test_every_entry_has_its_own_judge_and_wrappers_and_counts_from_the_list(tmp_path, monkeypatch):
    """The judge of one entry, once resolved, does not label the answers of the next."""
    seen: list[tuple[str, str | None, str | None]] = []

    def run(flags: argparse.Namespace) -> int:
        seen.append((flags.model, os.environ.get(hub.JUDGE), flags.wrappers))
        os.environ[hub.JUDGE] = "resolved"
        return 0

    monkeypatch.setenv("COMPANION_CALLER", str(tmp_path))
    monkeypatch.setattr(cli, "run_command", run)
    shutil.copytree(ORGANISM / "window-0", tmp_path / "mine")
    (tmp_path / "w.jsonl").write_text('{"family": "f", "neutral": "a {request}", "jailbreak": "b {request}"}')
    path, second = tmp_path / "models.yml", "{model: full-0, prompts: xstest, wrappers: w.jsonl}"
    path.write_text(f"models:\n- {{model: mine, judge: window-1}}\n- {second}\n")
    assert cli.main(["--models", str(path)]) == 0
    assert seen == [(str(tmp_path / "mine"), "window-1", None), ("full-0", None, "w.jsonl")]
    assert len(cli.read_model_list(ROOT / "models.example.yml")) == 2


def test_all_runs_whatever_has_results_in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setenv("COMPANION_CALLER", str(ROOT))
    monkeypatch.setattr(cli, "run_list", lambda runs: seen.extend(runs) or 0)
    assert cli.main(["--all", "--only", "01"]) == 0
    if (ROOT / ".git").exists():
        listed = subprocess.check_output(["git", "ls-files", "results/*/manifest.json"], cwd=ROOT, text=True)
        assert set(seen) == {Path(line).parent.name for line in listed.split()}
