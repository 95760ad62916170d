"""What `companion.run.cluster` and `companion.run.judge_check` share with `./run_all.sh`: its flags behind `--`, its one-line errors."""

from __future__ import annotations

import argparse
import difflib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from companion.base import folders, hub, paths
from companion.base.errors import InputError
from companion.base.paths import ORGANISM, PROMPTS
from companion.run import runner, settings

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
    asked = parse(words)
    for name in ELSEWHERE:
        if getattr(asked, name):
            raise InputError(f"--{name} behind -- means nothing here: name one run, as for ./run_all.sh")
    hub.trust_code(asked.trust_remote_code)
    hub.choose_judge(None if asked.judge is None else _named(asked.judge, ORGANISM))
    return asked


def run_with_flags(name: str, main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
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


def check_alone(flags: argparse.Namespace, n_words: int) -> None:
    """`InputError` if one of them has company."""
    why = {
        "test": "it always checks the embedded model",
        "book": "it shows the outputs that are stored",
        "lab": "parameters are set in the notebook",
    }
    for name, reason in why.items():
        if getattr(flags, name) and n_words > 1:
            raise InputError(f"--{name} goes alone: {reason}")


DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


class Parser(argparse.ArgumentParser):
    """argparse, but with an error of one line."""

    def error(self, message: str) -> NoReturn:
        """Report a mistake in the flags."""
        raise InputError(message)


def parser() -> Parser:
    """The flags of `./run_all.sh`."""
    new = Parser(
        prog="./run_all.sh",
        description="Run every notebook that is not up to date. With no flag: the embedded model, on the CPU.",
        allow_abbrev=False,
    )
    new.add_argument(
        "--model",
        metavar="NAME|DIR|ID",
        default="embedded",
        help="a shipped model, a model's folder, or ORG/MODEL[@REV] of the hub",
    )
    new.add_argument(
        "--prompts",
        metavar="NAME|DIR",
        help="a shipped or public prompt set, or a folder (default: embedded; for a model of "
        "the hub the open public sets)",
    )
    new.add_argument("--wrappers", metavar="FILE", help="jailbreak wrappers of your own, for a public prompt set")
    new.add_argument("--judge", metavar="DIR|ID", help="a model that labels generated answers (else refusal phrases)")
    new.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    new.add_argument("--name", metavar="SLUG", help="name of the run's folders in results/ and figures/")
    new.add_argument("--device", default="cpu", help="auto, cpu (default), cuda or cuda:N")
    new.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    new.add_argument("--profile", default="full", choices=("smoke", "full"), help="smoke: a quick look")
    new.add_argument("--pairs", metavar="N", type=int, default=0, help="at most N pairs a treatment (0: all)")
    new.add_argument("--only", metavar="02,03", help="these notebooks, and what they need if that is stale")
    new.add_argument("--models", metavar="FILE", help="run every model of a list (models.example.yml shows one)")
    new.add_argument("--shards", metavar="N", type=int, default=0, help="share the sweeps among N processes or GPUs")
    new.add_argument("--figures", action="store_true", help="only redraw the figures from results/")
    new.add_argument("--force", action="store_true", help="run what is up to date as well")
    new.add_argument("--list", action="store_true", help="list the notebooks and what is up to date")
    add_flags(new)
    return new


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags, checked as far as they can be without reading a file; `InputError` names the first mistake."""
    flags, unknown = parser().parse_known_args(arguments)
    if unknown:
        known = [name for action in parser()._actions for name in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else "./run_all.sh --help lists the flags"
        raise InputError(f"unknown {'flag' if unknown[0].startswith('-') else 'word'} {unknown[0]}: {hint}")
    if [] in vars(flags).values():  # what Python's parser makes of --flag=--
        raise InputError("-- is no value of a flag: expected a name, a folder or a number")
    if not DEVICE.fullmatch(flags.device):
        raise InputError(f"--device {flags.device}: expected auto, cpu, cuda or cuda:N")
    if flags.pairs < 0 or 0 < flags.pairs < 10:
        raise InputError(f"--pairs {flags.pairs}: expected at least 10, or 0 for all")
    if not 0 <= flags.shards <= 1000:
        raise InputError(f"--shards {flags.shards}: expected 1 to 1000")
    flags.prompts = settings.default_prompts(flags.model) if flags.prompts is None else flags.prompts
    settings.check(flags.prompts, flags.wrappers)
    check_alone(flags, len(arguments))
    return flags


def parameters(flags: argparse.Namespace, device: str) -> dict[str, Any]:
    """The notebooks' parameters of this run; `InputError` if a folder or the run's name cannot be."""
    model, prompts = _named(flags.model, ORGANISM), _named(flags.prompts, PROMPTS)
    if model != "embedded":
        folders.check_model(model)
    if prompts != "embedded":
        settings.check_prompts(prompts)
    judge = None if flags.judge is None else _named(flags.judge, ORGANISM)
    if judge is not None:
        folders.check_judge(judge)
    found = {"MODEL": model, "PROMPTS": prompts, "SLUG": "embedded", "DEVICE": device, "DTYPE": flags.dtype}
    found |= {"PROFILE": flags.profile, "PAIRS": flags.pairs}
    return {**found, "SLUG": settings.slug(found, flags.name, judge, flags.wrappers)}


def resolved(flags: argparse.Namespace) -> dict[str, Any]:
    """The same with the device that is there."""
    return settings.known(parameters(flags, settings.resolve_device(flags.device)), flags.wrappers)


def _named(given: str, shipped: Path) -> str:
    """A shipped name as it is; a folder as an absolute path, since notebooks run in another folder."""
    if not given.strip():
        raise InputError("an empty name was given for --model, --prompts or --judge")
    folder = folders.from_caller(given)
    return str(folder.resolve()) if given not in folders.names(shipped) and folder.is_dir() else given


def chosen_notebooks(only: str | None) -> list[str]:
    """Numbers of the notebooks asked for (all of them without --only); `InputError` for one that is not there."""
    present = runner.find_notebooks(paths.NOTEBOOKS, runner.NEEDS)
    if only is None:
        return list(present)
    numbers = [number.strip().zfill(2) for number in only.split(",") if number.strip()]
    unknown = [number for number in numbers if number not in present]
    if unknown or not numbers:
        there = ", ".join(sorted(present)) or "none"
        raise InputError(f"--only {only}: no notebook {', '.join(unknown) or 'named'}; there are {there}")
    return numbers
