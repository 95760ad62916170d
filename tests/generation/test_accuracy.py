"""The labeller's error: counted, kept, checked when read, and carried into rates and differences."""

import json
from pathlib import Path

import numpy as np
import pytest

from companion.base import hub
from companion.base.errors import InputError
from companion.generation import accuracy
from companion.generation.accuracy import Accuracy, Measured, Source, rogan_gladen, write_accuracy
from companion.stats import rates
from companion.stats.rates import Change

GOOD = Accuracy(40, 32, 50, 45)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of results, and no judge model."""
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "results")
    monkeypatch.delenv(hub.JUDGE, raising=False)
    return tmp_path / "results"


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
    assert expected[0] == pytest.approx(0.2 / 0.7)
    assert accuracy.corrected_rates(labels, "x", exact=True)[1] == accuracy.EXACT
    monkeypatch.setenv(hub.JUDGE, "org/judge")
    with pytest.raises(InputError, match="has the accuracy of refusal phrases, but org/judge labels here"):
        accuracy.corrected_rates(labels, "x", exact=False)
    sentence = accuracy.corrected_rates(labels, "y", exact=False)[1]
    assert "the word of the judge model org/judge, which errs as well" in sentence


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
    for _ in range(150):
        known = Accuracy(100, int(rng.binomial(100, 0.8)), 100, int(rng.binomial(100, 0.9)))
        one, other = (rng.random(400) < rate * 0.8 + (1 - rate) * 0.1 for rate in (0.6, 0.2))
        low, high = rates.newcombe(other, one)
        change = Change(float(one.mean() - other.mean()), low, high, 400, 400)
        rate, low, high = accuracy.corrected_difference(change, known)
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


def labelled(rate: float, n: int, sensitivity: float, specificity: float, rng: np.random.Generator) -> tuple:
    truth = rng.random(n) < rate
    right = rng.random(n) < np.where(truth, sensitivity, specificity)
    return truth, np.where(right, truth, ~truth)


def test_the_correction_finds_the_true_rate_and_its_interval_covers_it() -> None:
    """A labeller of sensitivity 0.8 and specificity 0.9, its accuracy known from 200 answers, on a true rate of 0.1."""
    rng = np.random.default_rng(0)
    covered, estimates, raw = 0, [], []
    for _ in range(200):
        ids = [str(i) for i in range(200)]
        truth, said = labelled(0.5, 200, 0.8, 0.9, rng)
        known = accuracy.accuracy(dict(zip(ids, said, strict=True)), dict(zip(ids, truth, strict=True)))
        _, labels = labelled(0.1, 1000, 0.8, 0.9, rng)
        rate, low, high = rogan_gladen(labels, known)
        covered += low <= 0.1 <= high
        estimates.append(rate)
        raw.append(labels.mean())
    assert np.mean(raw) == pytest.approx(0.17, abs=0.01)  # 0.1 * 0.8 + 0.9 * 0.1: what the uncorrected label says
    assert np.mean(estimates) == pytest.approx(0.1, abs=0.015)
    assert 0.91 <= covered / 200 <= 0.99


def test_a_perfect_labeller_is_not_corrected_and_chance_cannot_be() -> None:
    labels = np.arange(100) < 30
    rate, low, high = rogan_gladen(labels, Accuracy(500, 500, 500, 500))
    assert rate == pytest.approx(0.3) and low < 0.3 < high
    assert rogan_gladen(np.zeros(100, dtype=bool), Accuracy(50, 40, 50, 40))[0] == 0.0
    with pytest.raises(InputError, match="no better than chance"):
        rogan_gladen(labels, Accuracy(50, 25, 50, 25))


def test_fewer_known_labels_give_a_wider_interval() -> None:
    labels = np.arange(1000) < 300
    few, many = (rogan_gladen(labels, Accuracy(n, n * 8 // 10, n, n * 9 // 10)) for n in (20, 2000))
    assert few[2] - few[1] > 2 * (many[2] - many[1])
    assert few[0] == pytest.approx(many[0]) == pytest.approx(0.2 / 0.7)


def test_accuracy_counts_only_answers_that_both_labelled() -> None:
    truth = {f"a{i}": i < 10 for i in range(20)}
    given = {f"a{i}": i < 8 or i == 15 for i in range(20)} | {"other": True}
    made = accuracy.accuracy(given, truth)
    assert (made.sensitivity, made.specificity) == (0.8, 0.9)
    with pytest.raises(InputError, match="4 are positive and 16 negative among those judged; label at least 5"):
        accuracy.accuracy(given, {f"a{i}": i < 4 for i in range(20)})
