"""Outcome tokens of a prompt set made of public sets: the user's own where there are some, else what the model says first.

Either way they are shown with their joint probability, since Y1 sees nothing else of the model's behaviour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from helpers import first_words, outcome_file, prompts, public_list, tokens
from helpers.errors import InputError
from helpers.prompts import Pair
from helpers.store import write_json, write_text
from helpers.subject import load

CHECKED = ".checked"  # sha256 of the outcome.json last shown; hidden, so that it is no part of the prompts


def ensure(
    folder: Path, pairs: Sequence[Pair], wrapper_file: Path | None, *, model: str, device: str, dtype: str,
    report: Callable[[str], object],
) -> None:  # fmt: skip
    """Put outcome.json into the folder unless one is there: that beside the wrappers, else what is found from the model.

    Raises InputError for one that cannot be read, and where nothing is found from the model.
    """
    file = folder / public_list.OUTCOME
    own = public_list.own_outcome(wrapper_file)
    if file.is_file():
        return
    if own is not None:
        outcome_file.read(own, {pair.treatment for pair in pairs})
        write_text(own.read_text(encoding="utf-8-sig"), file)
        return
    found = first_words.find(load(model, device=device, dtype=dtype), _asked(pairs, "T1") + _asked(pairs, "T2"), file)
    report(found.note)
    write_json({"comply": list(found.comply), "refuse": list(found.refuse)}, file)
    _remember(file)


def check(folder: Path, *, model: str, device: str, dtype: str, report: Callable[[str], object]) -> None:
    """Show the joint probability of openers that the user wrote, once for each version of the file.

    Raises InputError where the file, or a string in it, cannot be used with this model.
    """
    file = folder / public_list.OUTCOME
    if (folder / CHECKED).is_file() and (folder / CHECKED).read_text() == _sha256(file):
        return
    content = prompts.load_set(folder)
    subject = load(model, device=device, dtype=dtype)
    assert subject.tokenizer is not None
    try:
        openers = tokens.openers(content, subject.tokenizer)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    for treatment in content.treatments:
        ids = [*openers[treatment].comply, *openers[treatment].refuse]
        texts = _asked(content.pairs, treatment)
        joint = first_words.joint(first_words.first_token_probabilities(subject, texts), ids)
        report(f"{treatment}: {first_words.described(*content.outcomes[treatment], joint)}")
    _remember(file)


def _asked(pairs: Sequence[Pair], treatment: str) -> list[str]:
    """Prompts of up to 64 pairs: both sides of T1, else the treated one."""
    chosen = [pair for pair in pairs if pair.treatment == treatment][: first_words.MAX_PROMPTS]
    return [text for pair in chosen for text in ([pair.control] * (treatment == "T1") + [pair.treated])]


def _remember(file: Path) -> None:
    write_text(_sha256(file), file.with_name(CHECKED))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
