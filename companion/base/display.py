"""What a reader meets beside numbers: a progress bar, and the sentence that stands in place of a missing result."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], desc: str = "", total: int | None = None) -> Iterator[T]:
    """Yield the items, drawing a bar once two seconds have passed.

    The bar stays away if `TQDM_DISABLE` is set to anything but 0.

    >>> list(progress([1, 2, 3], desc="pairs"))
    [1, 2, 3]
    """
    from tqdm import tqdm

    silent = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    yield from tqdm(items, desc=desc, total=total, delay=2.0, leave=False, disable=silent, file=sys.stderr)


@dataclass(frozen=True)
class NotDefined:
    """A result that cannot be computed for this model or prompt set; `reason` is a whole sentence for the reader.

    A function returns it in place of its table or number. A notebook shows the sentence, `files.write_table` writes no
    file for it, and it is falsy.

    >>> print(NotDefined("This prompt set holds no jailbreak wrapper."))
    This prompt set holds no jailbreak wrapper.
    """

    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason

    def _repr_markdown_(self) -> str:
        """The sentence in italics, as Jupyter shows the last value of a cell."""
        return f"*{self.reason}*"


def first_undefined(*values: object) -> NotDefined | None:
    """The first `NotDefined` among the values, or None where all are defined.

    Compare the answer with None, since a `NotDefined` is falsy:
    `if (missing := first_undefined(effects, shares)) is not None: return missing`.

    >>> first_undefined(1.0, NotDefined("No wrapper."), NotDefined("No topic."))
    NotDefined(reason='No wrapper.')
    """
    return next((value for value in values if isinstance(value, NotDefined)), None)
