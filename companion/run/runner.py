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
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from companion.base import files, smollm2
from companion.base.display import FAILED_CHECK
from companion.base.errors import InputError
from companion.base.folders import is_small
from companion.base.paths import FIGURES, NOTEBOOKS, PARTS, RESULTS, relative
from companion.run import freshness, notebooks, overview
from companion.run.freshness import STATE, run_times
from companion.run.notebooks import Notebook, read_notebook

# Each notebook and those that it needs, in the order in which they run: it reads their results, or, of 01, takes the model
# and prompts as checked. 00 is the first to read and the last to run: it shows one pair, and reports the run.
NEEDS: dict[str, tuple[str, ...]] = {
    "01": (), "06": ("01",), "05": ("01",), "02": ("01",), "04": ("01",), "03": ("02",), "04b": ("04",), "07": (),
    "08": ("02", "03", "04", "04b", "05", "06", "07"), "00": ("08",),
}  # fmt: skip
FOR_TWO = 12e9  # bytes of the machine's memory: two notebooks of `smollm2-refuser` at once take up to 6.8 GB, one 4
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


def find_notebooks() -> dict[str, Path]:
    """The notebooks by number, in the order in which they run; `InputError` for one that nobody gave a place."""
    numbers = {path: path.name.partition("_")[0] for path in sorted(NOTEBOOKS.glob("[0-9][0-9]*_*.ipynb"))}
    found = {number: path for path, number in numbers.items()}
    for path, number in numbers.items():
        if found[number] != path or number not in NEEDS:
            where = "NEEDS of companion/run/runner.py"
            raise InputError(f"{relative(path)} has no line of its own in {where}: say there what it needs")
    return {number: found[number] for number in NEEDS if number in found}


def make_plan(parameters: Mapping[str, Any], force: Sequence[str] = ()) -> Plan:
    """Read the notebooks and see what is stale; those in `force` count as stale."""
    paths = find_notebooks()
    originals = {number: path.read_bytes() for number, path in paths.items()}
    books = {number: read_notebook(path) for number, path in paths.items()}
    results = RESULTS / parameters["SLUG"]
    known: files.KnownHashes = freshness.recall(results, "hashes")
    before = dict(known)
    keys = freshness.keys(books, NEEDS, parameters, freshness.rests_on(parameters, known))
    plan = Plan(parameters, paths, originals, books, keys, frozenset())
    stale = {number for number in paths if number in force or not _is_fresh(plan, number, known)}
    if known != before:
        with suppress(OSError):  # a folder that may only be read: they are computed again next time
            freshness.note(results, "hashes", known)
    return replace(plan, stale=frozenset(stale))


def _is_fresh(plan: Plan, number: str, known: files.KnownHashes) -> bool:
    with suppress(InputError):  # a missing or torn copy is made again; a torn source was named before
        if notebooks.is_executed(read_notebook(plan.executed(number))):
            return freshness.is_fresh(plan.results, number, plan.keys[number], known)
    return False


def with_needs(chosen: Sequence[str], paths: Mapping[str, Path]) -> list[str]:
    """The chosen notebooks and, directly or not, what they need, in the order in which they run."""
    wanted = set(chosen)
    for number in reversed(list(paths)):
        if number in wanted:
            wanted |= set(NEEDS[number])
    return [number for number in paths if number in wanted]


def lock_file(results: Path) -> Path:
    """The file that the process which writes into a run's results holds locked."""
    return results / STATE / "lock"


@contextmanager
def only_run(results: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the run with these `results`; `InputError` (or a wait) if another does, or if it cannot be written."""
    path = lock_file(results)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except PermissionError as error:
        instead = "name folders of your own in COMPANION_RESULTS and COMPANION_FIGURES, or copy the repository"
        raise InputError(f"{relative(results)} cannot be written ({error.strerror}): {instead}") from None
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(f"another run is writing {relative(results)}: wait, or choose --name") from None
        yield


class Stage:
    """Where one notebook of a run works: copies of the run's results, so that no file in place is touched."""

    def __init__(self, plan: Plan, number: str) -> None:
        """Make the stage and start the notebook in it."""
        self.plan, self.number = plan, number
        self.folder = plan.results / STATE / f"stage-{os.getpid()}-{secrets.token_hex(4)}"  # on the disk of the results
        results = self.folder / "results"
        (self.folder / "figures").mkdir(parents=True)
        # The runner's own folders stay out, and parts of sweeps, which are many, are written one by one and whole.
        kept_out = shutil.ignore_patterns(STATE, "logs", "notebooks", PARTS, ".*")
        shutil.copytree(plan.results, results / plan.slug, ignore=kept_out)
        if (plan.results / PARTS).is_dir():
            (results / plan.slug / PARTS).symlink_to(plan.results / PARTS, target_is_directory=True)
        self.before = _files(results)
        self.log = plan.results / "logs" / f"{plan.paths[number].stem}.log"
        parameters = {} if plan.is_default else plan.parameters
        self.process, self.told = notebooks.start_notebook(plan.notebooks[number], parameters, self.folder, self.log)
        self.start = time.monotonic()

    def fileno(self) -> int:
        """What `select` waits for: the pipe on which the notebook's process says how it ended."""
        return self.told.fileno()

    def finish(self) -> tuple[float, str, int]:
        """Put the files of a notebook that ended into their places; its seconds, what went wrong, how many checks failed."""
        plan, path = self.plan, self.plan.paths[self.number]
        text = ""
        try:
            with self.told:
                problem = self.told.read()
            status = self.process.wait()
            seconds = time.monotonic() - self.start
            if status and not problem:
                killed = "its process was killed (was there enough memory?)"
                problem = killed if status == -signal.SIGKILL else f"its process ended with status {status}"
            if problem:
                problem += f"\n  the whole story: {relative(self.log)}"
            elif plan.is_default and path.read_bytes() != plan.originals[self.number]:
                problem = "it was changed while it ran; the change is kept, so run again"
            else:
                text = (self.folder / notebooks.TARGET).read_text(encoding="utf-8")
                self._publish(text, seconds)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)  # the next run removes what is left
        return seconds, problem, text.count(f'"{FAILED_CHECK}')  # lines of outputs stand in quotes

    def _publish(self, text: str, seconds: float) -> None:
        plan, number = self.plan, self.number
        moves: dict[Path, Path] = {}
        for shown, real in ((self.folder / "results", RESULTS), (self.folder / "figures", FIGURES)):
            states = _files(shown).items()
            moves |= {real / name: shown / name for name, state in states if self.before.get(name) != state}
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
        """End the notebook and its kernel, in 10 s at most, and remove its stage."""
        with self.told:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _files(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Every file below, without following links to folders, with what changes when it is written."""
    found = [Path(parent, name) for parent, _, own in os.walk(folder) for name in own]
    states = {path.relative_to(folder): path.stat() for path in found}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in states.items()}


def default_jobs(plan: Plan) -> int:
    """Two notebooks at once for a small model on a processor with two cores, each with one thread, and memory for both."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    has_room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > FOR_TWO and n_cores > 1
    return 2 if is_small(plan.parameters["MODEL"]) and plan.parameters["DEVICE"] == "cpu" and has_room else 1


def run_notebooks(plan: Plan, numbers: Sequence[str], made_from: Mapping[str, str | None], jobs: int = 0) -> int:
    """Run the stale ones of `numbers`, `jobs` at once (0: `default_jobs`); returns how many failed or were not started."""
    for number, notebook in plan.notebooks.items():  # papermill only warns of a parameter that a notebook does not know
        if notebooks.notebook_parameters(notebook) != DEFAULTS:
            expected = ", ".join(f"{name} = {value!r}" for name, value in DEFAULTS.items())
            where = relative(plan.paths[number])
            raise InputError(f"{where}: its cell tagged 'parameters' must be exactly: {expected}")
    stale = [number for number in numbers if number in plan.stale]
    with only_run(plan.results):
        for left in (plan.results / STATE).glob("stage*"):  # of a run that was killed
            shutil.rmtree(left)
        done = _run_stale(plan, numbers, stale, made_from, jobs or default_jobs(plan))
        if done or not (plan.results / "manifest.json").is_file():
            freshness.write_manifest(plan.results, plan.parameters, freshness.recall(plan.results, "hashes"))
        with only_run(RESULTS, wait=True):
            overview.join_claims(RESULTS)
    return len(stale) - len(done)


def chain(number: str, seconds: Mapping[str, float]) -> float:
    """Seconds from a notebook's start to the end of the longest row of notebooks that wait for one another.

    >>> chain("04", {"04": 300, "04b": 200, "05": 400})
    500
    """
    after = (chain(other, seconds) for other in seconds if number in NEEDS[other])
    return seconds[number] + max(after, default=0)


def _run_stale(
    plan: Plan, numbers: Sequence[str], stale: Sequence[str], made_from: Mapping[str, str | None], jobs: int
) -> list[str]:
    """Start what can start while there is room, first what most has to wait for (`chain`); returns what finished."""
    names = {number: plan.paths[number].stem for number in numbers}
    times = run_times(RESULTS / DEFAULTS["SLUG"]) | run_times(plan.results)
    waits = {number: chain(number, {each: times.get(names[each], 0) for each in stale}) for number in stale}

    def say(number: str, what: str) -> None:
        print(f"[{list(names).index(number) + 1}/{len(names)}] {names[number]} {what}", flush=True)

    for number in numbers:
        if number not in stale:
            say(number, "fresh, skipped")
    order = TopologicalSorter({number: set(NEEDS[number]) & set(stale) for number in stale})
    order.prepare()
    ready, stages = list(order.get_ready()), list[Stage]()
    done, failed = list[str](), list[str]()
    try:
        while ready or stages:
            for number in sorted(ready, key=lambda number: -waits[number])[: jobs - len(stages)]:
                say(number, f"(last time {times[names[number]]} s) ..." if names[number] in times else "...")
                stages.append(Stage(plan, number))
                ready.remove(number)
            for stage in select.select(stages, [], [])[0]:
                stages.remove(stage)
                seconds, problem, wrong = stage.finish()
                if problem:
                    failed.append(names[stage.number])
                    say(stage.number, f"failed after {seconds:.0f} s")
                    print(f"{failed[-1]}: {problem}", file=sys.stderr, flush=True)
                    continue
                freshness.note(plan.results, MADE_FROM, made_from)
                done.append(stage.number)
                order.done(stage.number)
                ready += order.get_ready()
                warning = f"; {wrong} of its checks FAILED, see its outputs" if wrong else ""
                say(stage.number, f"{seconds:.0f} s{warning}")
    finally:
        for stage in stages:
            stage.stop()
    for number in stale:
        if number not in done and names[number] not in failed:
            say(number, f"not started: what it needs failed ({', '.join(failed)})")
    return done
