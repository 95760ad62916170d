"""What is up to date: a notebook is fresh if everything that its results rest on is as it was when they were made.

What a run's results were made from and how long it took.

`manifest.json` is deterministic apart from the git commit; times vary from run to run and stand in `run_times.json`.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from companion.base import files, hub
from companion.base.errors import InputError
from companion.base.files import KnownHashes, digest, hash_file, hash_folder, read_json, write_json
from companion.base.folders import model_folder, prompts_folder
from companion.base.paths import FIGURES, ROOT
from companion.generation import accuracy
from companion.run import notebooks
from companion.run.notebooks import code_cells, source

STATE = ".state"  # the folder of a run's own notes, inside its results; not committed


def keys(
    notebooks: Mapping[str, notebooks.Notebook],
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
        code = [source(cell) for cell in code_cells(notebook)]
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

    >>> from companion.base.paths import RESULTS
    >>> [_is_shared(name, RESULTS / "x") for name in ("02.csv", "../claims.csv", "../y/02.csv")]
    [False, True, True]
    >>> [_is_shared(os.path.relpath(FIGURES / name, RESULTS / "x"), RESULTS / "x") for name in ("x/02.png", "INDEX.md")]
    [False, True]
    """
    path = Path(os.path.normpath(results / name))
    return not (path.is_relative_to(results) or path.is_relative_to(FIGURES / results.name))


SEED = 0


# What results depend on. Notebooks change by their outputs in each run, and they are their own record.
CODE = ("helpers", "companion", "organisms", "data", "requirements.lock")


def requirement_names(path: Path) -> list[str]:
    """The package names of a requirements file, in its order.

    >>> requirement_names(ROOT / "requirements.in")[:2]
    ['torch', 'transformers']
    """
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [re.split(r"[\s\[<>=!~;]", line)[0] for line in lines if line]


def write_manifest(results: Path, parameters: Mapping[str, Any], known: KnownHashes) -> None:
    """Write `manifest.json` into the run's results, and note its hash, so that damage to it is seen."""
    model, prompts = model_folder(parameters["MODEL"]), prompts_folder(parameters["PROMPTS"])
    settings = ("DEVICE", "DTYPE", "PROFILE", "PAIRS")
    chunks = results / "chunks.json"
    content = {
        "model": _model(parameters["MODEL"], model, known),
        "prompts": {"name": prompts.name, "sha256": hash_folder(prompts, known)},
        **{name.lower(): parameters[name] for name in settings},
        **_judge(results),
        "seed": SEED,
        "chunk_sizes": read_json(chunks) if chunks.is_file() else None,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "packages": {name: _release(name) for name in requirement_names(ROOT / "requirements.in")},
        "processor": processor(),
        "git": git_state(ROOT),
        "seconds": "run_times.json",
    }
    path = write_json(content, results / "manifest.json")
    note(results, "manifest", {"sha256": files.hash_file(path, {})})


def is_as_written(results: Path) -> bool:
    """Whether `manifest.json` is there as the last run wrote it."""
    path = results / "manifest.json"
    return path.is_file() and recall(results, "manifest").get("sha256") == files.hash_file(path, {})


def _model(given: str, folder: Path, known: KnownHashes) -> dict[str, Any]:
    """Name and file hashes; of a model of the hub also its id and commit, and whether its own code was allowed to run."""
    found: dict[str, Any] = {"name": folder.name, "sha256": hash_folder(folder, known)}
    hub_id = hub.parse(given)
    if hub_id is not None and folder.is_relative_to(hub.cache()):
        found |= {"name": hub_id.repo, "revision": folder.name}
    return found | ({"remote_code": True} if hub.trusts_code() else {})


def _judge(results: Path) -> dict[str, str]:
    """The judge model that labels answers, where one was chosen, and the sha256 of its measured accuracy, where there is one."""
    found = {"judge": accuracy.judge_name()} if os.environ.get(hub.JUDGE) else {}
    measured = results / accuracy.FILE
    return found | ({"judge_accuracy": files.hash_file(measured, {})} if measured.is_file() else {})


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What rounds the last bits: the processor's model, and the widest vectors that it computes with."""
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    named = [fields.get(name, "") for name in ("model name", "cpu family", "model")]
    flags = set(fields.get("flags", "").split())
    return ", ".join([*filter(None, named), *(one for one in ("avx2", "avx512f", "amx_bf16") if one in flags)])


def _release(package: str) -> str:
    """The installed version without the build's tag (`+cpu`), which differs between machines."""
    return metadata.version(package).partition("+")[0]


def git_state(root: Path) -> dict[str, Any] | None:
    """The commit that last changed code or data, and whether they were changed since; None outside of git."""
    commit = _git(root, "log", "-1", "--format=%H", "--", *CODE)
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain", "--", *CODE))}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a machine without git: a downloaded archive runs there as well
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def run_times(results: Path) -> dict[str, int]:
    """Seconds that each notebook last took, by its name; empty before the first run.

    They are only shown, so a damaged file costs no more than the times in it.
    """
    try:
        found = read_json(results / "run_times.json")
    except InputError:
        return {}
    return {name: value for name, value in found.items() if _is_time(value)} if isinstance(found, dict) else {}


def _is_time(value: object) -> bool:
    return type(value) is int and 0 < value < 10**9


def mend_times(results: Path) -> None:
    """Write a damaged `run_times.json` anew with what can be read of it; one that is whole or missing stays so."""
    path, times = results / "run_times.json", run_times(results)
    try:
        whole = not path.is_file() or read_json(path) == times
    except InputError:
        whole = False
    if not whole:
        write_json(times, path)


def note_time(results: Path, name: str, seconds: float) -> None:
    """Write down how long a notebook took."""
    times = run_times(results)
    write_json({**times, name: steady(times.get(name), seconds)}, results / "run_times.json")


def steady(before: int | None, seconds: float) -> int:
    """Whole seconds; what was measured before stays unless it is off by more than a quarter and 3 s.

    A rerun on the same machine then changes no committed file.

    >>> steady(None, 41.3), steady(40, 41.3), steady(40, 61.0)
    (41, 40, 61)
    """
    if before is not None and abs(seconds - before) <= max(3.0, before / 4):
        return before
    return max(1, round(seconds))
