"""Public sets and a user's wrappers: rows, partners, and every mistake in one sentence without a text. All rows are made up."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import datasets
import pytest
from datasets.exceptions import DatasetGenerationError
from rows import jbb, xstest

from companion.base import hub
from companion.base.errors import InputError
from companion.base.paths import ROOT
from companion.prompts import public
from companion.prompts.public import SETS, read_public_set

# ---- public sets ----


def test_rows_of_other_kinds_and_blank_ones_are_left_out_and_of_turns_the_first_is_read(served: dict) -> None:
    one, row = SETS["sorry-bench"], {"category": "k", "prompt_style": "base"}
    other = {"turns": ["asked in slang"], "category": "k", "prompt_style": "slang"}
    several = [other, row | {"turns": ["first", "second"]}, row | {"turns": []}]
    for rows, found in ((several, (1, "first")), ([row | {"turns": some} for some in ("  whole ", " ")], (0, "whole"))):
        served[one.repo] = {"train": rows}
        assert [(some.row, some.text) for some in read_public_set("sorry-bench", one, one.harmful)] == [found]


def test_rows_that_correspond_are_paired_by_index(served: dict) -> None:
    rows = public.load_rows("jailbreakbench")
    assert (rows.harmful[1].text, rows.harmless[1].text) == ("w20 w31", "w21 w31")
    assert rows.harmful[1].id == "jailbreakbench-001" and len(rows.harmful[1].sha256) == 64
    longer = jbb() | {"benign": jbb(len(jbb()["benign"]) + 1)["benign"]}
    for sides, row in ((jbb(Category="c9"), 2), (jbb(Goal=" "), 2), (longer, len(jbb()["benign"]))):
        served["JailbreakBench/JBB-Behaviors"] = sides
        with pytest.raises(InputError, match=rf"do not correspond \(row {row}\); name jailbreakbench\+alpaca"):
            public.load_rows("jailbreakbench")


def test_a_type_and_its_contrast_are_paired_in_order(served: dict) -> None:
    rows = public.load_rows("xstest")
    found = [(a.row, b and b.row) for a, b in zip(rows.harmful, rows.harmless, strict=True)]
    assert found == [(3, 0), (4, 1), (7, 5), (8, 6), (9, None)], "the second of discrimination has no safe request left"


def test_what_changed_or_is_gated_is_said_without_a_text(served: dict) -> None:
    served["walledai/StrongREJECT"] = {"train": [{"secret": "request 17", "category": "k"}]}
    served["walledai/XSTest"] = {"test": [row | {"label": "other"} for row in xstest()["test"]]}
    for name, message in (
        ("advbench", r"advbench is gated: accept its terms at huggingface.co/datasets/walledai/AdvBench"),
        ("strongreject", r"no column 'prompt' \(it has secret, category\)"),
        ("xstest", r"none of the 10 rows of .* \(column prompt, label 'unsafe'\)"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            public.load_rows(name)
        assert "request 17" not in str(caught.value)


CAUSED = DatasetGenerationError("An error occurred while generating the dataset")
CAUSED.__cause__ = RuntimeError("request 17")
REFUSALS = [
    (ConnectionError("Couldn't reach the Hub"), "the hub cannot be reached: connect, unset HF_HUB_OFFLINE"),
    (RuntimeError("Dataset scripts are no longer supported"), "a script of its own, .* name another set"),
    (CAUSED, r"could not be loaded \(RuntimeError\): run the same command again"),
]


@pytest.mark.parametrize(("error", "message"), REFUSALS)
def test_every_error_of_the_library_is_one_sentence(monkeypatch, error, message):
    monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=error))
    with pytest.raises(InputError, match=message) as caught:
        public.load_rows("strongreject")
    assert "\n" not in str(caught.value) and "request 17" not in str(caught.value), "a row may be quoted in it"


def test_nothing_usable_is_asked_for_and_no_cache_lies_in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("strongreject,nosuch", "strongreject,strongreject", "alpaca", "strongreject,alpaca", "alpaca+alpaca"):
        with pytest.raises(InputError, match="--prompts"):
            public.parse(name)
    monkeypatch.setenv(hub.OWN, str(ROOT / "data" / "x"))
    with pytest.raises(InputError, match="lies inside the repository"):
        hub.own_cache()


def test_a_request_seen_before_is_left_out_with_its_partner(served: dict) -> None:
    rows = public.load_rows("jailbreakbench")
    again = replace(rows.harmful[0], text="W20  w30 .")  # but for case, spacing and a full stop
    twice = public.Rows((*rows.harmful, again), (*rows.harmless, None))
    assert public.unseen(twice, set()) == rows


TEXTS = ["paint the red barn", "Paint the red barn!", "paint the barn", "paint a house", "sing", "", "", "red barn the"]


def test_near_duplicates_are_one_topic() -> None:
    """Public sets repeat requests in other words; as independent topics they make every interval too narrow."""
    assert public.near_duplicates(TEXTS) == [0, 0, 0, 1, 2, 3, 4, 0]  # the last shares 3 of 4 words with the first
    many = [f"word{i} other{i} third{i} fourth{i // 2}" for i in range(public.BLOCK + 20)]  # two of six: two topics
    assert public.near_duplicates(many) == list(range(len(many)))
    assert public.near_duplicates([*many, many[7]])[-1] == 7  # across blocks


# ---- wrappers ----

GOOD = {"family": "tale", "neutral": "plain {request} end", "jailbreak": "other {request} end"}


def written(tmp_path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / public.WRAPPERS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


WRONG = [
    ("{", "line 2: broken JSON"), ("[]", "line 2: expected an object with the strings family, neutral, jailbreak"),
    ({"family": "x", "neutral": "{request}"}, "and nothing else"), (GOOD | {"more": "x"}, "and nothing else"),
    (GOOD | {"neutral": "no slot"}, "'neutral' must hold the slot {request} exactly once, not 0 times"),
    (GOOD | {"jailbreak": "{request} {request}"}, "'jailbreak' must hold the slot {request} exactly once, not 2"),
    (GOOD | {"jailbreak": GOOD["neutral"]}, "the two templates must differ"),
    (GOOD | {"family": " "}, "'family' must be named"), (GOOD, "two wrappers are of one family"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_what_is_wrong_with_a_wrapper_is_said(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        public.read_wrappers(written(tmp_path, GOOD, row))
    assert message in str(caught.value) and "plain" not in str(caught.value)


def test_a_folder_and_its_file_are_read_alike_and_must_hold_wrappers(tmp_path: Path) -> None:
    place = written(tmp_path, GOOD, {**GOOD, "family": "play"})
    assert public.read_wrappers(place) == public.read_wrappers(place / public.WRAPPERS)
    assert public.read_wrappers(place)[0].around("request {17}") == ("plain request {17} end", "other request {17} end")
    for wrong, message in ((tmp_path / "none", "expected a file of JSON lines"), (written(tmp_path), "no wrappers")):
        with pytest.raises(InputError, match=message):
            public.read_wrappers(wrong)
