"""A small copy of the repository with toy notebooks, and a stand-in for the hub."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from companion.base.files import write_json
from companion.base.paths import ROOT

# ---- toy repository ----

NEEDS = '{"01": (), "02": ("01",), "03": ("01",), "08": ("02", "03"), "00": ("08",)}'
EMBEDDED = {"MODEL": "embedded", "PROMPTS": "embedded", "SLUG": "embedded", "DEVICE": "cpu", "DTYPE": "float32"}
EMBEDDED |= {"PROFILE": "full", "PAIRS": 0}
DEFAULTS = '{"MODEL": "embedded", "PROMPTS": "embedded", "SLUG": "embedded"}'  # nothing is fetched for a toy
PARAMETERS = "\n".join(f"{name} = {value!r}" for name, value in EMBEDDED.items())
SETUP = """import sys
sys.path.insert(0, "..")
from companion.base import files, paths
from companion.base.errors import InputError
out, figures = paths.results_dir(SLUG), paths.figures_dir(SLUG)"""
CLAIMS = """rows = ["model,claim,verdict", "other,C9,none", "embedded,C1,supported", "embedded,C2,not testable"]
_ = files.write_text("\\n".join(rows) + "\\n", out / "claims.csv")"""


@dataclass(frozen=True)
class Toy:
    """A copy of the repository: its root, and what a test asks of it."""

    root: Path

    def notebook(self, number: str) -> Path:
        return self.root / "notebooks" / f"{number}_toy.ipynb"

    def write(self, number: str, *cells: str, parameters: str = PARAMETERS) -> None:
        """Write a toy notebook: parameters, set-up, then these code cells (one that writes a table by default)."""
        table = f'files.write_text("value\\n{number}\\n", out / "{number}_toy.csv")\nprint("a")\nprint("b")'
        figure = f'_ = files.write_text("svg", figures / "{number}_toy.svg")'
        code = [
            {"cell_type": "code", "source": source, "outputs": [], "execution_count": None}
            | {"metadata": {"tags": ["parameters"]} if source == parameters else {}}
            for source in (parameters, SETUP, *(cells or (table, figure)))
        ]
        heading = {"cell_type": "markdown", "source": f"# Toy {number}\ntext", "metadata": {}}
        content = {"cells": [heading, *code], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        write_json(content, self.notebook(number))

    def run(self, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command, places = [sys.executable, "-m", "companion.run.cli", *flags], environment(**variables)
        return subprocess.run(command, cwd=self.root, env=places, capture_output=True, text=True, check=False)

    def start(self, *flags: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "companion.run.cli", *flags]
        return subprocess.Popen(
            command, cwd=self.root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    def shell(self, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self.root / "run_all.sh"), *flags]
        return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)

    def contents(self) -> dict[str, bytes]:
        """Every file that a user would miss, by its path inside: no logs, times and notes of the runner."""
        paths = [path for own in ("notebooks", "results", "figures") for path in sorted((self.root / own).rglob("*"))]
        named = {path.relative_to(self.root).as_posix(): path for path in paths if path.is_file()}
        left_out = re.compile(r"/\.state/|/logs/|run_times")
        return {name: path.read_bytes() for name, path in named.items() if not left_out.search(name)}


def pair(number: int, treated: str = "say b", control: str = "say a") -> str:
    fields = {"id": f"p{number}", "treatment": "T1", "topic": f"t{number}", "control": control, "treated": treated}
    return json.dumps(fields)


PAIRS = [pair(number) for number in range(12)]


def prompt_set(folder: Path, lines: list[str], outcome: str = '{"comply": ["a"], "refuse": ["b"]}') -> Path:
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "outcome.json").write_text(outcome, encoding="utf-8")
    return folder


def environment(**variables: str) -> dict[str, str]:
    """This process's variables without those that move folders or name an environment; its Python is found first."""
    dropped = ("COMPANION_RESULTS", "COMPANION_FIGURES", "COMPANION_VENV", "COMPANION_CALLER")
    dropped += ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables


def copy_repository(root: Path) -> Toy:
    """The code and the default model of this repository at `root`, with five toy notebooks and no prompts."""
    for name in ("helpers", "companion", "organisms", "data/organism/window-0"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("requirements.in", "requirements.lock", "run_all.sh"):
        shutil.copy2(ROOT / name, root / name)
    for name in ("pairs.jsonl", "outcome.json"):
        write_json({}, root / "data" / "prompts" / "embedded" / name)
    runner = root / "companion" / "run" / "runner.py"  # needs of its own, so that a new notebook changes no test
    code = runner.read_text(encoding="utf-8")
    code = re.sub(r"(?s)(NEEDS: [^=]*= ){.*?\n}", r"\g<1>" + NEEDS, code)
    code = re.sub(r"(DEFAULTS: [^=]*= ){.*}", r"\g<1>" + DEFAULTS, code)
    runner.write_text(code, encoding="utf-8")
    for number in ("00", "01", "02", "03"):
        Toy(root).write(number)
    Toy(root).write("08", CLAIMS)
    return Toy(root)


# ---- hub ----

REPO = "org/tiny"
TEMPLATE = "{% for m in messages %}<s> {{ m.content }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"


def chat_folder(place: Path, family: str = "llama") -> Path:
    """A tiny chat model in bfloat16, as `save_pretrained` writes it, in several shards."""
    from models import tiny_model, tiny_tokenizer  # here, so that a test without models loads no torch

    tokenizer = tiny_tokenizer(place)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    tiny_model(family).bfloat16().save_pretrained(place, max_shard_size="30KB")
    return place


def put(cache: Path, source: Path, names: list[str], commit: str, ref: str | None = "main") -> Path:
    """Store files the way the hub's library does: blobs by hash, a snapshot of links, a ref for the branch."""
    place = cache / "models--org--tiny"
    snapshot = place / "snapshots" / commit
    for name in names:
        blob = place / "blobs" / hashlib.sha256((source / name).read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes((source / name).read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(blob)
    if ref:
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / ref).write_text(commit)
    return snapshot


def serve(monkeypatch: pytest.MonkeyPatch, source: Path, cache: Path, commit: str) -> list[str]:
    """Answer the two questions that are asked of the hub from a folder; returns the list of what gets downloaded."""
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    fetched: list[str] = []

    def names() -> list[str]:
        return [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]

    def model_info(self: object, repo: str, *, revision: str, **_: object) -> SimpleNamespace:
        assert repo == REPO
        listed = [SimpleNamespace(rfilename=name, size=(source / name).stat().st_size) for name in names()]
        return SimpleNamespace(sha=commit, siblings=listed)

    def download(repo: str, *, revision: str, cache_dir: Path, allow_patterns: list, ignore_patterns: list) -> str:
        assert (repo, revision, Path(cache_dir)) == (REPO, commit, cache)
        chosen = list(filter_repo_objects(names(), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        fetched.extend(chosen)
        return str(put(cache, source, chosen, commit, ref=revision if revision != commit else None))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fetched
