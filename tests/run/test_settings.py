"""The name of a run: different inputs never share a folder of results, whatever they are called."""

import shutil
from pathlib import Path

import pytest
from toys import Toy, pair, prompt_set

from companion.base import paths
from companion.base.errors import InputError
from companion.base.paths import ORGANISM, ROOT
from companion.run import flags, freshness, runner, settings
from companion.run.flags import named as placed
from companion.run.flags import parameters, parse

HUB = ("--model", "mistralai/Mistral-Small-3.2-24B-Instruct-2506")
JUDGE = "meta-llama/Llama-3.3-70B-Instruct"
LINE = '{"family": "f", "neutral": "a {request}", "jailbreak": "b {request}"}'


def named(*words: str) -> str:
    return str(flags.parameters(flags.parse(words), "cpu")["SLUG"])


def made(*words: str) -> str:
    """The name of a run whose first result has taken its place."""
    flags = parse(words)
    found = parameters(flags, "cpu")
    judge = None if flags.judge is None else placed(flags.judge, ORGANISM)
    note = settings.made_from(found, judge, flags.wrappers)
    freshness.note(paths.RESULTS / found["SLUG"], runner.MADE_FROM, note)
    return str(found["SLUG"])


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders, each with a model, a prompt set and wrappers that are called the same."""
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    for name in ("one", "two"):
        shutil.copytree(ORGANISM / "window-1", tmp_path / name / "model")
        prompt_set(tmp_path / name / "set", [pair(n) for n in range(12)])
        (tmp_path / name / "own.jsonl").write_text(LINE)
    return tmp_path / "one", tmp_path / "two"


def test_a_model_of_the_hub_with_a_judge_has_a_name_by_default() -> None:
    names = [named(*HUB, "--judge", judge) for judge in (JUDGE, f"{JUDGE}@v2", JUDGE)]
    assert all(len(name) <= settings.LONGEST and name.startswith("mistralai--Mistral-Small") for name in names)
    assert names[0] == names[2] != names[1]
    assert named(*HUB) == "mistralai--Mistral-Small-3.2-24B-Instruct-2506-jailbreakbench-strongreject-xstest"


@pytest.mark.parametrize("name", ["x" * 101, "a b", ".x", ""])
def test_a_name_that_cannot_be_says_how_to_give_another(name: str) -> None:
    with pytest.raises(InputError, match=r"cannot name a run: .*; --name gives another"):
        named("--name", name)


def test_wrappers_are_in_the_name(places: tuple[Path, Path]) -> None:
    file, other = places[0] / "own.jsonl", places[0] / "wrappers.jsonl"
    shutil.copy(file, other)
    words = ("--prompts", "xstest")
    assert named(*words) == "embedded-xstest"
    assert named(*words, "--wrappers", str(file)) == "embedded-xstest-wrappers-own"
    assert named(*words, "--wrappers", str(places[0])) == "embedded-xstest-wrappers-one"


FLAGS = {
    "model": ("--model", "{}/model"),
    "prompts": ("--prompts", "{}/set"),
    "wrappers": ("--prompts", "xstest", "--wrappers", "{}/own.jsonl"),
    "judge": ("--judge", "{}/model"),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_what_lies_elsewhere_needs_another_name(places: tuple[Path, Path], kind: str) -> None:
    one, two = ([word.format(place) for word in FLAGS[kind]] for place in places)
    slug = named(*two)
    assert made(*one) == slug
    with pytest.raises(InputError, match=rf"were made with {kind} .*one/.* now it would be {kind} .*two/.*--name"):
        named(*two)
    assert named(*two, "--name", "other") == "other"
    assert named(*one) == slug
    moved = places[0].rename(places[0].with_name("moved"))
    assert named(*(word.format(moved) for word in FLAGS[kind])) == slug


def test_one_name_is_for_one_model_set_wrappers_and_judge(places: tuple[Path, Path]) -> None:
    name, own = ("--name", "x"), ("--wrappers", str(places[0] / "own.jsonl"))
    made(*name, "--model", "org/m@v1", "--prompts", "xstest+alpaca")
    for words, message in (
        (("--model", "org/n", "--prompts", "xstest+alpaca"), "with model org/m, and now it would be model org/n"),
        (
            ("--model", "org/m", "--prompts", "xstest,advbench"),
            r"with prompts xstest\+alpaca, .* be prompts xstest,advbench",
        ),
        (("--model", "org/m", "--prompts", "embedded"), "and now it would be prompts data/prompts/embedded"),
        (("--model", "org/m", "--prompts", "xstest+alpaca", *own), "with no wrappers, and now it would be wrappers /"),
        (("--model", "org/m", "--prompts", "xstest+alpaca", "--judge", "full-0"), "no judge, .* data/organism/full-0"),
    ):
        with pytest.raises(InputError, match=message):
            named(*name, *words)
    assert named(*name, "--model", "org/m@v2", "--prompts", "xstest+alpaca") == "x", (
        "a revision is a change, not another"
    )


def test_a_shipped_model_is_the_same_by_its_folder(places: tuple[Path, Path]) -> None:
    assert made("--model", "window-1") == named("--model", str(ORGANISM / "window-1")) == "window-1"
    note = freshness.recall(paths.RESULTS / "window-1", runner.MADE_FROM)
    assert note["model"] == "data/organism/window-1" and str(ROOT) not in str(note), "the repository can be moved"


def test_the_first_result_takes_the_name_and_a_failure_does_not(toy: Toy, tmp_path: Path) -> None:
    """In real processes: changed files make a run stale, a folder that lies elsewhere makes it another run."""
    lines = [pair(n, "say b") for n in range(12)]
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        prompt_set(tmp_path / place / "set", lines)
    one, two = (("--prompts", str(tmp_path / place / "set"), "--only", "01") for place in ("one", "two"))
    toy.write("01", "raise ValueError('no')")
    assert toy.run(*one).returncode == 1
    toy.write("01")
    assert toy.run(*two).returncode == 0
    before = toy.contents()
    for words in (one, ("--list", *one[:2]), ("--figures", *one[:2])):
        done = toy.run(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "the results of 'embedded-set' were made with prompts" in done.stderr and "--name" in done.stderr
    assert toy.contents() == before
    assert "fresh" in toy.run("--list", *two[:2]).stdout.splitlines()[1]
    (tmp_path / "two" / "set" / "pairs.jsonl").write_text("\n".join(lines[:11]) + "\n")
    assert "fresh" not in toy.run("--list", *two[:2]).stdout
