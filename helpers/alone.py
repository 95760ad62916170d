"""The flags that run no notebook and go by themselves: --test, --recalibrate, --book, --lab."""

from __future__ import annotations

import argparse

from helpers.errors import InputError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add them to the command line."""
    parser.add_argument(
        "--recalibrate", metavar="I/N", nargs="?", const="1/1", help="measure known models for 07 (hours)"
    )
    parser.add_argument(
        "--book", action="store_true", help="make a website of the notebooks and documents (.book/html)"
    )
    parser.add_argument("--lab", action="store_true", help="open JupyterLab at the first notebook")
    parser.add_argument("--test", action="store_true", help="run all tests, and check every notebook's outputs")


def check(flags: argparse.Namespace, n_words: int) -> None:
    """`InputError` if one of them has company."""
    why = {
        "test": "it always checks the embedded model",
        "book": "it shows the outputs that are stored",
        "lab": "parameters are set in the notebook",
    }
    for name, reason in why.items():
        if getattr(flags, name) and n_words > 1:
            raise InputError(f"--{name} goes alone: {reason}")


def run(flags: argparse.Namespace) -> int | None:
    """Do what one of them asks for; None if none was given."""
    if flags.test:
        from helpers import checks

        return checks.run_all()
    if flags.book:
        from helpers import book

        return book.build()
    if flags.lab:
        from helpers import lab

        return lab.run()
    if flags.recalibrate:
        from helpers import calibration_at_large, calibration_draws, calibration_plants

        calibration_draws.run(flags.recalibrate)
        calibration_at_large.run(flags.recalibrate)
        calibration_plants.run(flags.recalibrate)
        return 0
    return None
