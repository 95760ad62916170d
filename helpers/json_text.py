"""Reading JSON that others wrote: whatever is wrong with it is one kind of error with a short reason."""

import json
from pathlib import Path
from typing import Any

from helpers.errors import InputError


class BrokenJson(ValueError):
    """A text that is no JSON, or JSON that cannot be worked with; `line` is where, 1 if that is not known."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(f"line {line}: {reason}")
        self.reason, self.line = reason, line


def read(path: Path) -> str:
    """The text of a file; `InputError` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None


def parse(text: str) -> Any:
    r"""The value of a JSON text.

    >>> parse('{"a": 1}')
    {'a': 1}
    >>> parse('["\\ud800"]')
    Traceback (most recent call last):
    helpers.json_text.BrokenJson: line 1: it holds half of a surrogate pair, which is no character
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # what cannot be written cannot be hashed or tokenized either
    except json.JSONDecodeError as error:
        raise BrokenJson(error.msg, error.lineno) from None
    except UnicodeEncodeError:
        raise BrokenJson("it holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise BrokenJson("it is nested too deeply") from None
    except ValueError:
        raise BrokenJson("it holds a number of too many digits") from None
    return value
