"""Run the notebooks that are not up to date, each in a process of its own, several side by side where none needs another.

A notebook writes into a stage; its files take their place when it has finished, and that it is up to date is noted last. So
a notebook that fails or is stopped changes nothing, and one that is killed while its files move is stale and runs again.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import select
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from companion.base import files, hub, smollm2
from companion.base.display import FAILED_CHECK
from companion.base.errors import InputError
from companion.base.folders import is_small, model_folder, prompts_folder, split_adapter
from companion.base.paths import CODE, DATA, FIGURES, NOTEBOOKS, PARTS, RESULTS, ROOT, relative
from companion.run import freshness, notebooks, overview
from companion.run.freshness import STATE, run_times
from companion.run.notebooks import Notebook, Running, read_notebook

# Each notebook and those that it needs: it reads their results, or, of 01, takes the model and prompts as checked. 00 is the
# first to read and the last to run: it shows one pair, and reports the run.
NEEDS: dict[str, tuple[str, ...]] = {
    "01": (),
    "02": ("01",),
    "03": ("02",),
    "04": ("01",),
    "04b": ("04",),
    "05": ("01",),
    "06": ("01",),
    "07": (),
    "08": ("02", "03", "04", "04b", "05", "06", "07"),
    "00": ("08",),
}
MADE_FROM = "made_from"  # a run's note of what it was asked to study, and where that lay
DEFAULTS: dict[str, Any] = {"MODEL": smollm2.REFUSES, "PROMPTS": "english", "SLUG": smollm2.REFUSES}
DEFAULTS |= {"DEVICE": "cpu", "DTYPE": "float32", "PROFILE": "full", "PAIRS": 0}


@dataclass(frozen=True)
class Plan:
    """What a run would do: notebooks by number in the order they run, and which of them are stale."""

    parameters: Mapping[str, Any]
    paths: Mapping[str, Path]
    originals: Mapping[str, bytes]
    notebooks: Mapping[str, Notebook]
    keys: Mapping[str, str]
    stale: frozenset[str]

    @property
    def slug(self) -> str:
        """The name of the run."""
        return str(self.parameters["SLUG"])

    @property
    def is_default(self) -> bool:
        """Whether this is the run with no flags, whose executed notebooks are those of the repository."""
        return dict(self.parameters) == DEFAULTS

    @property
    def results(self) -> Path:
        """The run's folder of results; it need not be there."""
        return RESULTS / self.slug

    def executed(self, number: str) -> Path:
        """Where the executed notebook goes: into its own place in the default run only."""
        path = self.paths[number]
        return path if self.is_default else self.results / "notebooks" / path.name


def find_notebooks(folder: Path, needs: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Notebooks by number, each after those that it needs, else in the order of their numbers.

    `InputError` for one that nobody gave a place.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("[0-9][0-9]*_*.ipynb")):
        number = path.name.partition("_")[0]
        if number in found:
            raise InputError(f"{relative(path)} and {relative(found[number])} have the same number: rename one")
        if number not in needs:
            raise InputError(
                f"{relative(path)} has no line in NEEDS of companion/run/runner.py: say there what it needs"
            )
        found[number] = path
    ordered: dict[str, Path] = {}
    while left := sorted(found.keys() - ordered.keys()):
        number = next(number for number in left if not (set(needs[number]) & set(left)))
        ordered[number] = found[number]
    return ordered


def make_plan(parameters: Mapping[str, Any], force: Sequence[str] = ()) -> Plan:
    """Read the notebooks and see what is stale; those in `force` count as stale."""
    paths = find_notebooks(NOTEBOOKS, NEEDS)
    originals = {number: path.read_bytes() for number, path in paths.items()}
    books = {number: read_notebook(path) for number, path in paths.items()}
    results = RESULTS / parameters["SLUG"]
    known: files.KnownHashes = freshness.recall(results, "hashes")
    before = dict(known)
    shared, own = _rests_on(parameters, known)
    keys = freshness.keys(books, NEEDS, parameters, shared, own)
    plan = Plan(parameters, paths, originals, books, keys, frozenset())
    stale = {number for number in paths if number in force or not _is_fresh(plan, number, known)}
    if known != before:
        with suppress(OSError):  # a folder that may only be read: they are computed again next time
            freshness.note(results, "hashes", known)
    return replace(plan, stale=frozenset(stale))


def _is_fresh(plan: Plan, number: str, known: files.KnownHashes) -> bool:
    try:
        is_executed = notebooks.is_executed(read_notebook(plan.executed(number)))
    except InputError:  # a missing or torn copy is made again; a torn notebook of the repository was named before
        return False
    return is_executed and freshness.is_fresh(plan.results, number, plan.keys[number], known)


def _rests_on(parameters: Mapping[str, Any], known: files.KnownHashes) -> tuple[str, dict[str, Any]]:
    """What all notebooks rest on, hashed: code, lock, shipped data, model, prompts and judge; and, by number, what some do."""
    _, adapter = split_adapter(parameters["MODEL"])
    given = [model_folder(parameters["MODEL"]), prompts_folder(parameters["PROMPTS"]), *([adapter] if adapter else [])]
    foreign = [folder for folder in given if not folder.is_relative_to(DATA)]
    folders = [DATA, *foreign]
    parts = [files.hash_folder(folder, known, "*.py") for folder in CODE]
    parts += [files.hash_folder(folder, known) for folder in folders]
    rendered = freshness.rendered(parameters) if foreign else ""  # what ships is text of fixed templates
    own: dict[str, Any] = {}
    judge = os.environ.get(hub.JUDGE)
    judge_files = files.hash_folder(model_folder(judge), known) if judge and Path(judge).is_dir() else None
    lock = files.hash_file(ROOT / "requirements.lock", known)
    return files.digest(parts, rendered, lock, judge, judge_files), own


def with_needs(chosen: Sequence[str], paths: Mapping[str, Path]) -> list[str]:
    """The chosen notebooks and, directly or not, what they need, in the order in which they run."""
    wanted = set(chosen)
    for number in reversed(list(paths)):
        if number in wanted:
            wanted |= set(NEEDS[number])
    return [number for number in paths if number in wanted]


def check_parameters(plan: Plan) -> None:
    """papermill only warns of a parameter that a notebook does not know, so names and defaults are checked first."""
    for number, notebook in plan.notebooks.items():
        path = plan.paths[number]
        if notebooks.notebook_parameters(notebook, path) != DEFAULTS:
            expected = ", ".join(f"{name} = {value!r}" for name, value in DEFAULTS.items())
            raise InputError(f"{relative(path)}: its cell tagged 'parameters' must be exactly: {expected}")


def lock_file(results: Path) -> Path:
    """The file that the process which writes into a run's results holds locked."""
    return results / STATE / "lock"


@contextmanager
def only_run(results: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the run whose results are in `results`, which ends with this process however it ends.

    Raises `InputError` where another process holds it (or waits for that one), or where the file system knows no locks.
    """
    path = lock_file(results)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except PermissionError as error:
        raise InputError(
            f"{relative(results)} cannot be written ({error.strerror}): name folders of your own in COMPANION_RESULTS and "
            "COMPANION_FIGURES, or copy the repository"
        ) from None
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(f"another run is writing {relative(results)}: wait, or choose --name") from None
        except OSError as error:
            why = f"cannot be locked against a second run ({error.strerror})"
            raise InputError(f"{relative(results)} {why}: copy the repository to a disk that has locks") from None
        yield


@dataclass(frozen=True)
class Stage:
    """Where one notebook of a run works: copies of the run's results, so that no file in place is touched."""

    plan: Plan
    number: str
    folder: Path
    before: Mapping[Path, tuple[int, ...]]
    running: Running
    start: float

    @classmethod
    def begin(cls, plan: Plan, number: str) -> Stage:
        """Make the stage and start the notebook in it."""
        folder = plan.results / STATE / f"stage-{os.getpid()}-{secrets.token_hex(4)}"  # on the disk of the results
        results, figures = folder / "results", folder / "figures"
        figures.mkdir(parents=True)
        # The runner's own folders stay out, and parts of sweeps, which are many, are written one by one and whole.
        kept_out = shutil.ignore_patterns(STATE, "logs", "notebooks", PARTS, ".*")
        shutil.copytree(plan.results, results / plan.slug, ignore=kept_out)
        if (plan.results / PARTS).is_dir():
            (results / plan.slug / PARTS).symlink_to(plan.results / PARTS, target_is_directory=True)
        before = _files(results)
        parameters = {} if plan.is_default else plan.parameters
        log = plan.results / "logs" / f"{plan.paths[number].stem}.log"
        running = notebooks.start_notebook(plan.notebooks[number], parameters, results, figures, log)
        return cls(plan, number, folder, before, running, time.monotonic())

    def fileno(self) -> int:
        """What `select` waits for: the pipe on which the notebook's process says how it ended."""
        return self.running.told.fileno()

    def finish(self) -> tuple[float, str, int]:
        """Put the files of a notebook that ended into their places; returns its seconds, what went wrong, if it did, and how
        many of its checks failed (`companion.base.display.check`).
        """
        plan, number, path = self.plan, self.number, self.plan.paths[self.number]
        try:
            text, problem = self.running.finish()
            seconds = time.monotonic() - self.start
            if not problem and plan.is_default and path.read_bytes() != plan.originals[number]:
                problem = "it was changed while it ran; the change is kept, so run again"
            if not problem:
                self._publish(text, seconds)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)  # the next run removes what is left
        return seconds, problem, text.count(f'"{FAILED_CHECK}')  # lines of outputs stand in quotes

    def _publish(self, text: str, seconds: float) -> None:
        plan, number = self.plan, self.number
        moves: dict[Path, Path] = {}
        for shown, real in ((self.folder / "results", RESULTS), (self.folder / "figures", FIGURES)):
            written = (name for name, state in _files(shown).items() if self.before.get(name) != state)
            moves |= {real / name: shown / name for name in written}
        left = freshness.outdated(plan.results, number, moves)
        for target, made in moves.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, target)  # a rename, unless figures are kept on another disk
        for path in left:  # or a later notebook would take them for results of this run
            path.unlink(missing_ok=True)
        files.write_text(text, plan.executed(number))
        freshness.remember(plan.results, number, plan.keys[number], moves)
        freshness.note_time(plan.results, plan.paths[number].stem, seconds)

    def stop(self) -> None:
        """End the notebook and remove its stage."""
        self.running.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _files(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Every file below, without following links to folders, with what changes when it is written."""
    found = [Path(parent, name) for parent, _, own in os.walk(folder) for name in own]
    states = {path.relative_to(folder): path.stat() for path in found}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in states.items()}


def default_jobs(plan: Plan) -> int:
    """Two notebooks at once for a small model on a processor with two cores: each has one thread."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 if is_small(plan.parameters["MODEL"]) and plan.parameters["DEVICE"] == "cpu" and n_cores > 1 else 1


def run_notebooks(plan: Plan, numbers: Sequence[str], made_from: Mapping[str, str | None], jobs: int = 0) -> int:
    """Run the stale ones of `numbers`, `jobs` at once (0: `default_jobs`); returns how many failed or were not started.

    `made_from` is noted with the first result: whose results these are (`companion.run.settings.made_from`).
    """
    check_parameters(plan)
    with only_run(plan.results):
        for left in (plan.results / STATE).glob("stage*"):  # of a run that was killed
            shutil.rmtree(left)
        work = _Work(plan, numbers, jobs or default_jobs(plan))
        try:
            while work.start_ready():
                work.take_finished()
                if work.done:
                    freshness.note(plan.results, MADE_FROM, made_from)
        finally:
            for stage in work.stages:
                stage.stop()
        try:
            files.read_json(plan.results / "manifest.json")
            is_due = bool(work.done)
        except InputError:  # missing or torn
            is_due = True
        if is_due:
            freshness.write_manifest(plan.results, plan.parameters, freshness.recall(plan.results, "hashes"))
        with only_run(RESULTS, wait=True):
            overview.join_claims(RESULTS)
    return len(work.lost)


class _Work:
    """What is to run, what runs, and what was lost: notebooks that failed, and those that need one of them."""

    def __init__(self, plan: Plan, numbers: Sequence[str], jobs: int) -> None:
        self.plan, self.numbers, self.jobs = plan, list(numbers), jobs
        self.times = {**run_times(RESULTS / DEFAULTS["SLUG"]), **run_times(plan.results)}
        self.waiting = [number for number in numbers if number in plan.stale]
        self.stages: list[Stage] = []
        self.done: list[str] = []
        self.lost: dict[str, str] = {}
        for number in numbers:
            if number not in plan.stale:
                self._say(number, "fresh, skipped")

    def _say(self, number: str, what: str) -> None:
        place = f"[{self.numbers.index(number) + 1}/{len(self.numbers)}]"
        print(f"{place} {self.plan.paths[number].stem} {what}", flush=True)

    def start_ready(self) -> bool:
        """Start what can start while there is room, the longest first by the last run's times; whether any is running."""
        for number in list(self.waiting):
            if broken := [need for need in NEEDS[number] if need in self.lost]:
                self.lost[number] = self.lost[broken[0]]
                self.waiting.remove(number)
                self._say(number, f"not started: it needs {self.lost[number]}, which failed")
        missing = {*self.waiting, *(stage.number for stage in self.stages)}
        last = {number: self.times.get(self.plan.paths[number].stem, 0) for number in self.waiting}
        ready = sorted((n for n in self.waiting if missing.isdisjoint(NEEDS[n])), key=lambda n: -last[n])
        for number in ready[: self.jobs - len(self.stages)]:
            self._say(number, f"(last time {last[number]} s) ..." if last[number] else "...")
            self.stages.append(Stage.begin(self.plan, number))
            self.waiting.remove(number)
        return bool(self.stages)

    def take_finished(self) -> None:
        """Wait until one of the running notebooks ends, and put its files in place if it has finished."""
        for stage in select.select(self.stages, [], [])[0]:
            self.stages.remove(stage)
            seconds, problem, failed = stage.finish()
            if problem:
                self.lost[stage.number] = self.plan.paths[stage.number].stem
                self._say(stage.number, f"failed after {seconds:.0f} s")
                print(f"{self.lost[stage.number]}: {problem}", file=sys.stderr, flush=True)
            else:
                self.done.append(stage.number)
                warning = f"; {failed} of its checks FAILED, see its outputs" if failed else ""
                self._say(stage.number, f"{seconds:.0f} s{warning}")
