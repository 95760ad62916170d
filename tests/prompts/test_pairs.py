"""Prompt sets: everything that a user's folder may get wrong, and splits by topic."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from companion.base.errors import InputError
from companion.prompts import pairs
from companion.prompts.pairs import SPLITS, Pair, load_set, shown

OUTCOME = {"comply": ["yes"], "refuse": ["no"]}


def rows(n: int = 12, **changes: object) -> list[dict]:
    """Valid T2 pairs of as many topics; `changes` go into the pair of line 3."""
    made = [
        {"id": f"p{i}", "treatment": "T2", "topic": f"topic {i}", "control": f"off {i}", "treated": f"on {i}"}
        for i in range(n)
    ]
    made[2] |= changes
    return made


def folder(tmp_path: Path, pairs: list[dict] | str | bytes | None = None, outcome: object = OUTCOME) -> Path:
    lines = "\n".join(json.dumps(row) for row in pairs) + "\n" if isinstance(pairs, list) else pairs
    if lines is not None:
        (tmp_path / "pairs.jsonl").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    if outcome is not None:
        (tmp_path / "outcome.json").write_text(outcome if isinstance(outcome, str) else json.dumps(outcome))
    return tmp_path


def test_a_valid_set_is_read(tmp_path: Path) -> None:
    pairs = rows(spans={"treated": {"verb": [0, 2]}}, family="tale", split="test")
    content = load_set(folder(tmp_path, pairs))
    assert [pair.id for pair in content.pairs] == [f"p{i}" for i in range(12)]
    assert content.pairs[2] == Pair(
        "p2", "T2", "topic 2", "off 2", "on 2", "test", None, "tale", {"treated": {"verb": (0, 2)}}
    )
    assert content.outcomes == {"T2": (("yes",), ("no",))}
    both = (tmp_path / "pairs.jsonl").read_bytes() + (tmp_path / "outcome.json").read_bytes()
    assert content.sha256 == hashlib.sha256(both).hexdigest()


def test_a_file_from_windows_with_names_in_any_script_is_read(tmp_path: Path) -> None:
    """A byte order mark, line ends of two characters, letters written from right to left, and pictures."""
    made = [row | {"id": f"\u05d0-\U0001f642-{i}", "topic": f"\u0645 {i}"} for i, row in enumerate(rows())]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in made)
    content = load_set(folder(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert [pair.id for pair in content.pairs] == [row["id"] for row in made]
    assert [pair.topic for pair in content.pairs] == [row["topic"] for row in made]


def test_the_shipped_set_is_valid() -> None:
    content = load_set("embedded")
    assert content.treatments[:4] == ("T1", "T2", "T2b", "B1")
    assert min(Counter(pair.treatment for pair in content.pairs).values()) >= 300
    by_id = {pair.id: pair for pair in content.pairs}
    harmful = [pair for pair in content.pairs if pair.treatment == "T2"]
    assert [by_id[pair.twin].topic for pair in harmful] == [pair.topic for pair in harmful]
    assert len({pair.twin for pair in harmful}) == len(harmful)
    for treatment in content.treatments:
        topics = {(pair.topic, pair.split) for pair in content.pairs if pair.treatment == treatment}
        shares = Counter(split for _, split in topics)
        assert [round(shares[split] / len(topics), 1) for split in SPLITS] == [0.4, 0.3, 0.3]


WRONG = {
    "blank treated": ({"treated": "  "}, "line 3: 'treated' must be a non-empty string"),
    "number as topic": ({"topic": 7}, "line 3: 'topic' must be"),
    "unknown field": ({"topics": "x"}, "unknown field 'topics'; known are id"),
    "family not a string": ({"family": ["a"]}, "'family' must be a string"),
    "unknown split": ({"split": "train"}, "split 'train' is not one of discover, validate, test"),
    "same texts": ({"treated": "off 2"}, "line 3: control and treated are the same text"),
    "duplicate id": ({"id": "p0"}, "line 3: id 'p0' was used in line 1"),
    "spans not an object": ({"spans": [1, 2]}, "line 3: spans must be"),
    "spans of an unknown side": ({"spans": {"both": {}}}, "line 3: spans must be"),
    "spans without names": ({"spans": {"treated": [0, 1]}}, "must map a name to"),
    "span of an unknown name": ({"spans": {"treated": {"werb": [0, 1]}}}, "unknown span 'werb' of 'treated'; known are wrapper"),
    "span beyond the text": ({"spans": {"treated": {"verb": [0, 5]}}}, "span 'verb' of 'treated' must be"),
    "empty span": ({"spans": {"control": {"verb": [1, 1]}}}, "span 'verb' of 'control' must be"),
    "span of fractions": ({"spans": {"control": {"verb": [0, 1.5]}}}, "span 'verb' of 'control' must be"),
    "span of truth values": ({"spans": {"control": {"verb": [False, True]}}}, "span 'verb' of 'control' must be"),
    "three ends": ({"spans": {"control": {"verb": [0, 1, 2]}}}, "span 'verb' of 'control' must be"),
    "twin that is not there": ({"twin": "p99"}, "pair 'p2' names the twin 'p99'"),
    "twin of the wrong treatment": ({"twin": "p3"}, "a T2 pair names a T2b pair"),
    "twin of a benign pair": ({"treatment": "B1", "twin": "p3"}, "a T2 pair names a T2b pair"),
}  # fmt: skip


WRONG |= {f"no {name}": ({name: None}, f"line 3: '{name}' must be a non-empty string") for name in pairs.REQUIRED}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_pairs_are_named(tmp_path: Path, case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(InputError) as caught:
        load_set(folder(tmp_path, rows(**changes)))
    assert message in str(caught.value)
    assert "pairs.jsonl" in str(caught.value)


def test_broken_lines_are_named(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows()]
    lines[6] = lines[6][:-1]
    with pytest.raises(InputError, match="line 8: broken JSON"):
        load_set(folder(tmp_path, "\n" + "\n".join(lines)))
    with pytest.raises(InputError, match="line 1: expected a JSON object with id, treatment"):
        load_set(folder(tmp_path, '["p0"]\n'))


def test_encodings_and_line_ends(tmp_path: Path) -> None:
    """Unicode's own line ends do not end a line, and a byte order mark is no content."""
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows(treated="on\u2028here\u0085 öffne"))
    for mark in (b"", b"\xef\xbb\xbf"):
        content = load_set(folder(tmp_path, mark + text.encode()))
        assert len(content.pairs) == 12 and content.pairs[2].treated == "on\u2028here\u0085 öffne"
    with pytest.raises(InputError, match=r"pairs\.jsonl: not UTF-8 text \(byte \d+\); save"):
        load_set(folder(tmp_path, text.replace("\u2028", "").encode("latin-1")))


def test_fewer_than_ten_pairs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="9 pairs, at least 10 are needed"):
        load_set(folder(tmp_path, rows(9)))
    assert len(load_set(folder(tmp_path, rows(10))).pairs) == 10


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for missing in ("pairs.jsonl", "outcome.json"):
        (folder(tmp_path, rows()) / missing).unlink()
        with pytest.raises(InputError, match=f"no {missing}; a prompt set is a folder with"):
            load_set(tmp_path)
    with pytest.raises(InputError, match=r"no prompt set at '.*nowhere': expected a folder, .*embedded"):
        load_set(tmp_path / "nowhere")


OUTCOMES = {
    "broken": ('{"comply": ["yes"],\n "refuse": }', "outcome.json, line 2: broken JSON"),
    "a list": ([1], 'expected {"comply"'),
    "no refuse": ({"comply": ["yes"]}, "'refuse' must be a non-empty list of strings"),
    "empty": ({"comply": [], "refuse": ["no"]}, "'comply' must be a non-empty list of strings"),
    "blank string": ({"comply": [""], "refuse": ["no"]}, "'comply' must be a non-empty list of strings"),
    "a string for a list": ({"comply": "yes", "refuse": ["no"]}, "'comply' must be a non-empty list of strings"),
    "treatment without": ({"T1": OUTCOME}, "no outcome strings for treatment T2; give one object for all"),
    "treatment with a wrong one": ({"T2": ["yes", "no"]}, "outcome.json, T2: 'comply' must be"),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_wrong_outcomes_are_named(tmp_path: Path, case: str) -> None:
    outcome, message = OUTCOMES[case]
    with pytest.raises(InputError) as caught:
        load_set(folder(tmp_path, rows(), outcome))
    assert message in str(caught.value)


def test_one_outcome_for_all_or_one_each(tmp_path: Path) -> None:
    pairs = rows(treatment="B1")
    assert load_set(folder(tmp_path, pairs)).outcomes == dict.fromkeys(["B1", "T2"], (("yes",), ("no",)))
    each = {"T2": OUTCOME, "B1": {"comply": ["low", "deep"], "refuse": ["high"]}, "unused": 1}
    assert load_set(folder(tmp_path, pairs, each)).outcomes["B1"] == (("low", "deep"), ("high",))


def topics(n: int, given: dict[int, str] | None = None, repeats: int = 1) -> list[dict]:
    return [
        {"id": f"{i}.{k}", "treatment": "T1", "topic": f"topic {i}", "control": "a", "treated": "b"}
        | ({"split": given[i]} if given and i in given and k == 0 else {})
        for i in range(n)
        for k in range(repeats)
    ]


@pytest.mark.parametrize("n", [10, 100, 123])
def test_topics_are_split_40_30_30(tmp_path: Path, n: int) -> None:
    content = load_set(folder(tmp_path, topics(n, repeats=2)))
    splits = {pair.topic: pair.split for pair in content.pairs}
    assert all(pair.split == splits[pair.topic] for pair in content.pairs)
    counts = Counter(splits.values())
    for split, share in zip(SPLITS, (0.4, 0.3, 0.3), strict=True):
        assert abs(counts[split] - share * n) < 1


def test_splits_depend_on_nothing_but_the_topics(tmp_path: Path) -> None:
    first = {pair.topic: pair.split for pair in load_set(folder(tmp_path, topics(40))).pairs}
    again = {pair.topic: pair.split for pair in load_set(folder(tmp_path, topics(40, repeats=3)[::-1])).pairs}
    assert first == again
    # Not the order of the names either: a set written topic by topic would put one kind of topic into one split.
    in_order = [first[name] for name in sorted(first)]
    assert in_order != sorted(in_order, key=SPLITS.index)


def test_given_splits_stay_and_hold_for_the_whole_topic(tmp_path: Path) -> None:
    given = {0: "test", 1: "test", 2: "discover"}
    content = load_set(folder(tmp_path, topics(23, given, repeats=2)))
    splits = {pair.topic: pair.split for pair in content.pairs}
    assert [splits[f"topic {i}"] for i in range(3)] == ["test", "test", "discover"]
    assert all(pair.split == splits[pair.topic] for pair in content.pairs)
    assert Counter(splits[f"topic {i}"] for i in range(3, 23)) == {"discover": 8, "validate": 6, "test": 6}


def test_a_topic_in_two_splits(tmp_path: Path) -> None:
    pairs = topics(12, {3: "test"}, repeats=2)
    pairs[7]["split"] = "discover"
    with pytest.raises(
        InputError, match=r"topic 'topic 3' is in two splits \(test, discover\); a topic belongs to one"
    ):
        load_set(folder(tmp_path, pairs))


NOTES = [
    (None, False),
    ('{"sensitive": false}', False),
    ('{"sensitive": true}', True),
    ("{}", True),
    ("{", True),
    ("[]", True),
]


@pytest.mark.parametrize(("note", "hidden"), NOTES)
def test_a_set_is_sensitive_if_its_note_does_not_deny_it(tmp_path: Path, note: str | None, hidden: bool) -> None:
    place = folder(tmp_path, rows())
    if note is not None:
        (place / "set.json").write_text(note)
    pair = load_set(place).pairs[3]
    assert pair.sensitive is hidden
    assert ("on 3" in shown(pair, "treated")) is not hidden and (pair.id in shown(pair, "treated")) is hidden
