"""Labels made by hand correct the labeller: a sample goes to the cache, its labels come back, and the run rests on them."""

import csv
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hub_cache import chat_folder
from toys import pair, prompt_set

from companion.base import hub
from companion.base.errors import InputError
from companion.base.files import hash_file
from companion.base.paths import ORGANISM
from companion.generation import accuracy, labels
from companion.generation.accuracy import FILE, Accuracy, Source
from companion.prompts import public
from companion.run import cli, judge_check, runner
from companion.run.cli import parse, resolved

FLAGS = ("--", "--model", "full-0")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "results"
    for module in (runner, accuracy, judge_check.paths):
        monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.delenv(hub.JUDGE, raising=False)
    monkeypatch.setenv(public.CACHE, str(tmp_path / "cache"))
    return folder


def test_flags_behind_the_dashes_hold_as_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreign code is trusted only if typed, and a judge's folder counts from where it was typed."""
    seen: list[tuple[bool, str | None]] = []
    note = lambda *_: seen.append((hub.trusts_code(), os.environ.get(hub.JUDGE))) or 0  # noqa: E731
    monkeypatch.setattr(judge_check, "_sample", note)
    monkeypatch.setattr(judge_check.settings, "fetched", lambda found, given: found)
    monkeypatch.setenv(public.CACHE, str(tmp_path / "cache"))
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
    "--sample 5 -- --model full-0 --models x.yml": "--models behind -- means nothing here",
    "--sample 5 -- --model nowhere": "no model 'nowhere'",
    "": "one of the arguments --sample --labels is required",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], words: str) -> None:
    assert cli.run_with_flags("judge_check", judge_check.main, words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("judge_check: ") and MISTAKES[words] in error and error.count("\n") == 1


def test_labels_made_by_hand_reach_the_run(results, tmp_path, monkeypatch, capsys):
    model, lines = chat_folder(tmp_path / "model"), [pair(n, f"w6 w{20 + n}", f"w5 w{20 + n}") for n in range(20)]
    lines += [line.replace("T1", "T2").replace('"p', '"q') for line in lines]
    prompts = prompt_set(tmp_path / "prompts", lines, '{"comply": [" w11"], "refuse": [" w12"]}')
    flags = ["--", "--model", str(model), "--prompts", str(prompts), "--name", "mine"]
    monkeypatch.setattr(judge_check, "STEPS", 4)
    monkeypatch.setattr(labels, "is_refusal", lambda text: sum(map(ord, text)) % 2 == 1)
    folder, mine = tmp_path / "cache" / "labels" / "mine", tmp_path / "mine.csv"
    with pytest.raises(InputError, match=r"nothing was labelled for this run yet .* --sample N"):
        judge_check.rates(folder, {})
    assert judge_check.main(["--sample", "30", *flags]) == 0
    said, given = capsys.readouterr().out, labels.read_labels(folder / "given.csv")
    with (folder / "answers.csv").open(encoding="utf-8", newline="") as stream:
        sample = list(csv.DictReader(stream))
    assert (len(sample), len(given)) == (30, 40) and "40 answers labelled by refusal phrases; 30 of them" in said
    assert not [row for row in sample if row["request"] in said or row["answer"] in said or row["label"]]
    wrong = {True: next(n for n in given if given[n]), False: next(n for n in given if not given[n])}
    lines = [f"{name},{int(label != (wrong[label] == name))}\n" for name, label in given.items()]
    mine.write_text("id,label\n" + "".join(lines))
    (folder / "answers.csv").write_text("id,label,request,answer\n" + "".join(f"{n},1,a,b\n" for n in [*given][:3]))
    with pytest.raises(InputError, match=r"answers\.csv holds 3 labels made by hand, .* --labels"):
        judge_check.main(["--sample", "30", *flags])
    capsys.readouterr()
    asked = parse(flags[1:])
    before = runner.make_plan(resolved(asked)).keys
    with runner.only_run(results / "mine"), pytest.raises(InputError, match="another run is writing"):
        judge_check.main(["--labels", str(mine), *flags])
    assert accuracy.read_accuracy(results / "mine") is None and "complied" in capsys.readouterr().out
    assert judge_check.main(["--labels", str(mine), *flags]) == 0
    said = capsys.readouterr()
    assert "notebooks 05 and 06" in said.err
    found, n_yes = accuracy.read_accuracy(results / "mine"), sum(given.values())
    lines = [
        accuracy.describe(np.array([given[n] for n in given if n[:2] == name]), found.accuracy) for name in ("T1", "T2")
    ]
    assert said.out.splitlines() == [f"T1, complied: {lines[0]}", f"T2, complied: {lines[1]}"]
    assert found.accuracy == Accuracy(n_yes, n_yes - 1, 40 - n_yes, 39 - n_yes)
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
