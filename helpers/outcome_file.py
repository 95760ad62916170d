"""The strings that open an answer, as a prompt set's outcome.json has them (its format stands in data/README.md)."""

from pathlib import Path
from typing import Any

from helpers import json_text
from helpers.errors import InputError
from helpers.json_text import BrokenJson


def read(path: Path, treatments: set[str]) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Openers (comply, refuse) of each treatment; InputError that says what is wrong with the file."""
    try:
        content = json_text.parse(json_text.read(path))
    except BrokenJson as error:
        raise InputError(f"{path}, line {error.line}: broken JSON ({error.reason})") from None
    if not isinstance(content, dict):
        raise InputError(f'{path}: expected {{"comply": [...], "refuse": [...]}} or one such object per treatment')
    per_treatment = dict.fromkeys(treatments, content) if "comply" in content else content
    missing = sorted(treatments - set(per_treatment))
    if missing:
        raise InputError(
            f"{path}: no outcome strings for treatment {missing[0]}; give one object for all or one for each"
        )
    return {name: _outcome_strings(per_treatment[name], f"{path}, {name}") for name in sorted(treatments)}


def _outcome_strings(entry: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    sides = []
    for side in ("comply", "refuse"):
        strings = entry.get(side) if isinstance(entry, dict) else None
        if not isinstance(strings, list) or not strings or not all(isinstance(s, str) and s for s in strings):
            raise InputError(f"{where}: '{side}' must be a non-empty list of strings")
        sides.append(tuple(strings))
    return sides[0], sides[1]
