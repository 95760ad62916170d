"""A prompt set made of public sets, for one model: pairs, outcome and a note, written to the user's cache and never here.

T1 goes from a harmless to a harmful request (`helpers.public_partners`); T2 and T2b put the user's own wrappers around
the same requests, and need no partner of equal length.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from helpers import preflight, public_list, public_outcome, public_partners, public_sets, wrappers
from helpers.errors import InputError
from helpers.prompts import Pair
from helpers.public_sets import Request, Rows
from helpers.store import read_json, write_json, write_text
from helpers.subject import load_tokenizer
from helpers.wrappers import Wrapper

LEFT_OUT = "left out: "


@dataclass(frozen=True)
class Collected:
    """The pairs of all sets, the sha256 of each row by its id, and how many harmful requests there are."""

    pairs: tuple[Pair, ...]
    hashes: Mapping[str, str]
    n_requests: int


def ensure(
    folder: Path, name: str, model: str, wrapper_file: Path | None, *, device: str, dtype: str,
    report: Callable[[str], object] = print,
) -> None:  # fmt: skip
    """Make the prompt set in `folder` unless it is there: what a user changed in it since, such as outcome.json, stays.

    Sets that cannot be loaded are named and left out; InputError if none can.
    """
    if public_list.is_made(folder):
        report(f"prompt set: {folder} (remove this folder to make it anew)")
        note = read_json(folder / "set.json")
        notes = note.get("notes", []) if isinstance(note, dict) else []
        for line in notes:
            report(f"  when it was made: {line}")
    else:
        notes = _make(folder, name, model, wrapper_file, device, dtype, report)
        report(f"prompt set: {folder} (texts stay there; edit outcome.json in it if its words do not fit)")
    public_outcome.check(folder, model=model, device=device, dtype=dtype, report=report)
    retry(notes, folder, report)


def _make(
    folder: Path, name: str, model: str, wrapper_file: Path | None, device: str, dtype: str,
    report: Callable[[str], object],
) -> list[str]:  # fmt: skip
    """Write the folder's files, outcome.json last; returns what a later run should say again."""
    tokenizer = load_tokenizer(preflight.model_folder(model))
    if tokenizer is None:
        raise InputError(f"{model} has no tokenizer: save it into the model's folder")
    templates = wrappers.read(wrapper_file) if wrapper_file else ()
    notes: list[str] = []

    def said(line: str) -> None:
        notes.append(line)
        report(line)

    made = collect(name, tokenizer, templates, said)
    for line in public_partners.survival(made.pairs, made.n_requests, tokenizer):
        report(line)
    if not templates:
        report(f"C1, C2, C4 to C7: {wrappers.NONE}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    note = {"sensitive": True, "sets": name, "model": model, "notes": notes, "rows": made.hashes}
    write_json(note, folder / "set.json")
    write_text("".join(json.dumps(_row(pair)) + "\n" for pair in made.pairs), folder / "pairs.jsonl")
    public_outcome.ensure(folder, made.pairs, wrapper_file, model=model, device=device, dtype=dtype, report=report)
    return notes


def retry(notes: Sequence[str], folder: Path, report: Callable[[str], object]) -> None:
    """Say how to try sets again that could not be loaded; by itself no run does: its prompts would change unasked."""
    if any(line.startswith(LEFT_OUT) for line in notes):
        report(f"to try the sets again that were left out: rm -r {shlex.quote(str(folder))}, then the same command")


def collect(
    name: str, tokenizer: PreTrainedTokenizerBase, templates: Sequence[Wrapper], report: Callable[[str], object]
) -> Collected:
    """The pairs of every set that can be loaded.

    A request that stands in several rows or sets makes one topic, in the first; the others are counted and left out.
    """
    made: list[Pair] = []
    hashes: dict[str, str] = {}
    n_requests = 0
    seen: set[str] = set()
    benign: dict[int, list[Request]] = {}
    for part in public_list.parse(name) or ():
        is_matched = public_list.matched(part)
        try:
            if is_matched and not benign:  # before the rows: those of a set left out are not `seen`
                benign = public_partners.by_length(_benign(part), tokenizer)
            rows = once(public_sets.load_rows(part), seen, part, report)
        except InputError as error:
            report(f"{LEFT_OUT}{error}")
            continue
        if is_matched:
            rows = partners = public_partners.with_partners(rows, benign, tokenizer, seen)
        else:
            if n := rows.harmless.count(None):
                report(f"{part}: {n} of {len(rows.harmful)} harmful rows have no harmless partner of their category")
            partners = public_partners.grouped(rows, tokenizer, part, report)
        made += [pair for one in public_partners.pairs(partners) for pair in _t1(*one)]
        twins = dict(public_partners.pairs(rows)) if correspond(part) else {}
        made += [pair for one in rows.harmful for pair in wrapped(one, twins.get(one), templates)]
        hashes |= {one.id: one.sha256 for one in (*rows.harmful, *rows.harmless) if one}
        n_requests += len(rows.harmful)
    if not made:
        raise InputError(
            f"--prompts {name}: none of these sets could be loaded, or no request has a partner: "
            "mend what the lines above say, or name others"
        )
    return Collected(tuple(made), hashes, n_requests)


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


def _t1(harmful: Request, harmless: Request) -> list[Pair]:
    return [Pair(f"{harmful.id}-t1", "T1", harmful.id, harmless.text, harmful.text, family=harmful.category)]


def wrapped(harmful: Request, twin: Request | None, templates: Sequence[Wrapper]) -> list[Pair]:
    """T2 of a harmful request in every wrapper, and T2b on its twin if it has one."""
    made = []
    for wrapper in templates:
        own, other = f"{harmful.id}-t2-{wrapper.family}", f"{harmful.id}-t2b-{wrapper.family}"
        around = wrapper.around(harmful.text)
        made.append(Pair(own, "T2", harmful.id, *around, twin=other if twin else None, family=wrapper.family))
        if twin:
            made.append(Pair(other, "T2b", harmful.id, *wrapper.around(twin.text), family=wrapper.family))
    return made


def _benign(part: str) -> tuple[Request, ...]:
    public = public_list.SETS[public_list.BENIGN]
    assert public.harmless is not None
    try:
        return public_sets.read(public_list.BENIGN, public, public.harmless)
    except InputError as error:
        raise InputError(f"{part}, which takes harmless partners from {public_list.BENIGN}: {error}") from error


def _row(pair: Pair) -> dict[str, Any]:
    row = {name: getattr(pair, name) for name in ("id", "treatment", "topic", "control", "treated", "family")}
    return row | ({"twin": pair.twin} if pair.twin else {})
