"""How often a run's labeller is right, kept in `results/SLUG/judge.json`: counts, names and hashes, never a text.

`python -m helpers.judge_check --labels FILE` writes it. The runner reads it to see what is stale, so this imports nothing
heavy; `helpers.judged` says what the numbers mean for rates.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers import freshness, hub
from helpers.errors import InputError
from helpers.freshness import KnownHashes
from helpers.paths import relative
from helpers.preflight import model_folder, prompts_folder
from helpers.store import read_json, write_json

FILE = "judge.json"
READERS = ("05", "06")  # the notebooks whose numbers are labelled answers
MIN_LABELS = 5
PHRASES = "refusal phrases"
_AGAIN = "label a sample (python -m helpers.judge_check, docs/real_models.md), or remove the file"


@dataclass(frozen=True)
class Accuracy:
    """How a labeller does on answers whose truth is known: of `n_true` true ones it finds `found`, and so on."""

    n_true: int
    found: int
    n_false: int
    cleared: int

    @property
    def sensitivity(self) -> float:
        """Share of true positives that get the label."""
        return self.found / self.n_true

    @property
    def specificity(self) -> float:
        """Share of true negatives that do not."""
        return self.cleared / self.n_false


@dataclass(frozen=True)
class Source:
    """Whose answers a labeller labelled: names for a reader, and `inputs`, one hash of model, prompts and judge."""

    judge: str
    model: str
    prompts: str
    inputs: str


@dataclass(frozen=True)
class Measured:
    """A labeller's accuracy with what it was measured on; `labels` is the sha256 of the file of labels made by hand."""

    accuracy: Accuracy
    source: Source
    labels: str


def shown(name: str) -> str:
    """A model's or a prompt set's name without the place where it lies on this machine.

    >>> shown("/data/models/mine"), shown("org/model@main"), shown("embedded")
    ('mine', 'org/model@main', 'embedded')
    """
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def judge_name() -> str:
    """The labeller in force: a judge model's name, or the phrases."""
    return shown(os.environ.get(hub.JUDGE) or PHRASES)


def judge_files(known: KnownHashes) -> list[Any]:
    """The model that labels answers, if one was chosen: its name, and the files of a folder (the hub's has its commit)."""
    judge = os.environ.get(hub.JUDGE)
    if not judge:
        return []
    is_hub = hub.parse(judge) is not None and not Path(judge).is_dir()
    return [shown(judge), {} if is_hub else freshness.hash_folder(model_folder(judge), known)]


def source(parameters: Mapping[str, Any], known: KnownHashes) -> Source:
    """What a run labels: its judge in force, its model and its prompts, whose files are hashed."""
    folders = (model_folder(parameters["MODEL"]), prompts_folder(parameters["PROMPTS"]))
    hashes = [freshness.hash_folder(folder, known) for folder in folders]
    names = (judge_name(), shown(parameters["MODEL"]), shown(parameters["PROMPTS"]))
    return Source(*names, freshness.digest(hashes, judge_files(known)))


def write(measured: Measured, results: Path) -> Path:
    """Keep it for a run's notebooks; returns the path."""
    content = {"counts": asdict(measured.accuracy), **asdict(measured.source), "labels_sha256": measured.labels}
    return write_json(content, results / FILE)


def read(results: Path) -> Measured | None:
    """A run's measured accuracy, None where nobody measured it; `InputError` for a torn or foreign file."""
    path = results / FILE
    if not path.is_file():
        return None
    try:
        return _parsed(read_json(path))
    except (InputError, KeyError, TypeError, ValueError):
        raise InputError(f"{relative(path)} is torn, or holds no counts of a labeller's accuracy: {_AGAIN}") from None


def _parsed(content: Any) -> Measured:
    """Raises KeyError, TypeError or ValueError for another shape, or counts that cannot be."""
    accuracy = Accuracy(**content["counts"])
    made = Source(**{name: content[name] for name in ("judge", "model", "prompts", "inputs")})
    for n, some in ((accuracy.n_true, accuracy.found), (accuracy.n_false, accuracy.cleared)):
        if type(n) is not int or type(some) is not int or not 0 <= some <= n or n < MIN_LABELS:
            raise ValueError("counts")
    texts = (*asdict(made).values(), content["labels_sha256"])
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("names")
    return Measured(accuracy, made, content["labels_sha256"])


def own(results: Path, parameters: Mapping[str, Any], known: KnownHashes) -> dict[str, Any]:
    """What the notebooks that label answers rest on beside what all do, by number: the measured accuracy, if any.

    `InputError` where it was measured for another model, other prompts or another judge than the run's.
    """
    measured = read(results)
    if measured is None:
        return {}
    here, there = source(parameters, known), measured.source
    if there != here:
        what = next((n for n, one in asdict(here).items() if getattr(there, n) != one and n != "inputs"), "files")
        was = f"{what} {getattr(there, what)}" if what != "files" else "an earlier state of the model, prompts or judge"
        raise InputError(f"{relative(results / FILE)} was measured for {was}, which is not this run's: {_AGAIN}")
    return {number: [asdict(measured.accuracy), measured.source.judge, measured.labels] for number in READERS}
