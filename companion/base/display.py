"""What a reader meets beside numbers: a progress bar, and the sentence that stands in place of a missing result."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
STRICT = "COMPANION_STRICT"
FAILED_CHECK = "CHECK FAILED"  # how such a line begins; the runner looks for it


def progress(items: Iterable[T], desc: str = "") -> Iterator[T]:
    """Yield the items, drawing a bar once two seconds have passed, unless `TQDM_DISABLE` is set to anything but 0."""
    from tqdm import tqdm

    silent = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    yield from tqdm(items, desc=desc, delay=2.0, leave=False, disable=silent, file=sys.stderr)


@dataclass(frozen=True)
class NotDefined:
    """A result that cannot be computed for this model or prompt set; `reason` is a whole sentence for the reader.

    It takes the place of a table or number, and is falsy. A notebook shows it, `files.write_table` writes no file for it.
    """

    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason

    def _repr_markdown_(self) -> str:
        """The sentence in italics, as Jupyter shows the last value of a cell."""
        return f"*{self.reason}*"


def passes_on(function: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T | NotDefined, P], R | NotDefined]:
    """The function, which gives a first argument that is `NotDefined` back: what rests on it is not defined either.

    >>> passes_on(len)(NotDefined("No pair is left.")).reason
    'No pair is left.'
    """

    @wraps(function)
    def passed(first: T | NotDefined, /, *args: P.args, **kwargs: P.kwargs) -> R | NotDefined:
        return first if isinstance(first, NotDefined) else function(first, *args, **kwargs)

    return passed


def check(holds: bool, what: str) -> bool:
    """Shows beside a result that something which must hold does not, and returns whether it holds.

    Another processor or model may round otherwise, and hours of a run must not end by it: only in this project's own tests
    (the variable `COMPANION_STRICT`) does the notebook end there.

    >>> check(0.3 < 1e-4, "by hand and imported differ by 3.0e-01")
    CHECK FAILED: by hand and imported differ by 3.0e-01. Do not rely on what follows from it.
    False
    """
    if not holds and os.environ.get(STRICT):
        raise AssertionError(what)
    if not holds:
        print(f"{FAILED_CHECK}: {what}. Do not rely on what follows from it.")
    return bool(holds)
