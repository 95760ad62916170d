"""What a run's results were made from and how long it took.

`manifest.json` is deterministic apart from the git commit; times vary from run to run and stand in `run_times.json`.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from helpers import freshness, hub, judge_accuracy
from helpers.errors import InputError
from helpers.freshness import KnownHashes, hash_folder
from helpers.paths import ROOT
from helpers.preflight import model_folder, prompts_folder
from helpers.store import read_json, write_json

SEED = 0
# What results depend on. Notebooks change by their outputs in each run, and they are their own record.
CODE = ("helpers", "data", "requirements.lock")


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
    freshness.note(results, "manifest", {"sha256": freshness.hash_file(path, {})})


def is_as_written(results: Path) -> bool:
    """Whether `manifest.json` is there as the last run wrote it."""
    path = results / "manifest.json"
    return path.is_file() and freshness.recall(results, "manifest").get("sha256") == freshness.hash_file(path, {})


def _model(given: str, folder: Path, known: KnownHashes) -> dict[str, Any]:
    """Name and file hashes; of a model of the hub also its id and commit, and whether its own code was allowed to run."""
    found: dict[str, Any] = {"name": folder.name, "sha256": hash_folder(folder, known)}
    hub_id = hub.parse(given)
    if hub_id is not None and folder.is_relative_to(hub.cache()):
        found |= {"name": hub_id.repo, "revision": folder.name}
    return found | ({"remote_code": True} if hub.trusts_code() else {})


def _judge(results: Path) -> dict[str, str]:
    """The judge model that labels answers, where one was chosen, and the sha256 of its measured accuracy, where there is one."""
    found = {"judge": judge_accuracy.judge_name()} if os.environ.get(hub.JUDGE) else {}
    measured = results / judge_accuracy.FILE
    return found | ({"judge_accuracy": freshness.hash_file(measured, {})} if measured.is_file() else {})


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
