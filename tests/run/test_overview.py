"""The overview of all runs, and the check of a judge."""

import csv
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from toys import chat_folder, prompt_set

from companion.base import files, hub
from companion.base.errors import InputError
from companion.base.files import read_json, write_json
from companion.base.paths import NOTEBOOKS, ORGANISM, RESULTS
from companion.claims.corrected_rules import STATEMENTS
from companion.generation import accuracy, labels
from companion.generation.accuracy import FILE, Accuracy, Source
from companion.generation.labels import judge
from companion.run import cli, judge_check, overview, runner
from companion.run.cli import parse, resolved
from companion.run.runner import NEEDS

# ---- overview ----

PAGE = "# {run}\n\nwhat holds\n\n| table |\n\nthe files\n"


def judged(folder: Path, **verdicts: str) -> None:
    """A run's files: models with a verdict on C1 by both rules, of which the corrected one answers."""
    folder.mkdir()
    rows = [
        {"model": name.replace("_", "-"), "claim": "C1", "rule": rule, "verdict": found}
        for name, found in verdicts.items()
        for rule in ("registered", "corrected")
    ]
    files.write_json(
        [{**row, "answer": row["verdict"] if row["rule"] == "corrected" else None} for row in rows],
        folder / "claims.json",
    )
    files.write_table(pd.DataFrame(rows), folder / "claims.csv")
    files.write_text(PAGE.format(run=folder.name), folder / "claims.md")


def joined(results: Path) -> list[str]:
    """Models and verdicts, which both tables hold alike, a row a rule."""
    overview.join_claims(results)
    found = [
        f"{one['model']} {one['rule']} {one['verdict']}" for one in json.loads((results / "claims.json").read_text())
    ]
    lines = [line.split(",") for line in (results / "claims.csv").read_text().splitlines()[1:]]
    assert [f"{line[0]} {line[2]} {line[3]}" for line in lines] == found
    assert found[::2] == [one.replace("corrected ", "registered ") for one in found[1::2]]
    return [one.replace("corrected ", "") for one in found[1::2]]


def test_every_model_is_judged_by_its_own_run(tmp_path: Path) -> None:
    overview.join_claims(tmp_path)
    assert not list(tmp_path.iterdir())
    judged(tmp_path / "mine", mine="supported", window_1="inconclusive", plant="contradicted")
    assert joined(tmp_path) == ["mine supported", "window-1 inconclusive", "plant contradicted"]
    assert (tmp_path / "claims.md").read_text() == PAGE.format(run="mine")
    judged(tmp_path / "window-1", window_1="supported", mine="contradicted", full_0="inconclusive")
    four = ["mine supported", "window-1 supported", "plant contradicted", "full-0 inconclusive"]
    assert joined(tmp_path) == four
    (tmp_path / "empty").mkdir()
    judged(tmp_path / "torn", torn="supported")
    for name in ("claims.csv", "claims.json", "claims.md"):
        path = tmp_path / "torn" / name
        path.write_bytes(path.read_bytes()[:-2])
    assert joined(tmp_path) == four and "torn" not in (tmp_path / "claims.md").read_text()


def test_the_page_is_the_default_runs_with_a_line_for_every_other_model(tmp_path: Path) -> None:
    judged(tmp_path / "smollm2-refuser", smollm2_refuser="supported", other="cannot tell")
    for name, answer in (("a", "supported"), ("b", "not testable"), ("other", "cannot tell")):
        judged(tmp_path / name, **{name: answer, "relative": "supported"})
    overview.join_claims(tmp_path)
    above, lines = (tmp_path / "claims.md").read_text().split("**Other models with a run.**\n\n")
    assert above == PAGE.format(run="smollm2-refuser").removesuffix("the files\n")
    assert lines.splitlines() == [
        "- `a`: holds: C1. Same answer as `smollm2-refuser` in 1 of 1.",
        "- `b`: not measured: C1. Same answer as `smollm2-refuser` in 0 of 1.",
        "- `other`: cannot tell: C1. Same answer as `smollm2-refuser` in 0 of 1.",
        "", "the files",
    ]  # fmt: skip


def test_the_terminal_shows_the_answers_of_a_runs_own_model(tmp_path: Path) -> None:
    rows = [
        ("mine", "C1", "x", "supported", "", ""),
        ("mine", "C1", "y", "supported", "cannot tell", "-"),
        ("kin", "C1", "y", "?", "?", "?"),
    ]
    columns = ["model", "claim", "reason", "verdict", "answer", "grade"]
    files.write_table(pd.DataFrame(rows, columns=columns), tmp_path / "claims.csv")
    shown = ["claim  verdict    answer       grade", "C1     supported  cannot tell  -"]
    assert overview.claims_table(tmp_path / "claims.csv", "mine").splitlines() == shown
    assert overview.claims_table(tmp_path / "none.csv", "mine") == ""


def test_the_map_shows_the_answers_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    assert "run ./run_all.sh" in str(overview.verdict_table("mine")) and not overview.verdict_table("mine")
    rows = [
        ("mine", "C6c", "late", "cannot tell", "-13.0 points", "cannot tell"),
        ("kin", "C1", "x", "supported", "", "weak"),
    ]
    files.write_table(pd.DataFrame(rows, columns=list(overview.ANSWERS)), tmp_path / "mine" / "08_claims.csv")
    (row,) = overview.verdict_table("mine").itertuples(index=False)
    assert row == ("C6c", STATEMENTS["C6c"], "cannot tell", "-13.0 points", "cannot tell")


def test_every_notebook_has_a_question_and_its_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    assert {path.stem.partition("_")[0] for path in NOTEBOOKS.glob("*.ipynb")} <= set(overview.QUESTIONS) == set(NEEDS)
    files.write_json({"01_data_prep": 150}, tmp_path / "mine" / "run_times.json")
    table = overview.notebook_table("mine").set_index("notebook")
    assert table.pop("minutes to run").dropna().to_dict() == {"01_data_prep": 2.5}


@pytest.mark.parametrize(("windows", "slides"), [([], False), ([3], True)])
def test_the_shape_of_a_model_is_read_from_its_facts(windows, slides, tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    assert overview.shape_of("mine") is None
    files.write_json({"layers": 6, "windows": windows}, tmp_path / "mine" / "model_facts.json")
    assert overview.shape_of("mine") == (6, slides)


def test_the_shipped_verdicts_are_those_of_the_shipped_run(tmp_path: Path) -> None:
    judged(tmp_path / overview.DEFAULT)
    for name in ("claims.csv", "claims.json", "claims.md"):
        (tmp_path / overview.DEFAULT / name).write_bytes((RESULTS / overview.DEFAULT / name).read_bytes())
    overview.join_claims(tmp_path)
    for name in ("claims.csv", "claims.json", "claims.md"):
        assert (tmp_path / name).read_bytes() == (RESULTS / overview.DEFAULT / name).read_bytes(), name


def test_the_evidence_of_a_run_is_that_of_its_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    with pytest.raises(InputError, match=r"mine holds no evidence: run \./run_all\.sh first"):
        overview.run_evidence("mine")
    numbers = {"estimate": 1.0, "ci_low": 0.0, "ci_high": 1.0, "n_pairs": 3, "n_topics": 3, "note": ""}
    same = {"model": "mine", "claim": "C1", "variant": "main", **numbers}
    rows = [same | {"quantity": name} for name in ("TE T2", "late share")]
    files.write_table(pd.DataFrame(rows[:1]), tmp_path / "mine" / "02_evidence.csv")
    files.write_table(pd.DataFrame(rows[::-1]), tmp_path / "mine" / "03_evidence.csv")
    assert overview.run_evidence("mine")["quantity"].tolist() == ["TE T2", "late share"]
    (tmp_path / "mine" / "03_evidence.csv").write_text("model,cl")
    with pytest.raises(InputError, match=r"03_evidence\.csv"):
        overview.run_evidence("mine")


# ---- judge check ----

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


def test_from_a_sample_to_corrected_rates(tmp_path, monkeypatch, capsys):
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


def test_labels_made_by_hand_reach_the_run(results, flags, tmp_path, monkeypatch, capsys):
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
