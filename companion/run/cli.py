"""The command line of `./run_all.sh`: its flags, those of an entry in a list of models, and what each asks for.

It imports nothing heavy: a run with nothing to do takes under 2 s, and a mistake shows before any package is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from companion.base import folders, gguf, hub, smollm2
from companion.base.errors import InputError
from companion.base.paths import FIGURES, ORGANISM, PROMPTS, RESULTS, ROOT, relative
from companion.run import runner, settings, shards
from companion.run.freshness import run_times
from companion.run.notebooks import notebook_title
from companion.run.overview import claims_table

COMMITTED = ROOT / "results" / "committed.yml"
# What an entry in a list of models may hold.
KEYS = ("model", "adapter", "prompts", "wrappers", "judge", "name", "device", "dtype", "profile", "tokenizer", "pairs")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is an `InputError`."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (./run_all.sh --help lists the flags)")


def parser() -> Parser:
    """The flags of `./run_all.sh`."""
    what = "Run every notebook that is not up to date. With no flag: smollm2-refuser, on the CPU."
    new = Parser(prog="./run_all.sh", description=what, allow_abbrev=False)
    add = new.add_argument
    # fmt: off
    add("--model", metavar="NAME|DIR|FILE|ID",
        help="smollm2-refuser (default), embedded (quick), a folder, a GGUF file, or ORG/MODEL[@REV] of the hub")
    add("--adapter", metavar="DIR", help="a LoRA adapter (peft, safetensors) that is merged into the model")
    add("--tokenizer", metavar="DIR", help="the folder of the tokenizer and chat template of a GGUF file that has none")
    add("--prompts", metavar="NAME|DIR",
        help="a shipped or public prompt set, or a folder (default: the one that goes with the model)")
    add("--wrappers", metavar="FILE", help="jailbreak wrappers of your own, for a public prompt set")
    add("--judge", metavar="DIR|ID", help="a model that labels generated answers (else refusal phrases)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--name", metavar="SLUG", help="name of the run's folders in results/ and figures/")
    add("--device", default="cpu", help="auto, cpu (default), cuda or cuda:N")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--profile", default="full", choices=("smoke", "full"), help="smoke: a quick look")
    add("--pairs", metavar="N", type=int, default=0, help="at most N pairs a treatment (0: all, or 72 where each is costly)")
    add("--only", metavar="02,03", help="these notebooks, and what they need if that is stale")
    add("--jobs", metavar="N", type=int, default=0,
        help="notebooks at once, where none needs another (default: 2 for a small model on the CPU, else 1)")
    lists = new.add_mutually_exclusive_group()
    lists.add_argument("--models", metavar="FILE", help="run every model of a list (models.example.yml shows one)")
    lists.add_argument("--all", action="store_true",
        help="every run whose results are in the repository (results/committed.yml; hours)")
    add("--shards", metavar="N", type=int, default=0, help="measure the sweeps in N jobs first (needs submitit)")
    add("--executor", choices=("local", "slurm"), help="where the jobs run (default: slurm where there is sbatch)")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="a parameter of submitit, as timeout_min=240")
    add("--figures", action="store_true", help="only redraw the figures from results/")
    add("--force", action="store_true", help="run what is up to date as well")
    add("--list", action="store_true", help="list the notebooks and what is up to date")
    add("--recalibrate", metavar="I/N", nargs="?", const="1/1", help="measure known models for 07 (hours)")
    add("--book", action="store_true", help="make a website of the notebooks and documents (.book/html)")
    add("--lab", action="store_true", help="open JupyterLab at the first notebook")
    add("--test", action="store_true", help="run all tests, and check every notebook's outputs")
    # fmt: on
    return new


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags, checked before any model or prompt set is read; `InputError` names the first mistake."""
    flags = parser().parse_args(arguments)
    # What argparse makes of --flag=--, before Python 3.13 and since.
    if any(value in ([], "--") for name, value in vars(flags).items() if name != "set"):
        raise InputError("-- is no value of a flag: expected a name, a folder or a number")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", flags.device):
        raise InputError(f"--device {flags.device}: expected auto, cpu, cuda or cuda:N")
    for name, least, most in (("pairs", 10, 10**6), ("shards", 1, 1000), ("jobs", 1, 100)):
        if (number := getattr(flags, name)) and not least <= number <= most:
            raise InputError(f"--{name} {number}: expected {least} to {most}, or 0")
    if wrong := next((one for one in flags.set if not re.fullmatch(r"\w+=.+", one)), None):
        raise InputError(f"--set {wrong}: expected KEY=VALUE, such as timeout_min=240")
    if (flags.set or flags.executor) and not flags.shards:
        raise InputError("--executor and --set go with --shards")
    flags.models = str(COMMITTED) if flags.all else flags.models
    chosen = (flags.model, flags.prompts, flags.adapter, flags.tokenizer, flags.name, flags.models)
    flags.may_fall_back = set(chosen) == {None}
    flags.model = named(runner.DEFAULTS["MODEL"] if flags.model is None else flags.model, ORGANISM)
    flags.prompts = named(settings.default_prompts(flags.model) if flags.prompts is None else flags.prompts, PROMPTS)
    flags.judge = None if flags.judge is None else named(flags.judge, ORGANISM)
    settings.check_wrappers(flags.prompts, flags.wrappers)
    for name in ("test", "book", "lab"):
        if getattr(flags, name) and len(arguments) > 1:
            raise InputError(f"--{name} goes alone")
    return flags


def parameters(flags: argparse.Namespace, device: str) -> dict[str, Any]:
    """The notebooks' parameters of this run; `InputError` if a folder or the run's name cannot be."""
    model = flags.model
    if flags.adapter is not None:
        adapter = folders.from_caller(flags.adapter).resolve()
        folders.check_adapter(adapter)
        model = folders.with_adapter(model, adapter)
    if flags.tokenizer is not None:
        if not gguf.is_gguf(folders.model_folder(model) if not folders.is_on_hub(model) else model):
            raise InputError("--tokenizer goes with a GGUF file: any other model has its own in its folder")
        folders.check_chat(folders.from_caller(flags.tokenizer))
    folders.check_model(model)
    settings.check_prompts(flags.prompts)
    if flags.judge is not None:
        folders.check_judge(flags.judge)
    found = {"MODEL": model, "PROMPTS": flags.prompts, "SLUG": "", "DEVICE": device, "DTYPE": flags.dtype}
    found |= {"PROFILE": flags.profile, "PAIRS": flags.pairs}
    return {**found, "SLUG": settings.slug(found, flags.name, flags.judge, flags.wrappers)}


def resolved(flags: argparse.Namespace) -> dict[str, Any]:
    """The parameters with the device that is there and what the caches hold; nothing is downloaded."""
    return settings.known(parameters(flags, settings.resolve_device(flags.device)), flags.wrappers)


def named(given: str, shipped: Path) -> str:
    """A shipped name as it is; a folder as an absolute path, since notebooks run in another folder."""
    if not given.strip():
        raise InputError("an empty name was given for --model, --prompts or --judge")
    folder = folders.from_caller(given)
    fetched = (smollm2.NAME, *smollm2.refusers()) if shipped == ORGANISM else ()
    is_shipped = given in (*folders.names(shipped), *fetched)
    return str(folders.fixed(folder)) if folders.is_here(folder) and not is_shipped else given


def chosen_notebooks(only: str | None) -> list[str]:
    """Numbers of the notebooks asked for (all of them without --only); `InputError` for one that is not there."""
    present = runner.find_notebooks()
    if only is None:
        return list(present)
    numbers = [number.strip().zfill(2) for number in only.split(",") if number.strip()]
    unknown = [number for number in numbers if number not in present]
    if unknown or not numbers:
        there = ", ".join(sorted(present)) or "none"
        raise InputError(f"--only {only}: no notebook {', '.join(unknown) or 'named'}; there are {there}")
    return numbers


def in_force(asked: argparse.Namespace) -> argparse.Namespace:
    """The same flags, once what they say of foreign code, judge and tokenizer holds for this process and its notebooks."""
    hub.set_variable(hub.TRUST, "1" if asked.trust_remote_code else None)
    hub.set_variable(hub.JUDGE, asked.judge)
    folder = None if asked.tokenizer is None else str(folders.from_caller(asked.tokenizer).resolve())
    hub.set_variable(gguf.TOKENIZER, folder)
    return asked


def run_with_flags(name: str, main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit status of a command, whose foreseeable errors are one line each: 2 for them, 130 if it was stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    goes_on = "what finished is kept, and the same command goes on from there"
    try:
        return main(arguments)
    except BrokenPipeError:  # the reader of the output has left, as `head` does: nothing to say and nobody to hear it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except InputError as error:
        said = str(error)
    except OSError as error:  # a full disk, a folder that may not be written
        said = f"{error}: mend that; {goes_on}"
    except KeyboardInterrupt:
        print(f"\nstopped; {goes_on}", file=sys.stderr)
        return 130
    print(f"{name}: {' '.join(said.split())}", file=sys.stderr)
    return 2


def read_model_list(path: Path) -> list[list[str]]:
    """The flags of each entry of a list of models, as `["--model=/models/a"]`; `InputError` names a wrong entry."""
    import yaml  # the command line is imported before any package is installed

    if not path.is_file():
        raise InputError(f"no list of models at {path}: give a file like models.example.yml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as YAML in UTF-8 ({reason}); see models.example.yml") from error
    entries = content.get("models") if isinstance(content, dict) and set(content) == {"models"} else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected one key 'models' with a list of at least one entry; see models.example.yml")
    for place, entry in enumerate(entries, start=1):
        where = f"{path}, entry {place}"
        if not isinstance(entry, dict) or not set(entry) <= set(KEYS):
            raise InputError(f"{where}: expected keys of {', '.join(KEYS)} with their values, not {entry!r:.60}")
        for key, value in entry.items():
            if type(value) not in (str, int) or value == "":
                raise InputError(f"{where}: {key!r} must be a text or a whole number (quote a date), not {value!r:.60}")
    return [[f"--{key}={value}" for key, value in entry.items()] for entry in entries]


def lab_command(root: Path = ROOT, *options: str) -> list[str]:
    """The command that opens JupyterLab at the first notebook; it serves the repository, so that links between folders work."""
    first = "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb"
    return [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}", first, *options]


def lab_environment() -> dict[str, str]:
    """This environment, in which a kernel called `python3` that the user has elsewhere does not come first."""
    return {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1", "WANDB_MODE": "disabled"}


def run_alone(flags: argparse.Namespace) -> int | None:
    """Do what a flag asks for that runs no notebook; None if none of these was given."""
    if flags.test:
        from companion.run import checks

        return checks.run_all()
    if flags.book:
        from book import build

        return build.build()
    if flags.lab:
        return subprocess.run(lab_command(), env=lab_environment(), cwd=ROOT, check=False).returncode
    if flags.recalibrate:
        from companion.calibration import draws, plants, truths

        for measure in (draws.run_draws, draws.run_population, truths.run_knock_outs, plants.run_real_plants):
            measure(flags.recalibrate)
        return 0
    return None


def run_command(flags: argparse.Namespace) -> int:
    """Run what is stale, then print the verdicts."""
    if flags.shards and find_spec("submitit") is None:
        raise InputError("--shards needs submitit: python -m pip install -r requirements-cluster.in, then again")
    chosen = chosen_notebooks(flags.only)
    found = parameters(flags, settings.resolve_device(flags.device))
    plan = runner.make_plan(settings.fetched(found, flags.wrappers), force=chosen if flags.force else ())
    numbers = runner.with_needs(chosen, plan.paths)
    asked = [plan.parameters[name] for name in ("MODEL", "PROMPTS", "PAIRS", "PROFILE")]
    if asked[:2] != ["embedded", "embedded"] and plan.stale & set(numbers):
        print(*settings.apart(settings.check_pairs, *asked), sep="\n", flush=True)
    if not shards.measure_shards(plan, numbers, flags):
        print("not every shard finished; what did is kept, and the same command goes on from there", file=sys.stderr)
        return 1
    made_from = settings.made_from(found, os.environ.get(hub.JUDGE), flags.wrappers)
    failed = runner.run_notebooks(plan, numbers, made_from, flags.jobs)
    if failed:
        print(f"{failed} of {len(numbers)} notebooks did not finish; what did is kept", file=sys.stderr)
        return 1
    print(f"results: {relative(plan.results)}  figures: {relative(FIGURES / plan.slug)}")
    table = claims_table(plan.results / "claims.csv", plan.slug)
    print(f"\n{table}" if table else "no claims table yet: notebook 08 makes it")
    return 0


def run_default(flags: argparse.Namespace) -> int:
    """The run in which nobody named a model: the default one, or `embedded` where that cannot be fetched, and says so twice."""
    try:
        smollm2.fetch_smollm2()
    except InputError as error:
        kept = f"so this is a run of the embedded model; the results of {flags.model} stay as they are"
        print(f"{error}: {kept}\n", file=sys.stderr, flush=True)
        status = run_command(argparse.Namespace(**vars(flags) | {"model": "embedded", "prompts": "embedded"}))
        print(f"\n{flags.model} was not run ({error}): {kept}", file=sys.stderr)
        return status
    return run_command(flags)


def list_command(flags: argparse.Namespace) -> int:
    """Print the notebooks in reading order: number, last wall time, whether it is up to date, title."""
    plan = runner.make_plan(resolved(flags))
    times = run_times(plan.results)
    for number, path in sorted(plan.paths.items()):
        seconds = f"{times[path.stem]} s" if path.stem in times else "-"
        state = "stale" if number in plan.stale else "fresh"
        print(f"{path.stem:<16} {seconds:>6}  {state}  {notebook_title(plan.notebooks[number])}")
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


def one_command(asked: argparse.Namespace) -> int:
    """Do for one run what the flags ask for, once they are in force."""
    flags = in_force(asked)
    run = run_default if flags.may_fall_back else run_command
    return (list_command if flags.list else figures_command if flags.figures else run)(flags)


def models_command(flags: argparse.Namespace) -> int:
    """Do the same for every entry of a list of models; all entries are checked before the first one starts."""
    plain, flag = parse([]), "--all" if flags.all else "--models"
    for name in KEYS:
        if getattr(flags, name) != getattr(plain, name):
            raise InputError(f"{flag} goes without --{name}: write it into a list for --models")
    path = folders.from_caller(flags.models).resolve()
    entries = read_model_list(path)
    os.environ["COMPANION_CALLER"] = str(path.parent)  # folders in the list count from its own
    runs: dict[str, Callable[[], int]] = {}
    for place, words in enumerate(entries, start=1):
        try:
            own = parse(words)
            one = argparse.Namespace(**vars(flags) | {name: getattr(own, name) for name in KEYS})
            device = settings.resolve_device(one.device) if one.device == "auto" else one.device
            slug = parameters(in_force(one), device)["SLUG"]  # a device that is not there fails its entry alone
        except InputError as error:
            raise InputError(f"{path}, entry {place}: {error}") from error
        if slug.lower() in map(str.lower, runs):  # some systems do not tell the folder `A` from `a`
            raise InputError(f"{path}, entry {place}: another is named {slug!r} as well: give one another 'name'")
        runs[slug] = partial(one_command, one)  # in force by itself: its judge labels no answers of the next
    return run_list(runs)


def run_list(runs: Mapping[str, Callable[[], int]]) -> int:
    """Run all, by name, whether or not one fails, by whatever error; returns 0, or 1 if one did."""
    failed: list[str] = []
    for place, (slug, run) in enumerate(runs.items(), start=1):
        print(f"{'' if place == 1 else chr(10)}=== model {place} of {len(runs)}: {slug}", flush=True)
        try:
            failed += [slug] if run() else []
        except Exception as error:  # Ctrl-C is none, and stops the list
            kind = "" if isinstance(error, InputError | OSError) else f"{type(error).__name__}: "
            print(f"{slug}: {kind}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
            failed.append(slug)
    print(f"\n{len(runs) - len(failed)} of {len(runs)} models finished", flush=True)
    if failed:
        print(f"not finished: {', '.join(failed)}; the same command tries these again", file=sys.stderr)
    return int(bool(failed))


def check_command(arguments: Sequence[str]) -> int:
    """What `main` would say of the flags, found with the standard library only: run_all.sh asks before installing."""

    def check(arguments: Sequence[str]) -> int:
        flags = in_force(parse(arguments))
        parameters(flags, flags.device)
        chosen_notebooks(flags.only)
        return 0

    return run_with_flags("run_all.sh", check, arguments)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 all is well, 1 a notebook or a test failed, 2 a mistake in what was asked for, 130 stopped."""

    def run(arguments: Sequence[str]) -> int:
        flags = in_force(parse(arguments))
        if (done := run_alone(flags)) is not None:
            return done
        return one_command(flags) if flags.models is None else models_command(flags)

    return run_with_flags("run_all.sh", run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
