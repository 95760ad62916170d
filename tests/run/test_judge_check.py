"""Labels made by hand correct the labeller: a sample goes to the cache, its labels come back, and the run rests on them."""

import csv
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from hub_cache import chat_folder
from toys import prompt_set

from companion.base import hub
from companion.base.errors import InputError
from companion.base.files import read_json, write_json
from companion.base.paths import ORGANISM
from companion.generation import accuracy, labels
from companion.generation.accuracy import FILE, Accuracy, Source
from companion.generation.labels import judge
from companion.run import cli, judge_check, runner
from companion.run.cli import parse, resolved

FLAGS = ("--", "--model", "full-0")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of results, for every module that writes there, and no judge model."""
    folder = tmp_path / "results"
    for module in (runner, accuracy, judge_check.paths):
        monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.delenv(hub.JUDGE, raising=False)
    monkeypatch.setenv(hub.OWN, str(tmp_path / "cache"))
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_from_a_sample_to_corrected_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(hub.OWN, str(tmp_path / "cache"))
    monkeypatch.setattr(judge_check, "MOST", 20)
    monkeypatch.setattr(judge_check, "STEPS", 16)
    assert judge_check.main(["--sample", "30", *FLAGS]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "cache" / "labels" / "full-0"
    sample, given = rows(folder / "answers.csv"), read_json(folder / "given.json")["labels"]
    assert (len(sample), len(given)) == (30, 60) and "60 answers labelled by refusal phrases; 30 of them" in said
    assert not [row for row in sample if row["request"] in said or row["answer"] in said]
    assert {row["label"] for row in sample} == {""} and {row["id"] for row in sample} < set(given)
    with (tmp_path / "mine.csv").open("w") as file:
        made = [(row["id"], int(judge(row["request"], row["answer"]) in ("harmful", "on_topic"))) for row in sample]
        csv.writer(file).writerows([("id", "label"), *made])
    assert judge_check.main(["--labels", str(tmp_path / "mine.csv"), *FLAGS]) == 0
    assert capsys.readouterr().out.startswith("not kept: a run on the embedded language")
    with pytest.raises(InputError, match=r"answers\.csv is there, perhaps with labels in it: give it to --labels"):
        judge_check.main(["--sample", "30", *FLAGS])
    assert rows(folder / "answers.csv") == sample


def test_flags_behind_the_dashes_hold_as_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreign code is trusted only if typed, and a judge's folder counts from where it was typed."""
    seen: list[tuple[bool, str | None]] = []
    monkeypatch.setattr(judge_check, "_sample", lambda *_: seen.append((hub.trusts_code(), os.environ.get(hub.JUDGE))))
    monkeypatch.setattr(judge_check.settings, "fetched", lambda found, given: found)
    monkeypatch.setenv(hub.OWN, str(tmp_path / "cache"))
    monkeypatch.setenv(hub.TRUST, "1")
    monkeypatch.setenv(hub.JUDGE, "left from before")
    shutil.copytree(ORGANISM / "window-1", tmp_path / "judge")
    monkeypatch.setenv("COMPANION_CALLER", str(tmp_path))
    judge_check.main(["--sample", "5", *FLAGS])
    judge_check.main(["--sample", "5", *FLAGS, "--trust-remote-code", "--judge", "judge"])
    assert seen == [(False, None), (True, str(tmp_path / "judge"))]


MISTAKES = {
    "--sample 5 --labels x": "not allowed with",
    "--labels nowhere.csv -- --model full-0": "no labels at",
    "--sample 0 -- --model full-0": "--sample 0: expected at least 1",
    "--sample 5 -- --model nowhere": "no model 'nowhere'",
    "--sample 5 -- --model .": "is no model folder: it has no config.json",
    "--sample 5 -- --model full-0 --judge nowhere": "no model 'nowhere'",
    "": "one of the arguments --sample --labels is required",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], words: str) -> None:
    assert cli.run_with_flags("judge_check", judge_check.main, words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("judge_check: ") and MISTAKES[words] in error and error.count("\n") == 1


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A small model of random weights and a prompt set of placeholder words, each in a folder of its own."""
    model, keys = chat_folder(tmp_path / "model"), ("id", "treatment", "topic", "control", "treated")
    rows = [
        (f"{kind}-{i}", kind, f"t{i}", f"w5 w{20 + i}", f"w6 w{20 + i}") for kind in ("T1", "T2") for i in range(20)
    ]
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
    prompts = prompt_set(tmp_path / "prompts", lines, '{"comply": [" w11"], "refuse": [" w12"]}')
    return ["--", "--model", str(model), "--prompts", str(prompts), "--name", "mine"]


def test_labels_made_by_hand_reach_the_run(
    results: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge_check, "STEPS", 4)
    monkeypatch.setattr(labels, "is_refusal", lambda text: sum(map(ord, text)) % 2 == 1)
    assert judge_check.main(["--sample", "40", *flags]) == 0
    given = read_json(tmp_path / "cache" / "labels" / "mine" / "given.json")["labels"]
    with (tmp_path / "mine.csv").open("w") as file:
        wrong = {True: next(n for n in given if given[n]), False: next(n for n in given if not given[n])}
        made = [(name, int(label != (wrong[label] == name))) for name, label in given.items()]
        csv.writer(file).writerows([("id", "label"), *made])
    capsys.readouterr()
    asked = parse(flags[1:])
    before = runner.make_plan(resolved(asked)).keys
    with runner.only_run(results / "mine"), pytest.raises(InputError, match="another run is writing"):
        judge_check.main(["--labels", str(tmp_path / "mine.csv"), *flags])
    assert accuracy.read_accuracy(results / "mine") is None
    assert judge_check.main(["--labels", str(tmp_path / "mine.csv"), *flags]) == 0
    said = capsys.readouterr().out
    assert said.startswith("labels by refusal phrases: sensitivity") and "notebooks 05 and 06" in said
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
    given, source = {f"T1:{i}": i % 2 == 1 for i in range(20)}, asdict(Source("a", "b", "c", "d"))
    (tmp_path / "mine.csv").write_text("id,label\n" + "".join(f"{name},{int(one)}\n" for name, one in given.items()))
    words = ["--labels", str(tmp_path / "mine.csv"), "--", "--model", "full-0"]
    note = tmp_path / "cache" / "labels" / "full-0" / "given.json"
    for content in (
        None, {"labels": given, "source": source}, {"labels": given, "source": {**source, "more": 1}, "exact": False}, [],
    ):  # fmt: skip
        if content is not None:
            write_json(content, note)
        with pytest.raises(InputError, match="does not say what was labelled for this run: write a sample"):
            judge_check.main(words)
    assert not (results / "full-0").exists()
