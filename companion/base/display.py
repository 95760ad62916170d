"""One progress bar for everything that may take longer than two seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], desc: str = "", total: int | None = None) -> Iterator[T]:
    """Yields the items, drawing a bar once two seconds have passed; silent if `TQDM_DISABLE` is set to anything but
    0.

    >>> list(progress([1, 2, 3], desc="pairs"))
    [1, 2, 3]
    """
    silent = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    yield from tqdm(items, desc=desc, total=total, delay=2.0, leave=False, disable=silent, file=sys.stderr)


@dataclass(frozen=True)
class NotDefined:
    """A result that cannot be computed for this model or prompt set, and the reason in one sentence."""

    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason

    def _repr_markdown_(self) -> str:
        return f"*Not defined: {self.reason}*"
