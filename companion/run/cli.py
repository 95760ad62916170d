"""The flags that run no notebook and go by themselves: --test, --recalibrate, --book, --lab.

`./run_all.sh --lab`: JupyterLab at the first notebook, with the kernel of the companion's own environment.

The command line of `./run_all.sh`. It imports nothing heavy: a run with nothing to do takes under 2 s.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from companion.base import folders, hub
from companion.base.errors import InputError
from companion.base.paths import FIGURES, ORGANISM, RESULTS, ROOT, relative
from companion.claims.ledger import claims_table
from companion.run import model_list, runner, settings, shards
from companion.run.flags import _named, chosen_notebooks, parameters, parse, resolved
from companion.run.freshness import run_times
from companion.run.notebooks import notebook_title


def run_alone(flags: argparse.Namespace) -> int | None:
    """Do what one of them asks for; None if none was given."""
    if flags.test:
        from companion.run import checks

        return checks.run_all()
    if flags.book:
        from book import build

        return build.build()
    if flags.lab:
        return open_lab()
    if flags.recalibrate:
        from companion.calibration import draws, plants, population

        draws.run_draws(flags.recalibrate)
        population.run_population(flags.recalibrate)
        plants.run_plants(flags.recalibrate)
        return 0
    return None


FIRST = "notebooks/00_start_here.ipynb"


def command(root: Path = ROOT, first: str = FIRST, *options: str) -> list[str]:
    """Serve the repository, so that links between folders work, and open one notebook."""
    lab = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
    return [*lab, f"--LabApp.default_url=/lab/tree/{first}", *options]


def environment() -> dict[str, str]:
    """This environment, in which a kernel called `python3` that the user has elsewhere does not come first."""
    return {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1", "WANDB_MODE": "disabled"}


def open_lab() -> int:
    """Open JupyterLab and wait until it is closed."""
    return subprocess.run(command(), env=environment(), cwd=ROOT, check=False).returncode


def run_command(flags: argparse.Namespace) -> int:
    """Run what is stale, then print the claims table."""
    chosen = chosen_notebooks(flags.only)
    found = parameters(flags, settings.resolve_device(flags.device))
    plan = runner.make_plan(settings.fetched(found, flags.wrappers), force=chosen if flags.force else ())
    numbers = runner.with_needs(chosen, plan.paths)
    asked = plan.parameters
    if (asked["MODEL"], asked["PROMPTS"]) != ("embedded", "embedded") and plan.stale & set(numbers):
        for line in settings.check_pairs(*(asked[name] for name in ("MODEL", "PROMPTS", "PAIRS", "PROFILE"))):
            print(line, flush=True)
    if not shards.prepare(plan, numbers, flags.shards, force=flags.force):
        return 1
    failed = runner.run_notebooks(plan, numbers, settings.made_from(found, os.environ.get(hub.JUDGE), flags.wrappers))
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
        print(f"{stem:<16} {seconds:>6}  {state}  {notebook_title(plan.notebooks[number])}")
    return 0


def figures_command(flags: argparse.Namespace) -> int:
    """Redraw every figure of a run from its results, without the model stack."""
    slug = parameters(flags, settings.resolve_device(flags.device))["SLUG"]
    if not (RESULTS / slug).is_dir():
        raise InputError(f"there are no results of {slug!r} to draw from: run it first, without --figures")
    from companion.plots import figures

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
    path = folders.from_caller(flags.models)
    runs = {}
    for place, words in enumerate(model_list.read_model_list(path), start=1):
        try:
            own = parse(words)
            one = argparse.Namespace(**{**vars(flags), **{name: getattr(own, name) for name in model_list.KEYS}})
            device = settings.resolve_device(one.device) if one.device == "auto" else one.device
            runs[place] = (parameters(one, device)["SLUG"], one)  # a device that is not there fails its entry alone
        except InputError as error:
            raise InputError(f"{path}, entry {place}: {error}") from error
    model_list.refuse_same_names([slug for slug, _ in runs.values()], path)
    return model_list.run_model_list({slug: partial(_command(one), one) for slug, one in runs.values()})


def _command(flags: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    commands = {"list": list_command, "figures": figures_command}
    return next((commands[name] for name in commands if getattr(flags, name)), run_command)


def check_command(arguments: Sequence[str]) -> int:
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
        if (done := run_alone(flags)) is not None:
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
