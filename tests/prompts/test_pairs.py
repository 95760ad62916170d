"""Prompt sets: everything that a user's folder may get wrong, splits by topic, and fewer pairs that keep all of that."""

import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from companion.base.errors import InputError
from companion.prompts import pairs
from companion.prompts.pairs import SPLITS, Pair, load_set, shown, subsample

OUTCOME = {"comply": ["yes"], "refuse": ["no"]}
SHARES = dict(zip(SPLITS, (0.4, 0.3, 0.3), strict=True))


def rows(n: int = 12, **changes: object) -> list[dict]:
    """Valid T2 pairs of as many topics; `changes` go into the pair of line 3."""
    texts = [{"topic": f"topic {i}", "control": f"off {i}", "treated": f"on {i}"} for i in range(n)]
    made = [{"id": f"p{i}", "treatment": "T2"} | some for i, some in enumerate(texts)]
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
    content = load_set(folder(tmp_path, rows(spans={"treated": {"verb": [0, 2]}}, family="tale", split="test")))
    assert [pair.id for pair in content.pairs] == [f"p{i}" for i in range(12)]
    spans = {"treated": {"verb": (0, 2)}}
    assert content.pairs[2] == Pair("p2", "T2", "topic 2", "off 2", "on 2", "test", None, "tale", spans)
    assert content.outcomes == {"T2": (("yes",), ("no",))}
    both = (tmp_path / "pairs.jsonl").read_bytes() + (tmp_path / "outcome.json").read_bytes()
    assert content.sha256 == hashlib.sha256(both).hexdigest()


WRONG = {
    "blank treated": ({"treated": "  "}, "line 3: 'treated' must be a non-empty string"),
    "number as topic": ({"topic": 7}, "line 3: 'topic' must be"),
    "unknown field": ({"topics": "x"}, "unknown field 'topics'; known are id"),
    "family not a string": ({"family": ["a"]}, "'family' must be a string"),
    "unknown split": ({"split": "train"}, "split 'train' is not one of discover, validate, test"),
    "same texts": ({"treated": "off 2"}, "line 3: control and treated are the same text"),
    "duplicate id": ({"id": "p0"}, "line 3: id 'p0' was used in line 1"),
    "twin that is not there": ({"twin": "p99"}, "pair 'p2' names the twin 'p99'"),
    "twin of the wrong treatment": ({"twin": "p3"}, "a T2 pair names a T2b pair"),
    "twin of a benign pair": ({"treatment": "B1", "twin": "p3"}, "a T2 pair names a T2b pair"),
} | {f"no {name}": ({name: None}, f"line 3: '{name}' must be a non-empty string") for name in pairs.REQUIRED}  # fmt: skip
SPANS = (
    [1, 2], {"both": {"verb": [0, 2]}}, {"treated": [0, 1]}, {"treated": {"werb": [0, 1]}}, {"treated": {"verb": [0, 5]}},
    *({"control": {"verb": ends}} for ends in ([1, 1], [0, 1.5], [False, True], [0, 1, 2])),
)  # fmt: skip
WRONG |= {f"spans {spans}": ({"spans": spans}, "line 3: spans must be") for spans in SPANS}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_pairs_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=rf"pairs\.jsonl.*{re.escape(message)}"):
        load_set(folder(tmp_path, rows(**changes)))


def test_broken_lines_and_too_few_are_named(tmp_path: Path) -> None:
    lines = ["", *(json.dumps(row) for row in rows())]
    lines[7] = lines[7][:-1]
    for content, message in (
        ("\n".join(lines), "line 8: broken JSON"), ('{"id": "\\ud800"}\n', "line 1: broken JSON"),
        ('["p0"]\n', "line 1: expected a JSON object with id, treatment"),
        ("öffne".encode("latin-1"), r"pairs\.jsonl: not UTF-8 text \(byte \d+\); save"),
        (rows(9), "9 pairs, at least 10 are needed"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_set(folder(tmp_path, content))
    assert len(load_set(folder(tmp_path, rows(10))).pairs) == 10


def test_a_file_from_windows_with_names_in_any_script_is_read(tmp_path: Path) -> None:
    """A byte order mark is no content, Unicode's own line ends do not end a line; letters from right to left, and pictures."""
    made = [row | {"id": f"\u05d0-\U0001f642-{i}"} for i, row in enumerate(rows(treated="on\u2028here\u0085 öffne"))]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in made)
    for mark in (b"", b"\xef\xbb\xbf"):
        content = load_set(folder(tmp_path, mark + text.encode()))
        assert [(pair.id, pair.treated) for pair in content.pairs] == [(row["id"], row["treated"]) for row in made]


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for missing in ("pairs.jsonl", "outcome.json"):
        (folder(tmp_path, rows()) / missing).unlink()
        with pytest.raises(InputError, match=f"no {missing}; a prompt set is a folder with"):
            load_set(tmp_path)
    with pytest.raises(InputError, match=r"no prompt set at '.*nowhere': expected a folder, .*embedded"):
        load_set(tmp_path / "nowhere")


COMPLY, REFUSE = (f"T2: '{side}' must be a non-empty list of strings" for side in ("comply", "refuse"))
OUTCOMES = [
    ('{"comply": ["yes"],\n "refuse": }', "outcome.json, line 2: broken JSON"), ([1], 'expected {"comply"'),
    ({"comply": ["yes"]}, REFUSE), (OUTCOME | {"comply": []}, COMPLY), (OUTCOME | {"comply": [""]}, COMPLY),
    (OUTCOME | {"comply": "yes"}, f'{COMPLY}, or "rest"'), (OUTCOME | {"refuse": "rest"}, REFUSE),
    ({"T1": OUTCOME}, "no outcome strings for treatment T2; give one object for all"), ({"T2": ["yes", "no"]}, COMPLY),
]  # fmt: skip


@pytest.mark.parametrize(("outcome", "message"), OUTCOMES)
def test_wrong_outcomes_are_named(tmp_path: Path, outcome: object, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_set(folder(tmp_path, rows(), outcome))


def test_one_outcome_for_all_or_one_each(tmp_path: Path) -> None:
    pairs = rows(treatment="B1")
    assert load_set(folder(tmp_path, pairs)).outcomes == dict.fromkeys(["B1", "T2"], (("yes",), ("no",)))
    each = {"T2": OUTCOME | {"comply": "rest"}, "B1": {"comply": ["low", "deep"], "refuse": ["high"]}, "unused": 1}
    outcomes = load_set(folder(tmp_path, pairs, each)).outcomes
    assert outcomes == {"B1": (("low", "deep"), ("high",)), "T2": (None, ("no",))}


def topics(n: int, given: dict[int, str] | None = None, repeats: int = 2) -> list[dict]:
    """The first row of a topic has the split that is given for it."""
    row = {"treatment": "T1", "control": "a", "treated": "b"}
    made = [row | {"id": f"{i}.{k}", "topic": f"topic {i}"} for i in range(n) for k in range(repeats)]
    for i, split in (given or {}).items():
        made[i * repeats]["split"] = split
    return made


def split_of(place: Path) -> dict[str, str]:
    """The split of every topic, of which each has one."""
    pairs = {(pair.topic, pair.split) for pair in load_set(place).pairs}
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_topics_are_split_40_30_30_by_nothing_but_the_topics(tmp_path: Path) -> None:
    for n in (10, 100, 123):
        counts = Counter(split_of(folder(tmp_path, topics(n))).values())
        assert all(abs(counts[split] - share * n) < 1 for split, share in SHARES.items())
    first = split_of(folder(tmp_path, topics(40)))
    assert first == split_of(folder(tmp_path, topics(40, repeats=3)[::-1]))
    # Not the order of the names either: a set written topic by topic would put one kind of topic into one split.
    in_order = [first[name] for name in sorted(first)]
    assert in_order != sorted(in_order, key=SPLITS.index)


def test_given_splits_stay_and_hold_for_the_whole_topic(tmp_path: Path) -> None:
    splits = split_of(folder(tmp_path, topics(23, {0: "test", 1: "test", 2: "discover"})))
    assert [splits.pop(f"topic {i}") for i in range(3)] == ["test", "test", "discover"]
    assert Counter(splits.values()) == {"discover": 8, "validate": 6, "test": 6}
    pairs = topics(12, {3: "test"})
    pairs[7]["split"] = "discover"
    with pytest.raises(InputError, match=r"topic 'topic 3' is in two splits \(test, discover\)"):
        load_set(folder(tmp_path, pairs))


NOTES = {None: False, '{"sensitive": false}': False, '{"sensitive": true}': True, "{}": True, "{": True, "[]": True}


@pytest.mark.parametrize(("note", "hidden"), NOTES.items())
def test_a_set_is_sensitive_if_its_note_does_not_deny_it(tmp_path: Path, note: str | None, hidden: bool) -> None:
    place = folder(tmp_path, rows())
    if note is not None:
        (place / "set.json").write_text(note)
    pair = load_set(place).pairs[3]
    assert pair.sensitive is hidden
    assert ("on 3" in shown(pair, "treated")) is not hidden and (pair.id in shown(pair, "treated")) is hidden


# ---- fewer pairs ----


def paired(n_topics: int = 20, repeats: int = 3) -> list[Pair]:
    """T2 pairs and their twins, whose order in the file is the reverse; 40/30/30 of the topics in each split."""
    splits = [split for split, share in SHARES.items() for _ in range(round(share * n_topics))]
    made = []
    for treatment in ("T2", "T2b", "B1"):
        for topic, k in itertools.product(range(n_topics), range(repeats)):
            twin = f"T2b-{topic}.{k}" if treatment == "T2" else None
            made.append(Pair(f"{treatment}-{topic}.{k}", treatment, str(topic), "a", "b", splits[topic], twin))
    return made[: n_topics * repeats] + made[n_topics * repeats :][::-1]


@pytest.mark.parametrize("n", [10, 11, 17, 24, 33, 40, 57])
def test_limit_keeps_at_most_n_of_each_split(n: int) -> None:
    kept = subsample(paired(), n)
    for treatment in ("T2", "T2b", "B1"):
        splits = Counter(pair.split for pair in kept if pair.treatment == treatment)
        assert n - 3 < splits.total() <= n
        assert all(abs(splits[split] - share * n) < 1.001 for split, share in SHARES.items())


def test_limit_keeps_twins_topics_and_the_order_and_does_not_depend_on_it() -> None:
    pairs = paired()
    kept = subsample(pairs, 20)
    assert [pair for pair in pairs if pair in kept] == list(kept)
    harmful = [pair for pair in kept if pair.treatment == "T2"]
    assert {pair.twin for pair in harmful} == {pair.id for pair in kept if pair.treatment == "T2b"}
    assert len({pair.topic for pair in harmful}) == 20  # every topic once before any topic twice
    alone = [replace(pair, twin=None) for pair in pairs]
    assert Counter(pair.treatment for pair in subsample(alone, 20)) == {"T2": 20, "T2b": 20, "B1": 20}
    assert {pair.id for pair in subsample(pairs, 23)} == {pair.id for pair in subsample(pairs[::-1], 23)}
    assert subsample(pairs, 0) == subsample(pairs, 10_000) == tuple(pairs)


def test_limit_keeps_the_kinds_of_the_shipped_set() -> None:
    pairs = [pair for pair in load_set("embedded").pairs if pair.treatment == "T1"]
    kept = subsample(pairs, 120)
    assert len({pair.topic for pair in kept}) == 120
    for split in SPLITS:
        whole, few = (Counter(p.family for p in some if p.split == split) for some in (pairs, kept))
        assert all(abs(few[kind] / few.total() - whole[kind] / whole.total()) < 0.2 for kind in whole)
