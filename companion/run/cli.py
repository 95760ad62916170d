"""The command line of `./run_all.sh`. It imports nothing heavy: a run with nothing to do takes under 2 s."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from companion.base import folders, hub
from companion.base.errors import InputError
from companion.base.paths import FIGURES, RESULTS, ROOT, relative
from companion.run import flags as run_flags
from companion.run import runner, settings, shards
from companion.run.flags import chosen_notebooks, parameters, parse, resolved
from companion.run.freshness import run_times
from companion.run.notebooks import notebook_title
from companion.run.overview import claims_table

FIRST = "notebooks/00_start_here.ipynb"


def lab_command(root: Path = ROOT, *options: str) -> list[str]:
    """The command that opens JupyterLab at the first notebook; it serves the repository, so that links between folders work."""
    lab = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
    return [*lab, f"--LabApp.default_url=/lab/tree/{FIRST}", *options]


def lab_environment() -> dict[str, str]:
    """This environment, in which a kernel called `python3` that the user has elsewhere does not come first."""
    return {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1", "WANDB_MODE": "disabled"}


def run_alone(flags: argparse.Namespace) -> int | None:
    """Do what a flag asks for that runs no notebook: --test, --book, --lab, --recalibrate; None if none was given."""
    if flags.test:
        from companion.run import checks

        return checks.run_all()
    if flags.book:
        from book import build

        return build.build()
    if flags.lab:
        return subprocess.run(lab_command(), env=lab_environment(), cwd=ROOT, check=False).returncode
    if flags.recalibrate:
        from companion.calibration import draws, plants

        draws.run_draws(flags.recalibrate)
        draws.run_population(flags.recalibrate)
        plants.run_plants(flags.recalibrate)
        return 0
    return None


def run_command(flags: argparse.Namespace) -> int:
    """Run what is stale, then print the verdicts."""
    if flags.shards:
        shards.check_submitit()
    chosen = chosen_notebooks(flags.only)
    found = parameters(flags, settings.resolve_device(flags.device))
    plan = runner.make_plan(settings.fetched(found, flags.wrappers), force=chosen if flags.force else ())
    numbers = runner.with_needs(chosen, plan.paths)
    asked = plan.parameters
    if (asked["MODEL"], asked["PROMPTS"]) != ("embedded", "embedded") and plan.stale & set(numbers):
        for line in settings.check_pairs(*(asked[name] for name in ("MODEL", "PROMPTS", "PAIRS", "PROFILE"))):
            print(line, flush=True)
    if not shards.measure_shards(plan, numbers, flags):
        print("not every shard finished; what did is kept, and the same command goes on from there", file=sys.stderr)
        return 1
    made_from = settings.made_from(found, os.environ.get(hub.JUDGE), flags.wrappers)
    failed = runner.run_notebooks(plan, numbers, made_from, flags.jobs)
    if failed:
        print(f"{failed} of {len(numbers)} notebooks did not finish; what did is kept", file=sys.stderr)
        return 1
    print(f"results: {relative(plan.results)}  figures: {relative(FIGURES / plan.slug)}")
    table = claims_table(plan.results / "claims.csv", plan.slug, shutil.get_terminal_size((140, 24)).columns)
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


def one_command(flags: argparse.Namespace) -> int:
    """Do for one run what the flags ask for."""
    return (list_command if flags.list else figures_command if flags.figures else run_command)(flags)


def models_command(flags: argparse.Namespace) -> int:
    """Do the same for every entry of a list of models; all entries are checked before the first one starts."""
    plain = parse([])
    given = [name for name in run_flags.KEYS if getattr(flags, name) != getattr(plain, name)]
    if given:
        raise InputError(f"--models goes without --{given[0]}: write it into the list")
    path = folders.from_caller(flags.models)
    runs: dict[str, Callable[[], int]] = {}
    places: dict[str, int] = {}  # some systems do not tell the folder `A` from `a`
    for place, words in enumerate(run_flags.read_model_list(path), start=1):
        try:
            own = parse(words)
            one = argparse.Namespace(**vars(flags) | {name: getattr(own, name) for name in run_flags.KEYS})
            device = settings.resolve_device(one.device) if one.device == "auto" else one.device
            slug = parameters(one, device)["SLUG"]  # a device that is not there fails its entry alone
        except InputError as error:
            raise InputError(f"{path}, entry {place}: {error}") from error
        if (first := places.setdefault(slug.lower(), place)) != place:
            raise InputError(f"{path}: entries {first} and {place} are both named {slug!r}: give one another 'name'")
        runs[slug] = partial(_in_force, one)
    return run_list(runs)


def _in_force(flags: argparse.Namespace) -> int:
    """Each entry has a judge of its own, which does not label the answers of the next."""
    return one_command(run_flags.in_force(flags))


def run_list(runs: Mapping[str, Callable[[], int]]) -> int:
    """Run all, by name, whether or not one fails, by whatever error; returns 0, or 1 if one did."""
    failed: list[str] = []
    for place, (slug, run) in enumerate(runs.items(), start=1):
        print(f"{'' if place == 1 else chr(10)}=== model {place} of {len(runs)}: {slug}", flush=True)
        try:
            status = run()
        except Exception as error:  # Ctrl-C is none, and stops the list
            text = " ".join(str(error).split())
            if not (isinstance(error, InputError | OSError) and text):  # the type of what nobody foresaw says more
                text = f"{type(error).__name__}: {text}".removesuffix(": ")
            print(f"{slug}: {text}", file=sys.stderr, flush=True)
            status = 2
        failed += [slug] if status else []
    print(f"\n{len(runs) - len(failed)} of {len(runs)} models finished", flush=True)
    if failed:
        print(f"not finished: {', '.join(failed)}; the same command tries these again", file=sys.stderr)
    return int(bool(failed))


def check_command(arguments: Sequence[str]) -> int:
    """What `main` would say of the flags, found with the standard library only: run_all.sh asks before installing."""

    def check(arguments: Sequence[str]) -> int:
        flags = run_flags.in_force(parse(arguments))
        parameters(flags, flags.device)
        chosen_notebooks(flags.only)
        return 0

    return run_flags.run_with_flags("run_all.sh", check, arguments)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 all is well, 1 a notebook or a test failed, 2 a mistake in what was asked for, 130 stopped."""

    def run(arguments: Sequence[str]) -> int:
        flags = run_flags.in_force(parse(arguments))
        if (done := run_alone(flags)) is not None:
            return done
        return one_command(flags) if flags.models is None else models_command(flags)

    return run_flags.run_with_flags("run_all.sh", run, arguments)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # the reader of the output has left, as `head` does: nothing to say and nobody to hear it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
