"""Wrappers that a user brings: pairs of templates, neutral and jailbreak, each with one slot for the request.

None come with this repository. A file is JSON lines: `{"family": "...", "neutral": "... {request} ...", "jailbreak":
"... {request} ..."}`. The two of a line must have equally many tokens, since an interchange needs equal lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from companion.base import files
from companion.base.errors import InputError
from companion.base.files import BrokenJson

SLOT = "{request}"
FILE = "wrappers.jsonl"
FIELDS = ("family", "neutral", "jailbreak")


@dataclass(frozen=True)
class Wrapper:
    """One neutral and one jailbreak template; `family` names the kind of jailbreak."""

    family: str
    neutral: str
    jailbreak: str

    def around(self, request: str) -> tuple[str, str]:
        """The request in both templates.

        >>> Wrapper("f", "Please: {request}", "Now: {request}").around("request {17}")
        ('Please: request {17}', 'Now: request {17}')
        """
        return self.neutral.replace(SLOT, request), self.jailbreak.replace(SLOT, request)


def wrappers_file(place: Path) -> Path:
    """The file of a `--wrappers` flag: itself, or `wrappers.jsonl` in the folder named."""
    file = place / FILE if place.is_dir() else place
    if not file.is_file():
        raise InputError(f"--wrappers {place}: expected a file of JSON lines, or a folder with {FILE}")
    return file


def read_wrappers(place: Path) -> tuple[Wrapper, ...]:
    """All wrappers of a file or folder; `InputError` names file and line of the first mistake, and shows no template."""
    file = wrappers_file(place)
    lines = files.read_utf8(file).split("\n")
    found = tuple(_wrapper(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
    if not found:
        raise InputError(f"{file}: no wrappers; one JSON object a line is expected, with {', '.join(FIELDS)}")
    families = [wrapper.family for wrapper in found]
    if len(set(families)) < len(families):
        raise InputError(f"{file}: two wrappers are of one family; give each a name of its own")
    return found


def _wrapper(line: str, where: str) -> Wrapper:
    try:
        row = files.parse_json(line)
    except BrokenJson as error:
        raise InputError(f"{where}: broken JSON ({error.reason})") from None
    if not isinstance(row, dict) or set(row) != set(FIELDS) or not all(isinstance(row[name], str) for name in FIELDS):
        raise InputError(f"{where}: expected an object with the strings {', '.join(FIELDS)}, and nothing else")
    for name in ("neutral", "jailbreak"):
        if row[name].count(SLOT) != 1:
            times = row[name].count(SLOT)
            raise InputError(f"{where}: '{name}' must hold the slot {SLOT} exactly once, not {times} times")
    if row["neutral"] == row["jailbreak"] or not row["family"].strip():
        raise InputError(f"{where}: 'family' must be named, and the two templates must differ")
    return Wrapper(*(row[name] for name in FIELDS))
