"""The command line of `./run_all.sh`. It imports nothing heavy: a run with nothing to do takes under 2 s."""

import argparse
import difflib
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from helpers import alone, hub, inputs, model_list, preflight, runner, shard_run
from helpers.claims_table import claims_table
from helpers.errors import InputError
from helpers.manifest import run_times
from helpers.notebook import title
from helpers.paths import FIGURES, ORGANISM, PROMPTS, RESULTS, relative

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
    alone.add_flags(new)
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
    flags.prompts = inputs.default_prompts(flags.model) if flags.prompts is None else flags.prompts
    inputs.check(flags.prompts, flags.wrappers)
    alone.check(flags, len(arguments))
    return flags


def parameters(flags: argparse.Namespace, device: str) -> dict[str, Any]:
    """The notebooks' parameters of this run; `InputError` if a folder or the run's name cannot be."""
    model, prompts = _named(flags.model, ORGANISM), _named(flags.prompts, PROMPTS)
    if model != "embedded":
        preflight.check_model(model)
    if prompts != "embedded":
        preflight.check_prompts(prompts)
    judge = None if flags.judge is None else _named(flags.judge, ORGANISM)
    if judge is not None:
        preflight.check_judge(judge)
    found = {"MODEL": model, "PROMPTS": prompts, "SLUG": "embedded", "DEVICE": device, "DTYPE": flags.dtype}
    found |= {"PROFILE": flags.profile, "PAIRS": flags.pairs}
    return {**found, "SLUG": inputs.slug(found, flags.name, judge, flags.wrappers)}


def resolved(flags: argparse.Namespace) -> dict[str, Any]:
    """The same with the device that is there."""
    return inputs.known(parameters(flags, preflight.resolve_device(flags.device)), flags.wrappers)


def _named(given: str, shipped: Path) -> str:
    """A shipped name as it is; a folder as an absolute path, since notebooks run in another folder."""
    if not given.strip():
        raise InputError("an empty name was given for --model, --prompts or --judge")
    folder = preflight.from_caller(given)
    return str(folder.resolve()) if given not in preflight.names(shipped) and folder.is_dir() else given


def chosen_notebooks(only: str | None) -> list[str]:
    """Numbers of the notebooks asked for (all of them without --only); `InputError` for one that is not there."""
    present = runner.find_notebooks(runner.NOTEBOOKS, runner.NEEDS)
    if only is None:
        return list(present)
    numbers = [number.strip().zfill(2) for number in only.split(",") if number.strip()]
    unknown = [number for number in numbers if number not in present]
    if unknown or not numbers:
        there = ", ".join(sorted(present)) or "none"
        raise InputError(f"--only {only}: no notebook {', '.join(unknown) or 'named'}; there are {there}")
    return numbers


def run_command(flags: argparse.Namespace) -> int:
    """Run what is stale, then print the claims table."""
    chosen = chosen_notebooks(flags.only)
    found = parameters(flags, preflight.resolve_device(flags.device))
    plan = runner.make_plan(inputs.fetched(found, flags.wrappers), force=chosen if flags.force else ())
    numbers = runner.with_needs(chosen, plan.paths)
    asked = plan.parameters
    if (asked["MODEL"], asked["PROMPTS"]) != ("embedded", "embedded") and plan.stale & set(numbers):
        for line in preflight.check_pairs(*(asked[name] for name in ("MODEL", "PROMPTS", "PAIRS", "PROFILE"))):
            print(line, flush=True)
    if not shard_run.prepare(plan, numbers, flags.shards, force=flags.force):
        return 1
    failed = runner.run(plan, numbers, inputs.made_from(found, os.environ.get(hub.JUDGE), flags.wrappers))
    if failed:
        print(f"{failed} of {len(numbers)} notebooks did not finish; what did is kept", file=sys.stderr)
        return 1
    print(f"results: {relative(plan.results)}  figures: {relative(FIGURES / plan.slug)}")
    table = claims_table(RESULTS / "claims.csv", plan.slug, shutil.get_terminal_size((140, 24)).columns)
    print(f"\n{table}" if table else "no claims table yet: notebook 08 makes it")
    return 0


def list_command(flags: argparse.Namespace) -> int:
    """Print the notebooks in reading order: number, last wall time, whether it is up to date, title."""
    plan = runner.make_plan(resolved(flags))
    times = run_times(plan.results)
    for number in sorted(plan.paths):
        stem = plan.paths[number].stem
        seconds = f"{times[stem]} s" if stem in times else "-"
        state = "stale" if number in plan.stale else "fresh"
        print(f"{stem:<16} {seconds:>6}  {state}  {title(plan.notebooks[number])}")
    return 0


def figures_command(flags: argparse.Namespace) -> int:
    """Redraw every figure of a run from its results, without the model stack."""
    slug = parameters(flags, preflight.resolve_device(flags.device))["SLUG"]
    if not (RESULTS / slug).is_dir():
        raise InputError(f"there are no results of {slug!r} to draw from: run it first, without --figures")
    from helpers import figures

    with runner.only_run(RESULTS / slug):
        figures.redraw(slug)
    print(f"figures: {relative(FIGURES / slug)}")
    return 0


def models_command(flags: argparse.Namespace) -> int:
    """Do the same for every entry of a list of models; all entries are checked before the first one starts."""
    plain = parse([])
    given = [name for name in model_list.KEYS if getattr(flags, name) != getattr(plain, name)]
    if given:
        raise InputError(f"--models goes without --{given[0]}: write it into the list")
    path = preflight.from_caller(flags.models)
    runs = {}
    for place, words in enumerate(model_list.read(path), start=1):
        try:
            own = parse(words)
            one = argparse.Namespace(**{**vars(flags), **{name: getattr(own, name) for name in model_list.KEYS}})
            device = preflight.resolve_device(one.device) if one.device == "auto" else one.device
            runs[place] = (parameters(one, device)["SLUG"], one)  # a device that is not there fails its entry alone
        except InputError as error:
            raise InputError(f"{path}, entry {place}: {error}") from error
    model_list.refuse_same_names([slug for slug, _ in runs.values()], path)
    return model_list.in_turn({slug: partial(_command(one), one) for slug, one in runs.values()})


def _command(flags: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    commands = {"list": list_command, "figures": figures_command}
    return next((commands[name] for name in commands if getattr(flags, name)), run_command)


def check(arguments: Sequence[str]) -> int:
    """What `main` would say of the flags, found with the standard library only: run_all.sh asks before installing."""
    try:
        flags = parse(arguments)
        parameters(flags, flags.device)
        chosen_notebooks(flags.only)
    except InputError as error:
        return _report(error)
    return 0


def _report(error: InputError) -> int:
    print(f"run_all.sh: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 all is well, 1 a notebook or a test failed, 2 a mistake in what was asked for, 130 stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        flags = parse(arguments)
        hub.trust_code(flags.trust_remote_code)
        hub.choose_judge(None if flags.judge is None else _named(flags.judge, ORGANISM))
        if (done := alone.run(flags)) is not None:
            return done
        return models_command(flags) if flags.models is not None else _command(flags)(flags)
    except InputError as error:
        return _report(error)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, a folder that may not be written
        return _report(
            InputError(f"{error}: mend that; what finished is kept, and the same command goes on from there")
        )
    except KeyboardInterrupt:
        print("\nstopped; what finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # the reader of the output has left, as `head` does: nothing to say and nobody to hear it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
