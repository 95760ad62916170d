"""The one exception for a mistake the user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """A foreseeable mistake in what was asked for or handed in.

    The message is shown on its own, without a traceback, so it must say what was wrong, what was expected and
    what to do. A mistake of the code itself is not an `InputError`.
    """
