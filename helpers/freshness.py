"""What is up to date: a notebook is fresh if everything that its results rest on is as it was when they were made."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers import notebook as nb
from helpers.errors import InputError
from helpers.paths import FIGURES
from helpers.store import read_json, write_json

STATE = ".state"  # the folder of a run's own notes, inside its results; not committed
_BIG = 1 << 20  # bytes from which on a file's hash is remembered

# sha256 of big files with the size and the time of change that they had: weights may be many GB
KnownHashes = dict[str, list[Any]]


def hash_file(path: Path, known: KnownHashes) -> str:
    """The file's sha256 in hex; that of a big file is looked up in `known`, or added to it."""
    stat = path.stat()
    if stat.st_size < _BIG:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    name, seen = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    entry = known.get(name)
    if not isinstance(entry, list) or len(entry) != 3 or entry[:2] != seen:
        with path.open("rb") as file:
            known[name] = [*seen, hashlib.file_digest(file, "sha256").hexdigest()]
    return str(known[name][2])


def hash_folder(folder: Path, known: KnownHashes, pattern: str = "*") -> dict[str, str]:
    """sha256 of each file below `folder`, by its path inside; hidden files and caches are left out."""
    inside = {path: path.relative_to(folder) for path in sorted(folder.rglob(pattern)) if path.is_file()}
    kept = {path: name for path, name in inside.items() if not _is_hidden(name)}
    return {name.as_posix(): hash_file(path, known) for path, name in kept.items()}


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def digest(*parts: Any) -> str:
    """One hash of JSON-like values.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def keys(
    notebooks: Mapping[str, nb.Notebook],
    needs: Mapping[str, Sequence[str]],
    parameters: Mapping[str, Any],
    shared: str,
    own: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """For each notebook number (in dependency order) the hash of what its results rest on.

    `shared` stands for the helpers, the lock, the model and the prompts; what a notebook needs enters by its key. `own` is
    what only some notebooks rest on, by number.
    """
    found: dict[str, str] = {}
    for number, notebook in notebooks.items():
        code = [nb.source(cell) for cell in nb.code_cells(notebook)]
        upstream = [found[need] for need in needs[number] if need in found]
        more = [own[number]] if own and number in own else []
        found[number] = digest(code, dict(parameters), shared, upstream, *more)
    return found


def recall(results: Path, name: str) -> dict[str, Any]:
    """A note of the run whose results are in `results`; a missing or torn one is empty, it only costs time."""
    try:
        note = read_json(results / STATE / f"{name}.json")
    except InputError:
        return {}
    return note if isinstance(note, dict) else {}


def note(results: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write a note of the run."""
    write_json(dict(content), results / STATE / f"{name}.json")


def forget(results: Path, number: str, written: Iterable[Path]) -> list[Path]:
    """Note, before it begins, that a notebook's results change; returns those of its earlier files that it did not write now.

    Otherwise a run that is killed between two files would leave a mixture that an earlier code's note calls fresh, or results
    under the manifest of earlier ones. The names of its files, earlier and new, stay known until it has finished. What
    another notebook wrote as well, or what all runs share, is not returned.
    """
    before, now = _outputs(results, number), {os.path.relpath(path, results) for path in written}
    note(results, number, {"key": None, "outputs": dict.fromkeys([*before, *now])})
    note(results, "manifest", {})
    others = (path.stem for path in (results / STATE).glob("[0-9][0-9].json") if path.stem != number)
    kept = now.union(*(_outputs(results, other) for other in others))
    return [results / name for name in before if name not in kept and not _is_shared(name, results)]


def _outputs(results: Path, number: str) -> dict[str, Any]:
    """Hashes of the files that a notebook wrote, by their names from the run's folder; empty if nothing is known."""
    found = recall(results, number).get("outputs")
    return found if isinstance(found, dict) else {}


def is_fresh(results: Path, number: str, key: str, known: KnownHashes) -> bool:
    """Whether the notebook finished with this key and everything that it wrote is there as it was written.

    Files that all runs share (the claims table, the index of figures) must be as the last run of any name left them.
    """
    last = recall(results, number)
    outputs = last.get("outputs")
    if last.get("key") != key or not isinstance(outputs, dict):
        return False
    shared = recall(results.parent, "shared")
    wanted = {name: shared.get(name, sha) if _is_shared(name, results) else sha for name, sha in outputs.items()}
    return all((results / name).is_file() and hash_file(results / name, known) == sha for name, sha in wanted.items())


def is_of_one_run(results: Path, number: str) -> bool:
    """Whether what a notebook wrote rests on what the notebooks that it needs have written since.

    It does not where one of those finished anew and this one did not, or where it was killed while its files changed.
    Results without a note, as those that come with the repository, count as of one run.
    """
    last = recall(results, number)
    if not last:
        return True
    needs = last.get("needs")
    pairs = needs.items() if isinstance(needs, dict) else ()
    rests = all(recall(results, need).get("key") == key and is_of_one_run(results, need) for need, key in pairs)
    return last.get("key") is not None and rests


def remember(results: Path, number: str, key: str, outputs: Iterable[Path], needs: Mapping[str, str]) -> None:
    """Note that the notebook finished, with the keys of those that it needs.

    The paths are kept relative, so that the repository can be moved.
    """
    hashes = {os.path.relpath(path, results): hash_file(path, {}) for path in sorted(outputs)}
    shared = {name: sha for name, sha in hashes.items() if _is_shared(name, results)}
    if shared:
        note(results.parent, "shared", recall(results.parent, "shared") | shared)
    note(results, number, {"key": key, "outputs": hashes, "needs": dict(needs)})


def _is_shared(name: str, results: Path) -> bool:
    """Whether a file, named from a run's folder of results, is none of the run's own.

    >>> from helpers.paths import RESULTS
    >>> [_is_shared(name, RESULTS / "x") for name in ("02.csv", "../claims.csv", "../y/02.csv")]
    [False, True, True]
    >>> [_is_shared(os.path.relpath(FIGURES / name, RESULTS / "x"), RESULTS / "x") for name in ("x/02.png", "INDEX.md")]
    [False, True]
    """
    path = Path(os.path.normpath(results / name))
    return not (path.is_relative_to(results) or path.is_relative_to(FIGURES / results.name))
