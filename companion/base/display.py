"""One progress bar for everything that may take longer than two seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
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
