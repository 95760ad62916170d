"""What is up to date, and what a run's results were made from.

A notebook is fresh if all that its results rest on is as it was when they were made, and what it wrote is there unchanged.
`manifest.json` says what the results rest on and is the same for every rerun; seconds vary and stand in `run_times.json`.
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

from companion.base import gguf, hub, smollm2
from companion.base.errors import InputError
from companion.base.files import KnownHashes, digest, hash_file, hash_folder, read_json, write_json
from companion.base.folders import is_on_hub, model_folder, prompts_folder, split_adapter
from companion.base.paths import CODE, DATA, ROOT
from companion.run.notebooks import Notebook, code_cells, source

STATE = ".state"  # the folder of a run's own notes, inside its results; not committed
SEED = 0
# What results depend on. Notebooks change by their outputs in each run, and they are their own record.
TRACKED = (*CODE, DATA, ROOT / "requirements.lock")


def keys(
    notebooks: Mapping[str, Notebook], needs: Mapping[str, Sequence[str]], parameters: Mapping[str, Any], shared: str
) -> dict[str, str]:
    """For each notebook number (in dependency order) the hash of what its results rest on: `shared` is `rests_on`."""
    found: dict[str, str] = {}
    for number, notebook in notebooks.items():
        upstream = [found[need] for need in needs[number] if need in found]
        found[number] = digest([source(cell) for cell in code_cells(notebook)], dict(parameters), shared, upstream)
    return found


def rests_on(parameters: Mapping[str, Any], known: KnownHashes) -> str:
    """One hash of what all notebooks rest on: code, lock, shipped data, and the files of model, prompts and judge."""
    _, adapter = split_adapter(parameters["MODEL"])
    given = (model_folder(parameters["MODEL"]), prompts_folder(parameters["PROMPTS"]), adapter, gguf.tokenizer_folder())
    foreign = [hash_folder(folder, known) for folder in given if folder and not folder.is_relative_to(DATA)]
    code = [hash_folder(folder, known, "*.py") for folder in CODE]
    lock = hash_file(ROOT / "requirements.lock", known)
    judge = os.environ.get(hub.JUDGE)
    files = hash_folder(model_folder(judge), known) if judge and not is_on_hub(judge) else None
    return digest(code, hash_folder(DATA, known), foreign, lock, judge, files)


def recall(results: Path, name: str) -> dict[str, Any]:
    """A note of the run whose results are in `results`; a missing or torn one is empty, it only costs time."""
    return _noted(results / STATE / f"{name}.json")


def _noted(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}


def note(results: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write a note of the run."""
    write_json(dict(content), results / STATE / f"{name}.json")


def is_fresh(results: Path, number: str, key: str, known: KnownHashes) -> bool:
    """Whether the notebook finished with this key and everything that it wrote is there as it was written."""
    if recall(results, number).get("key") != key:
        return False
    outputs = _outputs(results, number)
    return all((results / name).is_file() and hash_file(results / name, known) == sha for name, sha in outputs.items())


def remember(results: Path, number: str, key: str, written: Iterable[Path]) -> None:
    """Note that the notebook finished and what it wrote; paths are relative, so that the repository can be moved."""
    hashes = {os.path.relpath(path, results): hash_file(path, {}) for path in sorted(written)}
    note(results, number, {"key": key, "outputs": hashes})


def outdated(results: Path, number: str, written: Iterable[Path]) -> list[Path]:
    """Files that the notebook wrote when it last finished, and which now neither it nor another notebook writes."""
    others = (path.stem for path in (results / STATE).glob("[0-9][0-9]*.json") if path.stem != number)
    kept = {os.path.relpath(path, results) for path in written}.union(*(_outputs(results, other) for other in others))
    return [results / name for name in _outputs(results, number) if name not in kept]


def _outputs(results: Path, number: str) -> dict[str, str]:
    """Hashes of the files that a notebook wrote, by their names from the run's folder; empty if nothing is known."""
    found = recall(results, number).get("outputs")
    return found if isinstance(found, dict) else {}


def requirement_names(path: Path) -> list[str]:
    """The package names of a requirements file, in its order."""
    return re.findall(r"(?m)^\s*([\w.-]+)", path.read_text(encoding="utf-8"))


def write_manifest(results: Path, parameters: Mapping[str, Any], known: KnownHashes) -> None:
    """Write `manifest.json` into the run's results."""
    prompts, judge = prompts_folder(parameters["PROMPTS"]), os.environ.get(hub.JUDGE)
    notes = (results / name for name in ("model_facts.json", "chunks.json"))
    facts, chunks = (read_json(path) if path.is_file() else None for path in notes)
    releases = {name: metadata.version(name) for name in requirement_names(ROOT / "requirements.in")}
    content = {
        "model": _model(parameters["MODEL"], known),
        "prompts": {"name": prompts.name, "sha256": hash_folder(prompts, known)},
        "facts": facts,
        **{name.lower(): parameters[name] for name in ("DEVICE", "DTYPE", "PROFILE", "PAIRS")},
        **({"judge": Path(judge).name if Path(judge).is_absolute() else judge} if judge else {}),
        "seed": SEED,
        "chunk_sizes": chunks,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        # Without the build's tag (+cpu), which differs between machines.
        "packages": {name: release.partition("+")[0] for name, release in releases.items()},
        "processor": processor(),
        "git": git_state(),
        "seconds": "run_times.json",
    }
    write_json(content, results / "manifest.json")


def _model(given: str, known: KnownHashes) -> dict[str, Any]:
    """Name and file hashes; of a model of the hub also its id and commit, and whether its own code was allowed to run."""
    base, adapter = split_adapter(given)
    folder, hub_id = model_folder(base), hub.parse(base)
    tokenizer = gguf.tokenizer_folder() if gguf.is_gguf(folder) else None
    name = base if base == smollm2.NAME else folder.name
    found: dict[str, Any] = {"name": name, "sha256": hash_folder(folder, known)}
    if hub_id is not None and folder.is_relative_to(hub.cache()):
        found |= {"name": hub_id.repo, "revision": folder.name}
    for kind, place in (("tokenizer", tokenizer), ("adapter", adapter)):
        found |= {kind: {"name": place.name, "sha256": hash_folder(place, known)}} if place else {}
    return found | ({"remote_code": True} if hub.trusts_code() else {})


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What rounds the last bits: the processor's model, and the widest vectors that it computes with."""
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    first = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    flags = set(fields.get("flags", "").split())
    named = filter(None, (fields.get(name) for name in ("model name", "cpu family", "model")))
    return ", ".join([*named, *(one for one in ("avx2", "avx512f", "amx_bf16") if one in flags)])


def git_state() -> dict[str, Any] | None:
    """The commit that last changed code or data, and whether they were changed since; None where git knows of none."""
    commit = _git("log", "-1", "--format=%H", "--", *TRACKED)
    return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--", *TRACKED))} if commit else None


def _git(*arguments: str | Path) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a machine without git: a downloaded archive runs there as well
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def run_times(results: Path) -> dict[str, int]:
    """Seconds that each notebook last took, by its name; empty for a damaged file, as they are only shown."""
    return {name: took for name, took in _noted(results / "run_times.json").items() if isinstance(took, int)}


def note_time(results: Path, name: str, seconds: float) -> None:
    """Write down how long a notebook took, in whole seconds."""
    write_json({**run_times(results), name: max(1, round(seconds))}, results / "run_times.json")
