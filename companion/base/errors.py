"""The one exception for a mistake the user can mend, and how whatever a library raises becomes one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A foreseeable mistake in what was asked for or handed in, shown without a traceback.

    It must say what was wrong, what was expected and what to do.
    """


@contextmanager
def explained(what: str, hint: str) -> Iterator[None]:
    """Whatever a library raises on damaged or foreign files becomes one sentence: what failed, its first line, a hint."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {first_line(error)}; {hint}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says; with its type where that is nothing, or a bare key."""
    line = str(error).strip().partition("\n")[0]
    return line if line and not isinstance(error, KeyError) else f"{type(error).__name__} {line}".strip()
