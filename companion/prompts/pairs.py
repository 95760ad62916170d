"""Prompt sets: reading a folder of matched pairs and their answers' openers, and checking all that later steps rest on.

A prompt set is a folder with `pairs.jsonl` and `outcome.json` (their format stands in `data/README.md`). Texts are user
turns; `companion.prompts.tokens` puts the model's chat template around them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from companion.base import files
from companion.base.errors import InputError
from companion.base.files import BrokenJson
from companion.base.folders import names, prompts_folder
from companion.base.paths import PROMPTS

SPLITS = ("discover", "validate", "test")
SPLIT_SHARES = (0.4, 0.3, 0.3)
MIN_PAIRS = 10
REQUIRED = ("id", "treatment", "topic", "control", "treated")
OPTIONAL = ("twin", "family", "split", "spans")
TREATMENT = re.compile(r"T1|T2|T2b|B[1-9]\d*")
SPAN_NAMES = ("wrapper", "distractor", "verb", "object")
REST = "rest"  # in outcome.json: every first token that opens no refusal
# Strings that open an answer which complies (None: `REST`), and one which refuses.
Outcome = tuple[tuple[str, ...] | None, tuple[str, ...]]


@dataclass(frozen=True)
class Pair:
    """One matched pair of user turns: `control` has the treatment off, `treated` has it on.

    `spans` holds named character ranges, which become position groups: `{"treated": {"verb": (12, 17)}}`.
    """

    id: str
    treatment: str
    topic: str
    control: str
    treated: str
    split: str = ""
    twin: str | None = None
    family: str = ""
    spans: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    sensitive: bool = False


@dataclass(frozen=True)
class PromptSet:
    """A checked folder of pairs; `outcomes` maps a treatment to its openers."""

    name: str
    pairs: tuple[Pair, ...]
    outcomes: Mapping[str, Outcome]
    sha256: str

    @property
    def treatments(self) -> tuple[str, ...]:
        """Treatments in the order of METHOD: T1, T2, T2b, then the benign B1, B2, ..."""
        return tuple(sorted({pair.treatment for pair in self.pairs}, key=treatment_order))


def treatment_order(name: str) -> tuple[int, str]:
    """Sort key: harm treatments first, benign ones after.

    >>> sorted(["B2", "T2b", "B1", "T1", "T2"], key=treatment_order)
    ['T1', 'T2', 'T2b', 'B1', 'B2']
    """
    return (0 if name.startswith("T") else 1, name)


def shown(pair: Pair, side: str) -> str:
    """One text of a pair for a reader's eyes, `side` being "control" or "treated"; of a sensitive set its id and hash.

    >>> shown(Pair("p7", "T1", "t", "request 7", "request 8", sensitive=True), "control")
    '[hidden: p7, sha256 1b95ed56bb99]'
    """
    text = str(getattr(pair, side))
    return f"[hidden: {pair.id}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}]" if pair.sensitive else text


def load_set(where: str | Path) -> PromptSet:
    """Read and check a prompt set, by its name under `data/prompts/` or as a folder; `InputError` names file and line."""
    folder = prompts_folder(str(where))
    if not folder.is_dir():
        known = ", ".join(names(PROMPTS))
        raise InputError(f"no prompt set at '{where}': expected a folder, or one of the shipped names ({known})")
    texts, openers = folder / "pairs.jsonl", folder / "outcome.json"
    for path in (texts, openers):
        if not path.is_file():
            raise InputError(f"{folder}: no {path.name}; a prompt set is a folder with pairs.jsonl and outcome.json")
    pairs = _read_pairs(texts)
    _check_twins(pairs, texts)
    splits, is_sensitive = _splits(pairs, texts), _is_sensitive(folder / "set.json")
    pairs = [replace(pair, split=splits[pair.topic], sensitive=is_sensitive) for pair in pairs]
    outcomes = _read_outcome(openers, {pair.treatment for pair in pairs})
    sha256 = hashlib.sha256(texts.read_bytes() + openers.read_bytes()).hexdigest()
    return PromptSet(folder.name, tuple(pairs), outcomes, sha256)


def _read_outcome(path: Path, treatments: set[str]) -> dict[str, Outcome]:
    try:
        content = files.parse_json(files.read_utf8(path))
    except BrokenJson as error:
        raise InputError(f"{path}, line {error.line}: broken JSON ({error.reason})") from None
    if not isinstance(content, dict):
        raise InputError(f'{path}: expected {{"comply": [...], "refuse": [...]}} or one such object per treatment')
    per_treatment = dict.fromkeys(treatments, content) if "comply" in content else content
    if missing := sorted(treatments - set(per_treatment)):
        what = f"no outcome strings for treatment {missing[0]}"
        raise InputError(f"{path}: {what}; give one object for all or one for each")
    return {name: _outcome(per_treatment[name], f"{path}, {name}") for name in sorted(treatments)}


def _outcome(entry: Any, where: str) -> Outcome:
    """What complies may be named as `REST`; what refuses is always a list."""
    found: list[tuple[str, ...] | None] = []
    for side, otherwise in (("comply", f', or "{REST}"'), ("refuse", "")):
        strings = entry.get(side) if isinstance(entry, dict) else None
        if isinstance(strings, list) and strings and all(isinstance(one, str) and one for one in strings):
            found.append(tuple(strings))
        elif otherwise and strings == REST:
            found.append(None)
        else:
            raise InputError(f"{where}: '{side}' must be a non-empty list of strings{otherwise}")
    return found[0], found[1] or ()


def _is_sensitive(note: Path) -> bool:
    """A set whose own note cannot be read counts as sensitive."""
    try:
        return note.is_file() and bool(files.parse_json(files.read_utf8(note)).get("sensitive", True))
    except (BrokenJson, AttributeError):
        return True


def _read_pairs(path: Path) -> list[Pair]:
    found: dict[str, tuple[int, Pair]] = {}  # line and pair, by id
    # Not splitlines: JSON allows Unicode's own line ends within a string.
    for number, line in enumerate(files.read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            pair = _pair(files.parse_json(line), where)
        except BrokenJson as error:
            raise InputError(f"{where}: broken JSON ({error.reason}); one object a line is expected") from None
        if pair.id in found:
            raise InputError(f"{where}: id '{pair.id}' was used in line {found[pair.id][0]}; ids must be unique")
        found[pair.id] = number, pair
    if len(found) < MIN_PAIRS:
        raise InputError(f"{path}: {len(found)} pairs, at least {MIN_PAIRS} are needed")
    return [pair for _, pair in found.values()]


def _pair(row: Any, where: str) -> Pair:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object with {', '.join(REQUIRED)}")
    if unknown := sorted(set(row) - {*REQUIRED, *OPTIONAL}):
        raise InputError(f"{where}: unknown field '{unknown[0]}'; known are {', '.join(REQUIRED + OPTIONAL)}")
    for name in REQUIRED:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InputError(f"{where}: '{name}' must be a non-empty string")
    for name in ("twin", "family", "split"):
        if row.get(name) is not None and not isinstance(row[name], str):
            raise InputError(f"{where}: '{name}' must be a string")
    if not TREATMENT.fullmatch(row["treatment"]):
        raise InputError(f"{where}: treatment {row['treatment']!r:.40} is not one of T1, T2, T2b, B1, B2, ...")
    if (split := row.get("split") or "") not in ("", *SPLITS):
        raise InputError(f"{where}: split '{split}' is not one of {', '.join(SPLITS)}")
    if row["control"] == row["treated"]:
        raise InputError(f"{where}: control and treated are the same text")
    required, family = {name: row[name] for name in REQUIRED}, row.get("family") or ""
    return Pair(**required, split=split, twin=row.get("twin"), family=family, spans=_spans(row, where))


def _spans(row: Mapping[str, Any], where: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Check `spans`: {"control": {name: [start, end]}, "treated": {...}} in characters of the two texts."""

    def is_span(side: str, name: str, ends: Any) -> bool:
        is_range = isinstance(ends, list) and len(ends) == 2 and all(type(end) is int for end in ends)
        return name in SPAN_NAMES and is_range and 0 <= ends[0] < ends[1] <= len(row[side])

    spans = row.get("spans") or {}
    is_nested = isinstance(spans, dict) and all(isinstance(named, dict) for named in spans.values())
    is_nested = is_nested and set(spans) <= {"control", "treated"}
    if not is_nested or not all(is_span(side, *one) for side, named in spans.items() for one in named.items()):
        form = f'{{"control": {{NAME: [start, end]}}, "treated": {{...}}}}, NAME one of {", ".join(SPAN_NAMES)}'
        raise InputError(f"{where}: spans must be {form}, within the text")
    return {side: {name: (ends[0], ends[1]) for name, ends in named.items()} for side, named in spans.items()}


def _check_twins(pairs: Sequence[Pair], path: Path) -> None:
    by_id = {pair.id: pair for pair in pairs}
    for pair in pairs:
        if pair.twin is None:
            continue
        twin = by_id.get(pair.twin)
        if pair.treatment != "T2" or twin is None or twin.treatment != "T2b":
            what = f"pair '{pair.id}' names the twin '{pair.twin}'"
            raise InputError(f"{path}: {what}; a T2 pair names a T2b pair of this file")
        if twin.topic != pair.topic:  # or one of them could be chosen on and the other tested
            topics = f"'{pair.topic}', its twin '{pair.twin}' of '{twin.topic}'"
            raise InputError(f"{path}: pair '{pair.id}' is of topic {topics}; twins share a topic")


def _splits(pairs: Sequence[Pair], path: Path) -> dict[str, str]:
    """The split of each topic: the given one, or 40/30/30 over the other topics in the order of a hash."""
    given: dict[str, str] = {}
    for pair in pairs:
        if pair.split and given.setdefault(pair.topic, pair.split) != pair.split:
            both = f"{given[pair.topic]}, {pair.split}"
            raise InputError(f"{path}: topic '{pair.topic}' is in two splits ({both}); a topic belongs to one")
    free = {pair.topic for pair in pairs} - set(given)
    ordered = sorted(free, key=lambda topic: hashlib.sha256(topic.encode()).hexdigest())
    ranks = np.searchsorted(np.cumsum(SPLIT_SHARES) * len(ordered), np.arange(len(ordered)) + 0.5)
    return given | {topic: SPLITS[rank] for topic, rank in zip(ordered, ranks, strict=True)}


# ---- fewer pairs ----


def subsample(pairs: Sequence[Pair], n: int) -> tuple[Pair, ...]:
    """At most `n` pairs a treatment (0: all), in the order of the file, split 40/30/30, twins kept with their pairs."""
    if n == 0:
        return tuple(pairs)
    cuts = np.rint(np.cumsum((0, *SPLIT_SHARES)) * n).astype(int)
    quota = dict(zip(SPLITS, np.diff(cuts).tolist(), strict=True))
    chosen = {name: _first(pairs, quota, name) for name in {pair.treatment for pair in pairs}}
    if twins := {pair.twin for pair in chosen.get("T2", []) if pair.twin}:
        chosen["T2b"] = [pair for pair in pairs if pair.id in twins]
    kept = {pair.id for some in chosen.values() for pair in some}
    return tuple(pair for pair in pairs if pair.id in kept)


def _first(pairs: Sequence[Pair], quota: Mapping[str, int], treatment: str) -> list[Pair]:
    """Pairs of each split: one topic after another, and of each topic's pairs one of the family seen least so far.

    Ties are broken by a hash of the id, since files often list one kind of pair first.
    """
    chosen: list[Pair] = []
    for split, size in quota.items():
        members = [pair for pair in pairs if pair.treatment == treatment and pair.split == split]
        waiting: dict[str, list[Pair]] = {}
        for pair in sorted(members, key=lambda pair: hashlib.sha256(pair.id.encode()).hexdigest()):
            waiting.setdefault(pair.topic, []).append(pair)
        families: Counter[str] = Counter()
        while waiting and families.total() < size:
            for topic in list(waiting)[: size - families.total()]:
                pair = min(waiting[topic], key=lambda one: families[one.family])
                families[pair.family] += 1
                chosen.append(pair)
                waiting[topic].remove(pair)
            waiting = {topic: left for topic, left in waiting.items() if left}
    return chosen
