"""A notebook's files take their place only when it has finished: it writes into a stage, a failure leaves nothing.

Run the notebooks that are not up to date, each in its own process, in the order of what they need.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from companion.base import files
from companion.base.errors import InputError
from companion.base.files import write_text
from companion.base.folders import model_folder, prompts_folder
from companion.base.paths import CODE, DATA, FIGURES, NOTEBOOKS, PARTS, RESULTS, ROOT, relative
from companion.generation import accuracy
from companion.run import freshness, notebooks
from companion.run.freshness import STATE, is_as_written, mend_times, note_time, run_times, write_manifest
from companion.run.notebooks import Notebook, read_notebook

_KEPT_OUT = (STATE, "logs", "notebooks", PARTS)  # the runner's own folders inside a run's results


_SCRATCH = re.compile(
    r"\..+\.\d+-[0-9a-f]{8}(\.\w+)?"
)  # the names that companion.base.files gives to files half written


@dataclass(frozen=True)
class Stage:
    """One staged folder: `shown` is what the notebook sees in place of `real`."""

    real: Path
    shown: Path
    before: dict[Path, tuple[int, ...]]

    def written(self) -> list[Path]:
        """Every file that the notebook wrote, by the place that it will take."""
        return [self.real / name for name, state in _files(self.shown).items() if self.before.get(name) != state]

    def overtaken(self) -> list[Path]:
        """Files that all runs share which a run of another name replaced, by something else, since this stage was made."""
        return [path for path in self.written() if path.parent == self.real and path.is_file() and self._is_other(path)]

    def _is_other(self, path: Path) -> bool:
        stat, before = path.stat(), self.before.get(Path(path.name))  # a copy has the size and time of what was copied
        is_same = before is not None and before[1:] == (stat.st_size, stat.st_mtime_ns)
        return not is_same and path.read_bytes() != (self.shown / path.name).read_bytes()

    def publish(self) -> None:
        """Move what the notebook wrote into its place."""
        for target in self.written():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.shown / target.relative_to(self.real), target)


def tidy(folders: Iterable[Path]) -> None:
    """Remove what a killed run left in these folders: stages, and files that had not taken their place yet."""
    for folder in folders:
        for left in folder.glob(f"{STATE}/stage*"):
            shutil.rmtree(left)
        for left in [*folder.glob(".*"), *folder.glob(f"{STATE}/.*")]:
            if _SCRATCH.fullmatch(left.name) and left.is_file():
                left.unlink()


@contextmanager
def staged(real: Path, slug: str) -> Iterator[Stage]:
    """A scratch view of `real` (the folder of all results, or of all figures) for the run `slug`.

    The run's own files are copies, so that no earlier file is touched even by a writer that changes it in place;
    the folders of other runs are links, for reading.
    """
    home = real / slug / STATE  # on the same disk, so that publishing is a rename
    # A name of its own: what a killed run's notebook still writes for a moment never gets into this one's.
    shown = home / f"stage-{os.getpid()}-{secrets.token_hex(4)}"
    shown.mkdir(parents=True)
    try:
        for path in real.iterdir():
            if path.name == slug:
                shutil.copytree(path, shown / slug, ignore=shutil.ignore_patterns(*_KEPT_OUT, ".*"))
                if (path / PARTS).is_dir():
                    (shown / slug / PARTS).symlink_to(path / PARTS, target_is_directory=True)
            elif path.is_dir():
                (shown / path.name).symlink_to(path, target_is_directory=True)
            else:
                shutil.copy2(path, shown / path.name)
        yield Stage(real, shown, _files(shown))
    finally:
        shutil.rmtree(shown, ignore_errors=True)  # the next run removes what is left


def _files(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Every file below, without following links to folders, with what changes when it is written."""
    found: dict[Path, tuple[int, ...]] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            stat = path.stat()
            found[path.relative_to(folder)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


# Each notebook and those that it needs: it reads their results, or, of 01, takes the model and prompts as checked. 00 is the
# first to read and the last to run: it reports the run.
NEEDS: dict[str, tuple[str, ...]] = {
    "01": (),
    "02": ("01",),
    "03": ("02",),
    "04": ("01",),
    "05": ("01",),
    "06": ("01",),
    "07": (),
    "08": ("02", "03", "04", "05", "06", "07"),
    "00": ("08",),
}


MADE_FROM = "made_from"  # a run's note of what it was asked to study, and where that lay


DEFAULTS: dict[str, Any] = {
    "MODEL": "embedded",
    "PROMPTS": "embedded",
    "SLUG": "embedded",
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "PROFILE": "full",
    "PAIRS": 0,
}


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
        """Whether this is the run whose results are committed."""
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
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        number = path.name[:2]
        if number in found:
            raise InputError(f"{relative(path)} and {relative(found[number])} have the same number: rename one")
        if number not in needs:
            raise InputError(
                f"{relative(path)} has no line in NEEDS of companion/run/runner.py: say there what it needs"
            )
        found[number] = path
    sorter = TopologicalSorter({number: needs[number] for number in found})
    sorter.prepare()
    ready: list[str] = []
    ordered: dict[str, Path] = {}
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()])
        number = ready.pop(0)
        sorter.done(number)
        if number in found:
            ordered[number] = found[number]
    return ordered


def make_plan(parameters: Mapping[str, Any], force: Sequence[str] | None = None) -> Plan:
    """Read the notebooks and see what is stale; those in `force` count as stale."""
    paths = find_notebooks(NOTEBOOKS, NEEDS)
    originals = {number: path.read_bytes() for number, path in paths.items()}
    notebooks = {number: read_notebook(path) for number, path in paths.items()}
    results = RESULTS / parameters["SLUG"]
    known: files.KnownHashes = freshness.recall(results, "hashes")
    before = dict(known)
    own = accuracy.own_accuracy(results, parameters, known)
    keys = freshness.keys(notebooks, NEEDS, parameters, _shared_digest(parameters, known), own)
    plan = Plan(parameters, paths, originals, notebooks, keys, frozenset())
    stale = {number for number in paths if number in (force or ()) or not _is_fresh(plan, number, known)}
    if known != before:
        freshness.note(results, "hashes", known)
    return Plan(parameters, paths, originals, notebooks, keys, frozenset(stale))


def _is_fresh(plan: Plan, number: str, known: files.KnownHashes) -> bool:
    executed = plan.executed(number)
    try:
        written = executed.is_file() and notebooks.is_executed(notebooks.read_notebook(executed))
    except InputError:  # a torn copy is made again; a torn notebook of the repository was named before
        return False
    return written and freshness.is_fresh(plan.results, number, plan.keys[number], known)


def _shared_digest(parameters: Mapping[str, Any], known: files.KnownHashes) -> str:
    """What all notebooks rest on: helpers, lock, shipped data, and the model, the prompts and the judge handed in."""
    folders = [DATA]
    given = (model_folder(parameters["MODEL"]), prompts_folder(parameters["PROMPTS"]))
    folders += [folder for folder in given if not folder.is_relative_to(DATA)]
    parts = [files.hash_folder(folder, known, "*.py") for folder in CODE]
    parts += [files.hash_folder(folder, known) for folder in folders]
    return files.digest(parts, files.hash_file(ROOT / "requirements.lock", known), *accuracy.judge_files(known))


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


def run_notebooks(plan: Plan, numbers: Sequence[str], made_from: Mapping[str, str | None]) -> int:
    """Run the stale ones of `numbers`, one line each; returns how many failed or were not started.

    `made_from` is noted with the first result that takes its place: whose results these are (`companion.run.settings.made_from`).
    """
    check_parameters(plan)
    lost: dict[str, str] = {}
    with only_run(plan.results):
        tidy([plan.results, FIGURES / plan.slug, *([NOTEBOOKS] if plan.is_default else [])])
        for place, number in enumerate(numbers, start=1):
            print(f"[{place}/{len(numbers)}] {plan.paths[number].stem}", end=" ", flush=True)
            broken = [need for need in NEEDS[number] if need in lost]
            if broken:
                lost[number] = lost[broken[0]]
                print(f"not started: it needs {lost[number]}, which failed", flush=True)
            elif number not in plan.stale:
                print("fresh, skipped", flush=True)
            elif not _run_one(plan, number, made_from):
                lost[number] = plan.paths[number].stem
        _finish(plan, done=set(numbers) & plan.stale - set(lost))
    return len(lost)


def _finish(plan: Plan, done: set[str]) -> None:
    mend_times(plan.results)
    if done or not is_as_written(plan.results):
        known: files.KnownHashes = freshness.recall(plan.results, "hashes")
        write_manifest(plan.results, plan.parameters, known)


@contextmanager
def only_run(results: Path) -> Iterator[None]:
    """Hold the lock of the run whose results are in `results`, which ends with this process however it ends.

    Raises `InputError` where another process holds it, or where the file system knows no locks.
    """
    folder = results / freshness.STATE
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing {relative(results)}: wait, or choose --name") from None
        except OSError as error:
            why = f"cannot be locked against a second run ({error.strerror})"
            raise InputError(f"{relative(results)} {why}: copy the repository to a disk that has locks") from None
        yield


def _run_one(plan: Plan, number: str, made_from: Mapping[str, str | None]) -> bool:
    """Run one notebook and put its files in place if it finished; says how it went."""
    path, name = plan.paths[number], plan.paths[number].stem
    last = run_times(plan.results).get(name)
    print(f"(last time {last} s) ..." if last else "...", end=" ", flush=True)
    start = time.monotonic()
    with staged(RESULTS, plan.slug) as results, staged(FIGURES, plan.slug) as figures:
        injected = {} if plan.is_default else plan.parameters
        log = plan.results / "logs" / f"{name}.log"
        text, problem = notebooks.execute(plan.notebooks[number], injected, results.shown, figures.shown, log)
        seconds = time.monotonic() - start
        if not problem and plan.is_default and path.read_bytes() != plan.originals[number]:
            problem = "it was changed while it ran; the change is kept, so run again"
        elif not problem and (overtaken := [*results.overtaken(), *figures.overtaken()]):
            problem = f"a run of another name wrote {relative(overtaken[0])} meanwhile, so run again"
        if problem:
            print(f"failed after {seconds:.0f} s", flush=True)
            print(f"{name}: {problem}", file=sys.stderr, flush=True)
            return False
        freshness.note(plan.results, MADE_FROM, made_from)
        outputs = [*results.written(), *figures.written()]
        left = freshness.forget(plan.results, number, outputs)
        results.publish()
        figures.publish()
        for path in left:  # or a later notebook would take them for results of this run
            if path.is_file():
                path.unlink()
        write_text(text, plan.executed(number))
    needs = {need: plan.keys[need] for need in NEEDS[number] if need in plan.keys}
    freshness.remember(plan.results, number, plan.keys[number], outputs, needs)
    note_time(plan.results, name, seconds)
    print(f"{seconds:.0f} s", flush=True)
    return True
