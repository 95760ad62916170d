"""A user's wrappers: every mistake is named by file and line, and no template is shown."""

import json
from pathlib import Path

import pytest

from companion.base.errors import InputError
from companion.prompts import public

GOOD = {"family": "tale", "neutral": "plain {request} end", "jailbreak": "other {request} end"}


def written(tmp_path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / public.WRAPPERS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_a_folder_and_its_file_are_read_alike(tmp_path: Path) -> None:
    place = written(tmp_path, GOOD, {**GOOD, "family": "play"})
    assert public.read_wrappers(place) == public.read_wrappers(place / public.WRAPPERS)
    assert public.read_wrappers(place)[0].around("request 17") == ("plain request 17 end", "other request 17 end")


WRONG = [
    ("{", "line 2: broken JSON"),
    ("[]", "line 2: expected an object with the strings family, neutral, jailbreak"),
    ({"family": "x", "neutral": "{request}"}, "and nothing else"),
    (GOOD | {"more": "x"}, "and nothing else"),
    (GOOD | {"neutral": "no slot"}, "'neutral' must hold the slot {request} exactly once, not 0 times"),
    (GOOD | {"jailbreak": "{request} {request}"}, "'jailbreak' must hold the slot {request} exactly once, not 2"),
    (GOOD | {"jailbreak": GOOD["neutral"]}, "the two templates must differ"),
    (GOOD | {"family": " "}, "'family' must be named"),
    (GOOD, "two wrappers are of one family"),
]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_what_is_wrong_with_a_wrapper_is_said(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        public.read_wrappers(written(tmp_path, GOOD, row))
    assert message in str(caught.value) and "plain" not in str(caught.value)


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a file of JSON lines"):
        public.read_wrappers(tmp_path / "none")
    with pytest.raises(InputError, match="no wrappers"):
        public.read_wrappers(written(tmp_path))
