"""The name of a run, which inputs of other places never share, and a judge, loaded or refused before a notebook starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from toys import EMBEDDED, PAIRS, TEMPLATE, Toy, prompt_set

from companion.base import gguf, hub, paths
from companion.base.errors import InputError
from companion.base.paths import ORGANISM
from companion.generation import labels
from companion.model import memory
from companion.run import cli, freshness, runner, settings
from companion.run.cli import parameters, parse

LINE = '{"family": "f", "neutral": "a {request}", "jailbreak": "b {request}"}'


def named(*words: str) -> str:
    return str(parameters(parse(words), "cpu")["SLUG"])


def made(*words: str) -> str:
    """The name of a run whose first result has taken its place."""
    flags = parse(words)
    found = parameters(flags, "cpu")
    note = settings.made_from(found, flags.judge, flags.wrappers)
    freshness.note(paths.RESULTS / found["SLUG"], runner.MADE_FROM, note)
    return str(found["SLUG"])


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders, each with a model, a prompt set and wrappers that are called the same."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    for name in ("one", "two"):
        shutil.copytree(ORGANISM / "window-1", tmp_path / name / "model")
        prompt_set(tmp_path / name / "set", PAIRS)
        (tmp_path / name / "own.jsonl").write_text(LINE)
    return tmp_path / "one", tmp_path / "two"


def test_wrappers_are_in_the_name(places: tuple[Path, Path]) -> None:
    file, other = places[0] / "own.jsonl", places[0] / "wrappers.jsonl"
    shutil.copy(file, other)
    words = ("--prompts", "xstest")
    with pytest.raises(InputError, match="--wrappers goes with a public prompt set"):
        named("--wrappers", str(file))
    assert named(*words) == "smollm2-refuser-xstest"
    assert named(*words, "--wrappers", str(file)) == "smollm2-refuser-xstest-wrappers-own"
    assert named(*words, "--wrappers", str(places[0])) == "smollm2-refuser-xstest-wrappers-one"


FLAGS = {
    "model": ("--model", "{}/model"), "prompts": ("--prompts", "{}/set"),
    "wrappers": ("--prompts", "xstest", "--wrappers", "{}/own.jsonl"), "judge": ("--judge", "{}/model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLAGS)
def test_what_lies_elsewhere_needs_another_name(places: tuple[Path, Path], kind: str) -> None:
    one, two = ([word.format(place) for word in FLAGS[kind]] for place in places)
    slug = named(*two)
    assert made(*one) == slug
    with pytest.raises(InputError, match=rf"were made with {kind} .*one/.* now it would be {kind} .*two/.*--name"):
        named(*two)
    assert named(*two, "--name", "other") == "other" and named(*one) == slug
    moved = places[0].rename(places[0].with_name("moved"))
    assert named(*(word.format(moved) for word in FLAGS[kind])) == slug


def test_one_name_is_for_one_model_set_wrappers_and_judge(places: tuple[Path, Path]) -> None:
    name, own = ("--name", "x"), ("--wrappers", str(places[0] / "own.jsonl"))
    made(*name, "--model", "org/m@v1", "--prompts", "xstest+alpaca")
    for words, message in (
        (("--model", "org/n", "--prompts", "xstest+alpaca"), "with model org/m, and now it would be model org/n"),
        (("--model", "org/m", "--prompts", "xstest"), r"with prompts xstest\+alpaca, .* be prompts xstest"),
        (("--model", "org/m", "--prompts", "xstest+alpaca", *own), "with no wrappers, and now it would be wrappers /"),
        (("--model", "org/m", "--prompts", "xstest+alpaca", "--judge", "full-0"), "no judge, .* data/organism/full-0"),
    ):
        with pytest.raises(InputError, match=message):
            named(*name, *words)
    assert named(*name, "--model", "org/m@v2", "--prompts", "xstest+alpaca") == "x"  # a revision is no other model


def test_the_first_result_takes_the_name_and_a_failure_does_not(toy: Toy, tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        prompt_set(tmp_path / place / "set", PAIRS)
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


def test_another_judge_and_a_changed_file_of_the_users_make_everything_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    places = [tmp_path / name for name in ("model", "adapter", "set", "tokenizer", "judge")]
    for place in places:
        place.mkdir()
        (place / "adapter_config.json").write_text("{}")
    keys = []
    for judge in ("", "window-1", "window-0", f"org/judge@{'0' * 40}", f"org/judge@{'1' * 40}", str(places[4])):
        monkeypatch.setenv(hub.JUDGE, judge)
        keys.append(runner.make_plan(EMBEDDED).keys)
    monkeypatch.setenv(gguf.TOKENIZER, str(places[3]))
    for place in places:
        (place / "adapter_config.json").write_text("{ }")
        keys.append(runner.make_plan(EMBEDDED | {"MODEL": f"{places[0]}+{places[1]}", "PROMPTS": str(places[2])}).keys)
    assert all(len({one[number] for one in keys}) == len(keys) for number in keys[0])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: int(0.9 * path.stat().st_size)])


def spoil(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 64}))


def words(folder: Path, named: dict[int, str]) -> None:
    tokenizer = tiny_tokenizer(folder, named)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def judge_folder(place: Path) -> Path:
    """A judge with random weights, which knows the words Yes and No."""
    folder = place / "judge"
    words(folder, {7: "Yes", 9: "No"})
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    return folder


SEEN = "cut off or no safetensors", "has no tokenizer files"  # by every command, from the files alone
DAMAGES: dict[str, Callable[[Path], object]] = {
    SEEN[0]: lambda folder: cut(folder / "model.safetensors"),
    SEEN[1]: lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "Yes and No do not begin with known tokens of their own": lambda folder: words(folder, {}),
    "judge reads at most 64 tokens, and the question with a request": spoil,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_judge_that_cannot_be_loaded_is_named_before_the_model_is(tmp_path, message, monkeypatch, capsys):
    folder = judge_folder(tmp_path)
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    flags = ["--model", "full-0", "--judge", str(folder)]
    capsys.readouterr()  # saving the folder draws a bar of progress
    assert cli.main(["--list", *flags]) == 0 and capsys.readouterr().err == ""
    DAMAGES[message](folder)
    monkeypatch.setattr(runner, "run_notebooks", lambda *_: pytest.fail("a notebook was started"))
    for words in [[], ["--list"], ["--figures"]] if message in SEEN else [[]]:
        assert cli.main([*words, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("run_all.sh: --judge: ") and message in error and error.count("\n") == 1


def test_a_judge_must_fit_and_nothing_is_compared_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = judge_folder(tmp_path)
    judge = memory.run_memory(memory.on_meta(folder, torch.bfloat16), copies=1)
    assert judge.copies == judge.weights
    monkeypatch.setattr(memory, "USABLE", 1)
    monkeypatch.setattr(memory, "free_memory", lambda device: judge.total)
    assert settings._ready_judge(str(folder), "cpu") == str(folder)
    assert labels.judge_model.__wrapped__(str(folder), "cpu").n_layers == 4
    monkeypatch.setattr(memory, "free_memory", lambda device: judge.total - 1)
    with pytest.raises(InputError, match="--judge: judge is too large for cpu"):
        settings._ready_judge(str(folder), "cpu")


def test_a_run_with_an_adapter_has_a_name_and_a_place_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    found = cli.parameters(cli.parse(["--adapter", str(folder), "--model", "full-0"]), "cpu")
    assert found["MODEL"] == f"full-0+{folder}" and found["SLUG"] == "full-0-adapter-mine"
    assert settings.made_from(found, None, None)["model"] == f"data/organism/full-0+{folder}"
    manifest = freshness._model(found["MODEL"], {})
    assert manifest["name"] == "full-0" and set(manifest["adapter"]["sha256"]) == {p.name for p in folder.iterdir()}
