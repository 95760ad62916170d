"""What `helpers.cluster` and `helpers.judge_check` share with `./run_all.sh`: its flags behind `--`, its one-line errors."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence

from helpers import cli, hub
from helpers.errors import InputError
from helpers.paths import ORGANISM

ELSEWHERE = ("models", "shards", "force", "figures", "list", "test", "recalibrate", "book", "lab")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own words, and those behind `--`.

    >>> split(["--shards", "2", "--", "--model", "m"])
    (['--shards', '2'], ['--model', 'm'])
    """
    place = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:place]), list(arguments[place + 1 :])


def flags(words: Sequence[str]) -> argparse.Namespace:
    """The flags of a run, with what they say of foreign code and of the judge in force, as `./run_all.sh` does it.

    Raises `InputError` for a mistake in them, and for a flag that asks for something else than one run.
    """
    asked = cli.parse(words)
    for name in ELSEWHERE:
        if getattr(asked, name):
            raise InputError(f"--{name} behind -- means nothing here: name one run, as for ./run_all.sh")
    hub.trust_code(asked.trust_remote_code)
    hub.choose_judge(None if asked.judge is None else cli._named(asked.judge, ORGANISM))
    return asked


def run(name: str, main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit status of a command, whose foreseeable errors are one line each: 2 for them, 130 if it was stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main(arguments)
    except (InputError, OSError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{name}: stopped; {stop or 'the same command starts again'}", file=sys.stderr)
        return 130
