"""A prompt set made of public sets, for one model: pairs, outcome and a note, written to the user's cache and never here.

T1 goes from a harmless to a harmful request; T2 and T2b put the user's own wrappers around the same requests. An
interchange needs pairs of equal token length, so how many survive is counted and said.
"""

from __future__ import annotations

import json
import random
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from helpers import first_words, json_text, preflight, public_list, public_sets, tokens, wrappers
from helpers.errors import InputError
from helpers.prompts import Pair, read_outcomes
from helpers.public_sets import Request, Rows
from helpers.store import read_json, write_json, write_text
from helpers.subject import load, load_tokenizer
from helpers.wrappers import Wrapper

LEFT_OUT = "left out: "
FEW = 0.5  # of the pairs: below it the user is told what else can be done


def ensure(
    folder: Path, name: str, model: str, wrapper_file: Path | None, *, device: str, dtype: str,
    report: Callable[[str], object] = print,
) -> None:  # fmt: skip
    """Make the prompt set in `folder` unless it is there: what a user changed in it since, such as outcome.json, stays.

    Sets that cannot be loaded are named and left out; InputError if none can.
    """
    if (folder / "outcome.json").is_file():
        report(f"prompt set: {folder} (remove this folder to make it anew)")
        note = read_json(folder / "set.json") if (folder / "set.json").is_file() else {}
        before = note.get("notes", []) if isinstance(note, dict) else []
        for line in before:
            report(f"  when it was made: {line}")
        retry(before, folder, report)
        return
    tokenizer = load_tokenizer(preflight.model_folder(model))
    if tokenizer is None:
        raise InputError(f"{model} has no tokenizer: save it into the model's folder")
    templates = wrappers.read(wrapper_file) if wrapper_file else ()
    notes: list[str] = []

    def said(line: str) -> None:
        notes.append(line)
        report(line)

    made, hashes = collect(name, tokenizer, templates, said)
    for line in survival(made, tokenizer):
        report(line)
    if not templates:
        report(f"C1, C2, C4 to C7: {wrappers.NONE}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text("".join(json.dumps(_row(pair)) + "\n" for pair in made), folder / "pairs.jsonl")
    note = {"sensitive": True, "sets": name, "model": model, "notes": notes, "rows": hashes}
    write_json(note, folder / "set.json")
    write_json(_outcome(made, model, wrapper_file, device, dtype, report), folder / "outcome.json")
    report(f"prompt set: {folder} (texts stay there; edit outcome.json in it if its words do not fit)")
    retry(notes, folder, report)


def retry(notes: Sequence[str], folder: Path, report: Callable[[str], object]) -> None:
    """Say how to try sets again that could not be loaded; by itself no run does: its prompts would change unasked."""
    if any(line.startswith(LEFT_OUT) for line in notes):
        report(f"to try the sets again that were left out: rm -r {shlex.quote(str(folder))}, then the same command")


def collect(
    name: str, tokenizer: PreTrainedTokenizerBase, templates: Sequence[Wrapper], report: Callable[[str], object]
) -> tuple[list[Pair], dict[str, str]]:
    """The pairs of every set that can be loaded, and the sha256 of each row by its id.

    A request that stands in several rows or sets makes one topic, in the first; the others are counted and left out.
    """
    made: list[Pair] = []
    hashes: dict[str, str] = {}
    seen: set[str] = set()
    benign: dict[int, list[Request]] | None = None
    for part in public_list.parse(name) or ():
        try:
            rows = once(public_sets.load_rows(part), seen, part, report)
            is_matched = public_list.matched(part)
            if is_matched:
                benign = by_length(_benign(), tokenizer) if benign is None else benign
                rows = with_partners(rows, benign, tokenizer, seen)
        except InputError as error:
            report(f"{LEFT_OUT}{error}")
            continue
        if rows.n_left:
            report(f"{part}: {rows.n_left} harmful rows have no harmless partner of their category and are left out")
        partners = rows if is_matched else grouped(rows, tokenizer, part, report)
        made += [pair for one in _requests(partners) for pair in _t1(*one)]
        made += [pair for one in _requests(rows) for pair in wrapped(*one, templates, twins=correspond(part))]
        hashes |= {one.id: one.sha256 for both in _requests(rows) for one in both}
    if not made:
        raise InputError(f"--prompts {name}: none of these sets could be loaded, or no request has a partner")
    return made, hashes


def once(rows: Rows, seen: set[str], name: str, report: Callable[[str], object]) -> Rows:
    """The rows whose requests no earlier row or set had (`public_sets.unseen`); says how many were left out."""
    kept = public_sets.unseen(rows, seen)
    if n := len(rows.harmful) - len(kept.harmful):
        report(
            f"{name}: {n} rows have a request that an earlier row or set has too (but for case, spacing or closing "
            "punctuation) and are left out, since topics must be independent"
        )
    return kept


def correspond(part: str) -> bool:
    """Whether a set's harmless row is the twin of its harmful one: row by row, with the check of `public_sets.by_row`.

    The i-th of a category is a partner for T1; nothing says that the two ask for the same thing, so it is no twin.
    """
    return not public_list.matched(part) and public_list.SETS[part].paired == "row"


def grouped(rows: Rows, tokenizer: PreTrainedTokenizerBase, name: str, report: Callable[[str], object]) -> Rows:
    """The same rows where enough of them have equal length; else the two groups are interchanged.

    Then every harmful request takes activations of a harmless one drawn from the set's own group of that length, instead
    of its row's: effects are those of the groups, and include all in which their members differ.
    """
    own = sum(_equally_long(*both, tokenizer) for both in _requests(rows))
    if own >= FEW * len(rows.harmful):
        return rows
    harmless = by_length([one for one in rows.harmless if one is not None], tokenizer)
    drawn = with_partners(rows, harmless, tokenizer)
    n_drawn = len(_requests(drawn))
    if n_drawn <= own:
        return rows
    report(
        f"{name}: {own} of {len(rows.harmful)} rows have the length of their own partner, so groups are interchanged: T1 "
        f"takes a partner of equal length from all harmless rows of the set ({n_drawn} pairs)"
    )
    return drawn


def _equally_long(one: Request, other: Request, tokenizer: PreTrainedTokenizerBase) -> bool:
    return len(tokens.encode(tokenizer, one.text)[0]) == len(tokens.encode(tokenizer, other.text)[0])


def _t1(harmful: Request, harmless: Request) -> list[Pair]:
    return [Pair(f"{harmful.id}-t1", "T1", harmful.id, harmless.text, harmful.text, family=harmful.category)]


def wrapped(harmful: Request, harmless: Request, templates: Sequence[Wrapper], *, twins: bool) -> list[Pair]:
    """T2 of a harmful request in every wrapper, and T2b on its partner if that corresponds."""
    made = []
    for wrapper in templates:
        own, other = f"{harmful.id}-t2-{wrapper.family}", f"{harmful.id}-t2b-{wrapper.family}"
        twin = other if twins else None
        made.append(Pair(own, "T2", harmful.id, *wrapper.around(harmful.text), twin=twin, family=wrapper.family))
        if twins:
            made.append(Pair(other, "T2b", harmful.id, *wrapper.around(harmless.text), family=wrapper.family))
    return made


def by_length(requests: Iterable[Request], tokenizer: PreTrainedTokenizerBase) -> dict[int, list[Request]]:
    """Requests by the length of their rendered prompt in this model's tokens, each list in a fixed random order."""
    found: dict[int, list[Request]] = {}
    for request in requests:
        found.setdefault(len(tokens.encode(tokenizer, request.text)[0]), []).append(request)
    for length in found:
        random.Random(length).shuffle(found[length])
    return found


def with_partners(
    rows: Rows, benign: dict[int, list[Request]], tokenizer: PreTrainedTokenizerBase, seen: set[str] | None = None
) -> Rows:
    """Each harmful request with a harmless one of equal token length, none used twice; None where none is left.

    With `seen` no partner has a text that another topic has (`Request.same`), and it is added.
    """
    found = []
    for request in rows.harmful:
        waiting = benign.get(len(tokens.encode(tokenizer, request.text)[0]), [])
        while waiting and seen is not None and waiting[-1].same in seen:
            waiting.pop()
        found.append(waiting.pop() if waiting else None)
        if seen is not None and found[-1] is not None:
            seen.add(found[-1].same)
    return Rows(rows.harmful, tuple(found))


def survival(made: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """How many pairs of each treatment have equal token length, with what to do where few do."""
    lines = []
    usable = Counter(pair.treatment for pair in made if tokens.token_pair(pair, tokenizer)[0] is not None)
    for treatment, n in sorted(Counter(pair.treatment for pair in made).items()):
        line = f"{treatment}: {usable[treatment]} of {n} pairs have equal token length and can be interchanged"
        if usable[treatment] < FEW * n:
            line += (
                f"; few: take harmless partners by length (+{public_list.BENIGN}), or sets with more rows"
                if treatment == "T1"
                else "; few: lengthen the neutral template until both have equally many tokens"
            )
        lines.append(line)
    return lines


def _benign() -> tuple[Request, ...]:
    public = public_list.SETS[public_list.BENIGN]
    assert public.harmless is not None
    return public_sets.read(public_list.BENIGN, public, public.harmless)


def _requests(rows: Rows) -> list[tuple[Request, Request]]:
    both = zip(rows.harmful, rows.harmless, strict=True)
    return [(one, other) for one, other in both if other is not None and one.text != other.text]


def _outcome(
    made: Sequence[Pair],
    model: str,
    wrapper_file: Path | None,
    device: str,
    dtype: str,
    report: Callable[[str], object],
) -> Any:
    """The user's own outcome.json beside the wrappers if there is one, else what the model says first."""
    own = wrapper_file.parent / "outcome.json" if wrapper_file else None
    if own is not None and own.is_file():
        read_outcomes(own, {pair.treatment for pair in made})
        return json_text.parse(own.read_text(encoding="utf-8"))
    first = [pair for pair in made if pair.treatment == "T1"][: first_words.MAX_PROMPTS]
    wrapped = [pair.treated for pair in made if pair.treatment == "T2"][: first_words.MAX_PROMPTS]
    texts = [text for pair in first for text in (pair.control, pair.treated)] + wrapped
    found = first_words.find(load(model, device=device, dtype=dtype), texts)
    report(found.note)
    return {"comply": list(found.comply), "refuse": list(found.refuse)}


def _row(pair: Pair) -> dict[str, Any]:
    row = {name: getattr(pair, name) for name in ("id", "treatment", "topic", "control", "treated", "family")}
    return row | ({"twin": pair.twin} if pair.twin else {})
