"""A judge in a run: loaded or refused before a notebook starts, and its accuracy part of what notebooks rest on."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from families import tiny_model
from hub_cache import TEMPLATE, tiny_tokenizer

from companion.base import folders, hub
from companion.base.errors import InputError
from companion.base.files import hash_file
from companion.generation import accuracy, labels
from companion.generation.accuracy import FILE, Accuracy, Measured, Source
from companion.model import memory
from companion.prompts import public
from companion.run import cli, freshness, judge_check, runner, settings
from companion.run.flags import parse, resolved

GOOD = Accuracy(40, 32, 50, 45)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of results, for every module that writes there, and no judge model."""
    folder = tmp_path / "results"
    for module in (runner, accuracy, judge_check.paths):
        monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.delenv(hub.JUDGE, raising=False)
    monkeypatch.setenv(public.CACHE, str(tmp_path / "cache"))
    return folder


def test_only_the_notebooks_that_label_answers_become_stale(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = runner.make_plan(runner.DEFAULTS).keys
    here = accuracy.accuracy_source(runner.DEFAULTS, {})
    path = accuracy.write_accuracy(Measured(GOOD, here, "0" * 64), results / "embedded")
    after = runner.make_plan(runner.DEFAULTS).keys
    assert {number for number in before if before[number] != after[number]} == {"05", "06", "08", "00"}
    accuracy.write_accuracy(Measured(Accuracy(40, 33, 50, 45), here, "0" * 64), results / "embedded")
    assert runner.make_plan(runner.DEFAULTS).keys["05"] not in (before["05"], after["05"])
    freshness.write_manifest(results / "embedded", runner.DEFAULTS, {})
    noted = json.loads((results / "embedded" / "manifest.json").read_text())
    assert noted["judge_accuracy"] == hash_file(path, {}) and "judge" not in noted
    for other, message in (
        (Source(here.judge, "mine", here.prompts, here.inputs), "measured for model mine"),
        (Source(here.judge, here.model, here.prompts, "x"), "an earlier state of the model, prompts or judge"),
    ):
        accuracy.write_accuracy(Measured(GOOD, other, "0" * 64), results / "embedded")
        with pytest.raises(InputError, match=f"{message}, which is not this run's: label a sample"):
            runner.make_plan(runner.DEFAULTS)


def test_names_hold_no_place_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    monkeypatch.setenv(hub.JUDGE, str(tmp_path / "judge"))
    found = accuracy.accuracy_source({"MODEL": "window-0", "PROMPTS": "embedded"}, {})
    assert (found.judge, found.model, found.prompts) == ("judge", "window-0", "embedded")
    freshness.write_manifest(tmp_path, runner.DEFAULTS, {})
    assert json.loads((tmp_path / "manifest.json").read_text())["judge"] == "judge"


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A small model of random weights and a prompt set of placeholder words, each in a folder of its own."""
    model, prompts = tmp_path / "model", tmp_path / "prompts"
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    tiny_model("llama").save_pretrained(model)
    rows = [
        (f"{kind}-{i}", kind, f"t{i}", f"w5 w{20 + i}", f"w6 w{20 + i}") for kind in ("T1", "T2") for i in range(20)
    ]
    keys = ("id", "treatment", "topic", "control", "treated")
    prompts.mkdir()
    (prompts / "pairs.jsonl").write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    (prompts / "outcome.json").write_text('{"comply": [" w11"], "refuse": [" w12"]}')
    return ["--", "--model", str(model), "--prompts", str(prompts), "--name", "mine"]


def test_labels_made_by_hand_reach_the_run(
    results: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge_check, "STEPS", 4)
    monkeypatch.setattr(labels, "is_refusal", lambda text: sum(map(ord, text)) % 2 == 1)
    assert judge_check.main(["--sample", "40", *flags]) == 0
    given = labels.read_labels(tmp_path / "cache" / "labels" / "mine" / "given.csv")
    with (tmp_path / "mine.csv").open("w") as file:
        wrong = {True: next(n for n in given if given[n]), False: next(n for n in given if not given[n])}
        made = [(name, int(label != (wrong[label] == name))) for name, label in given.items()]
        csv.writer(file).writerows([("id", "label"), *made])
    capsys.readouterr()
    asked = parse(flags[1:])
    before = runner.make_plan(resolved(asked)).keys
    with runner.only_run(results / "mine"), pytest.raises(InputError, match="another run is writing"):
        judge_check.main(["--labels", str(tmp_path / "mine.csv"), *flags])
    assert accuracy.read_accuracy(results / "mine") is None and "complied" in capsys.readouterr().out
    assert judge_check.main(["--labels", str(tmp_path / "mine.csv"), *flags]) == 0
    said = capsys.readouterr()
    assert [line[:3] for line in said.out.splitlines()] == ["T1,", "T2,"] and "notebooks 05 and 06" in said.err
    found = accuracy.read_accuracy(results / "mine")
    n_yes = sum(given.values())
    assert found is not None and found.accuracy == Accuracy(n_yes, n_yes - 1, 40 - n_yes, 39 - n_yes)
    assert (found.source.model, found.source.prompts) == ("model", "prompts")
    assert str(tmp_path) not in (results / "mine" / FILE).read_text()
    after = runner.make_plan(resolved(asked)).keys
    assert {number for number in before if before[number] != after[number]} == {"05", "06", "08", "00"}
    (tmp_path / "prompts" / "outcome.json").write_text('{"comply": [" w13"], "refuse": [" w12"]}')
    with pytest.raises(InputError, match="an earlier state of the model, prompts or judge"):
        runner.make_plan(resolved(asked))


def test_labels_of_an_unknown_sample_are_not_kept(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "labels" / "full-0"
    folder.mkdir(parents=True)
    lines = "id,label\n" + "".join(f"T1:{i},{i % 2}\n" for i in range(20))
    for file in (folder / "given.csv", tmp_path / "mine.csv"):
        file.write_text(lines)
    words = ["--labels", str(tmp_path / "mine.csv"), "--", "--model", "full-0"]
    with pytest.raises(InputError, match=r"nothing says which run .* write a new sample"):
        judge_check.main(words)
    given, source = hash_file(folder / "given.csv", {}), asdict(Source("a", "b", "c", "d"))
    for note in (
        {"given": "another", "source": source, "exact": False}, {"given": given, "source": source},
        {"given": given, "source": {**source, "more": 1}, "exact": False}, [],
    ):  # fmt: skip
        (folder / "given.json").write_text(json.dumps(note))
        with pytest.raises(InputError, match="nothing says which run"):
            judge_check.main(words)
    assert not (results / "full-0").exists()


def test_another_judge_makes_everything_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    judge_folder = tmp_path / "judge"
    judge_folder.mkdir()
    (judge_folder / "config.json").write_text("{}")
    keys = []
    for judge in ("", "window-1", "window-0", f"org/judge@{'0' * 40}", f"org/judge@{'1' * 40}", str(judge_folder)):
        monkeypatch.setenv(hub.JUDGE, judge)
        keys.append(runner.make_plan(runner.DEFAULTS).keys)
    (judge_folder / "config.json").write_text("{ }")
    keys.append(runner.make_plan(runner.DEFAULTS).keys)
    monkeypatch.delenv(hub.JUDGE)
    assert runner.make_plan(runner.DEFAULTS).keys == keys[0]
    for number in keys[0]:
        assert len({one[number] for one in keys}) == len(keys)


JUDGE_DAMAGES = {
    "cut off or no safetensors": lambda folder: cut(folder / "model.safetensors", 0.9),
    "cut off or no safetensors file": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 1000),
    "is not there, though model.safetensors.index.json names it": lambda folder: (folder / hub.INDEX).write_text(
        '{"weight_map": {"a": "model-1.safetensors"}}'
    ),
    "has no tokenizer files": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "has no config.json": lambda folder: (folder / "config.json").unlink(),
}
LATER = {
    "its tokenizer cannot be loaded": lambda folder: cut(folder / "tokenizer.json", 0.5),
    "holds BertModel, not a causal language model": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "bert", "architectures": ["BertModel"]}'
    ),
    "unknown architecture: GPTNeoX": lambda folder: spoil(
        folder, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]
    ),
    "too large for cpu: weights": lambda folder: spoil(
        folder, hidden_size=32768, intermediate_size=131072, num_hidden_layers=400
    ),
    "Yes and No do not begin with known tokens of their own": lambda folder: words(folder, {}),
    "judge reads at most 64 tokens, and the question with a request and its answer takes": lambda folder: spoil(
        folder, max_position_embeddings=64
    ),
    "but the model embeds 3; they do not belong together": lambda folder: spoil(folder, vocab_size=3),
    "chat template cannot render one user turn": lambda folder: (folder / "chat_template.jinja").write_text("{{ x( }}"),
    "the chat template changes the user turn's text": lambda folder: (folder / "chat_template.jinja").write_text(
        "{{ messages[0].content | upper }}"
    ),
}


def judge_folder(place: Path) -> Path:
    """A judge with random weights, which knows the words Yes and No."""
    folder = place / "judge"
    words(folder, {7: "Yes", 9: "No"})
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    return folder


def words(folder: Path, named: dict[int, str]) -> None:
    tokenizer = tiny_tokenizer(folder, named)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def spoil(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize("message", [*JUDGE_DAMAGES, *LATER])
def test_a_judge_that_cannot_be_loaded_is_named_before_the_model_is(
    tmp_path: Path, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What files tell is said by every command, also one that runs nothing; the rest before a notebook starts."""
    folder = judge_folder(tmp_path)
    monkeypatch.setenv(hub.JUDGE, "")
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    flags = ["--model", "full-0", "--judge", str(folder)]
    capsys.readouterr()  # saving the folder draws a bar of progress
    assert cli.main(["--list", *flags]) == 0 and capsys.readouterr().err == ""
    {**JUDGE_DAMAGES, **LATER}[message](folder)
    monkeypatch.setattr(runner, "run_notebooks", lambda *_: pytest.fail("a notebook was started"))
    for words in [[], ["--list"], ["--figures"]] if message in JUDGE_DAMAGES else [[]]:
        assert cli.main([*words, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("run_all.sh: --judge: ") and message in error and error.count("\n") == 1


def test_a_judge_must_fit_beside_the_model_and_nothing_is_compared_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One byte short of the model's need and the judge's own, with one copy of its weights, the run does not start."""
    folder, model = judge_folder(tmp_path), folders.model_folder("full-0")
    judge = memory.run_memory(memory.on_meta(folder, torch.bfloat16), copies=1)
    together = judge.total + memory.run_memory(memory.on_meta(model, torch.float32)).total
    assert judge.copies == judge.weights
    monkeypatch.setenv(hub.JUDGE, "")
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(memory, "USABLE", 1)
    monkeypatch.setattr(runner, "run_notebooks", lambda *_: 1)
    for free, status in ((together, 1), (together - 1, 2)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert cli.main(["--model", "full-0", "--judge", str(folder)]) == status
    error = capsys.readouterr().err
    assert "--judge: judge is too large for cpu" in error and "can be used beside the model under study" in error
    assert "copy" not in error
    monkeypatch.setattr(memory, "free_memory", lambda device: judge.total)
    assert labels.judge_model.__wrapped__(str(folder), "cpu").n_layers == 4


def test_a_judge_goes_to_the_first_gpu_of_its_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A room on another GPU is none for a judge: it is loaded where the model's embedding lies."""
    folder = judge_folder(tmp_path)
    model = memory.run_memory(memory.on_meta(folders.model_folder("full-0"), torch.float32))
    judge = memory.run_memory(memory.on_meta(folder, torch.bfloat16), copies=1)
    free = {"cuda": model.total, "cuda:0": model.total + judge.total, "cuda:1": 10**12, "cpu": 0}
    monkeypatch.setattr(memory, "USABLE", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(memory, "free_memory", lambda device: free[str(device)])
    given = {"MODEL": "full-0", "DEVICE": "cuda", "DTYPE": "float32"}
    assert settings._ready_judge(str(folder), given) == str(folder)
    free["cuda:0"] -= 1
    with pytest.raises(InputError, match="--judge: judge is too large for cuda:0"):
        settings._ready_judge(str(folder), given)
