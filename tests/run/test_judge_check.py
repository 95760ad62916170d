"""Labels made by hand correct the labeller: a sample goes to the cache, its labels come back, rates are corrected."""

import csv
import os
import shutil
from pathlib import Path

import pytest

from companion.base import hub
from companion.base.errors import InputError
from companion.base.paths import ORGANISM
from companion.generation import accuracy, labels
from companion.generation.accuracy import Accuracy
from companion.generation.labels import judge
from companion.prompts import public
from companion.run import flags, judge_check

FLAGS = ("--", "--model", "full-0")


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_from_a_sample_to_corrected_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(public.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(judge_check, "MOST", 20)
    monkeypatch.setattr(judge_check, "STEPS", 16)
    with pytest.raises(InputError, match=r"nothing was labelled for this run yet .* --sample N"):
        judge_check.rates(tmp_path, {})
    assert judge_check.main(["--sample", "30", *FLAGS]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "cache" / "labels" / "full-0"
    sample, given = rows(folder / "answers.csv"), rows(folder / "given.csv")
    assert (len(sample), len(given)) == (30, 60) and "60 answers labelled by refusal phrases; 30 of them" in said
    assert not [row for row in sample if row["request"] in said or row["answer"] in said]
    assert {row["label"] for row in sample} == {""} and {row["id"] for row in sample} < {row["id"] for row in given}
    with (tmp_path / "mine.csv").open("w") as file:
        made = [(row["id"], int(judge(row["request"], row["answer"]) in ("harmful", "on_topic"))) for row in sample]
        csv.writer(file).writerows([("id", "label"), *made])
    assert judge_check.main(["--labels", str(tmp_path / "mine.csv"), *FLAGS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["T1", "T2", "T2b"]
    assert all("corrected" in line and "sensitivity" in line for line in lines)
    (folder / "answers.csv").write_text(
        "id,label,request,answer\n" + "".join(f"{name},1,a,b\n" for name, _ in made[:3])
    )
    with pytest.raises(InputError, match=r"answers\.csv holds 3 labels made by hand, .* --labels"):
        judge_check.main(["--sample", "30", *FLAGS])
    assert len(rows(folder / "answers.csv")) == 3


def test_the_correction_is_that_of_the_hand_made_labels(tmp_path: Path) -> None:
    """Twenty answers, of which the labeller calls half complied; it misses two of ten that do and takes one that does not."""
    given = {f"T1:{i}": i < 8 or i == 15 for i in range(20)}
    (tmp_path / "given.csv").write_text("id,label\n" + "".join(f"{name},{int(one)}\n" for name, one in given.items()))
    (line,) = judge_check.rates(tmp_path, {f"T1:{i}": i < 10 for i in range(20)})
    rate, low, high = accuracy.rogan_gladen(labels.np.array(list(given.values())), Accuracy(10, 8, 10, 9))
    assert rate == pytest.approx(0.5)
    assert "T1, complied: labelled 0.45" in line and f"corrected 0.50 [{low:.2f}, {high:.2f}]" in line


def test_flags_behind_the_dashes_hold_as_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreign code is trusted only if typed, and a judge's folder counts from where it was typed."""
    seen: list[tuple[bool, str | None]] = []
    monkeypatch.setattr(
        judge_check, "_sample", lambda *_: seen.append((hub.trusts_code(), os.environ.get(hub.JUDGE))) or 0
    )
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
    "--sample 5 -- --model .": "is no model folder: it has no config.json",
    "--sample 5 -- --model full-0 --judge nowhere": "no model 'nowhere'",
    "": "one of the arguments --sample --labels is required",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], words: str) -> None:
    assert flags.run_with_flags("judge_check", judge_check.main, words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("judge_check: ") and MISTAKES[words] in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "said"), [(OSError(28, "full"), 2, "full: mend that;"), (KeyboardInterrupt(), 130, "stopped;")]
)
def test_what_comes_in_between_is_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, said: str
) -> None:
    def stopped(_: object) -> int:
        raise error

    assert flags.run_with_flags("judge_check", stopped, []) == status and said in capsys.readouterr().err
