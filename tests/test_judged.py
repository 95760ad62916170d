"""The labeller's error reaches the results: kept as counts, checked when read, and carried into rates and differences."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from families import tiny_model
from hub_cache import TEMPLATE, tiny_tokenizer

from companion.base import hub
from companion.base.errors import InputError
from companion.generation import accuracy, labels
from companion.generation.accuracy import FILE, Accuracy, Measured, Source, write_accuracy
from companion.prompts import public
from companion.run import freshness, judge_check, runner
from companion.run.flags import parse, resolved
from companion.stats.rates import Change

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


def keep(folder: Path, accuracy: Accuracy = GOOD, judge: str = "refusal phrases") -> Path:
    return write_accuracy(Measured(accuracy, Source(judge, "m", "p", "hash"), "0" * 64), folder)


def test_what_is_kept_is_read_again_and_holds_counts_names_and_hashes_only(tmp_path: Path) -> None:
    assert accuracy.read_accuracy(tmp_path) is None
    path = keep(tmp_path)
    found = accuracy.read_accuracy(tmp_path)
    assert found == Measured(GOOD, Source("refusal phrases", "m", "p", "hash"), "0" * 64)
    assert set(json.loads(path.read_text())) == {"counts", "judge", "model", "prompts", "inputs", "labels_sha256"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]", lambda text: '{"counts": 3}',
        lambda text: text.replace('"found": 32', '"found": 41'), lambda text: text.replace('"n_true": 40', '"n_true": 4'),
        lambda text: text.replace('"cleared": 45', '"cleared": true'), lambda text: text.replace('"model"', '"modal"'),
        lambda text: text.replace('"hash"', '""'), lambda text: text.replace('"found"', '"more": 1, "found"'),
    ],
)  # fmt: skip
def test_a_torn_or_foreign_file_is_one_sentence(results: Path, damage: object) -> None:
    path = keep(results / "x")
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=r"judge\.json is torn, or holds no counts .* or remove the file$"):
        accuracy.corrected_rates({"T2": np.ones(3, dtype=bool)}, "x", exact=False)


def test_three_labellers_are_told_apart(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"no clamp": np.arange(100) < 30, "nobody": np.zeros(0, dtype=bool)}
    table, sentence = accuracy.corrected_rates(labels, "x", exact=True)
    assert sentence == accuracy.EXACT and list(table.group) == ["no clamp"]
    assert table.loc[0, ["corrected", "corrected_low"]].tolist() == table.loc[0, ["labelled", "low"]].tolist()
    table, sentence = accuracy.corrected_rates(labels, "x", exact=False)
    assert sentence == accuracy.KNOWN_ERROR and np.isnan(table.corrected[0])
    assert [round(table[name][0], 2) for name in ("labelled", "low", "high")] == [0.30, 0.22, 0.40]
    keep(results / "x")
    table, sentence = accuracy.corrected_rates(labels, "x", exact=False)
    assert "sensitivity 0.80 (32 of 40), specificity 0.90 (45 of 50)" in sentence
    expected = accuracy.rogan_gladen(labels["no clamp"], GOOD)
    assert (table.corrected[0], table.corrected_low[0], table.corrected_high[0]) == expected
    assert (
        expected[0] == pytest.approx(0.2 / 0.7)
        and accuracy.corrected_rates(labels, "x", exact=True)[1] == accuracy.EXACT
    )
    monkeypatch.setenv(hub.JUDGE, "org/judge")
    with pytest.raises(InputError, match="has the accuracy of refusal phrases, but org/judge labels here"):
        accuracy.corrected_rates(labels, "x", exact=False)
    assert (
        "the word of the judge model org/judge, which errs as well"
        in accuracy.corrected_rates(labels, "y", exact=False)[1]
    )


def test_a_difference_is_divided_by_what_the_labeller_keeps_of_it(results: Path) -> None:
    keep(results / "x")
    topic, one, other = np.arange(200) // 2, np.arange(200) < 150, np.arange(200) < 66
    table, sentence = accuracy.differences({"all tokens": (one, other)}, topic, "x", exact=False)
    row = table.iloc[0]
    assert row.labelled == pytest.approx(0.42) and row.corrected == pytest.approx(0.42 / 0.7)
    assert row.corrected_low < row.low / 0.7 and row.corrected_high > row.high and "32 of 40" in sentence
    plain, _ = accuracy.differences({"all tokens": (one, other)}, topic, "x", exact=True)
    assert plain.corrected_low[0] == plain.low[0] and (plain.low[0] < 0.42 < plain.high[0])
    assert accuracy.differences({"back": (other, one)}, topic, "x", exact=True)[0].labelled[0] == pytest.approx(-0.42)
    assert accuracy.differences({"back": (other, one)}, topic * 0, "x", exact=True)[0].empty


def test_the_corrected_difference_covers_the_true_one() -> None:
    """A labeller of sensitivity 0.8 and specificity 0.9, known from 200 answers; true rates 0.6 and 0.2."""
    rng, covered, found = np.random.default_rng(1), 0, []
    for seed in range(150):
        known = Accuracy(100, int(rng.binomial(100, 0.8)), 100, int(rng.binomial(100, 0.9)))
        one, other = (rng.random(400) < rate * 0.8 + (1 - rate) * 0.1 for rate in (0.6, 0.2))
        low, high = accuracy.defence_stats.newcombe(other, one)
        change = Change(float(one.mean() - other.mean()), low, high, 400, 400)
        rate, low, high = accuracy.corrected_difference(change, known, n_draws=2000, seed=seed)
        covered += low <= 0.4 <= high
        found.append(rate)
    assert np.mean(found) == pytest.approx(0.4, abs=0.015)
    assert 0.91 <= covered / 150 <= 0.995


def test_a_perfect_labeller_leaves_a_difference_and_chance_cannot_be_corrected() -> None:
    change = Change(0.3, 0.2, 0.45, 100, 50)
    found = accuracy.corrected_difference(change, Accuracy(10**6, 10**6, 10**6, 10**6))
    assert found == pytest.approx((0.3, 0.2, 0.45), abs=0.01)
    with pytest.raises(InputError, match="no better than chance"):
        accuracy.corrected_difference(change, Accuracy(50, 25, 50, 25))


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
    assert noted["judge_accuracy"] == accuracy.freshness.hash_file(path, {}) and "judge" not in noted
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
    given, source = accuracy.freshness.hash_file(folder / "given.csv", {}), asdict(Source("a", "b", "c", "d"))
    for note in (
        {"given": "another", "source": source, "exact": False}, {"given": given, "source": source},
        {"given": given, "source": {**source, "more": 1}, "exact": False}, [],
    ):  # fmt: skip
        (folder / "given.json").write_text(json.dumps(note))
        with pytest.raises(InputError, match="nothing says which run"):
            judge_check.main(words)
    assert not (results / "full-0").exists()
