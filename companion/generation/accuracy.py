"""How often a run's labeller is right, and what that makes of the rates of labelled answers.

The accuracy is kept in `results/SLUG/judge.json` (written by `python -m companion.run.judge_check --labels FILE`): counts, names
and hashes, never a text. A rate is shown as labelled and as corrected, in three cases: the exact judge of the embedded language,
a labeller of unknown error, and one whose accuracy was measured on a sample labelled by hand.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped

from companion.base import files, hub
from companion.base.errors import InputError
from companion.base.files import KnownHashes, read_json, write_json
from companion.base.folders import model_folder, prompts_folder, split_adapter
from companion.base.paths import RESULTS, check_slug, relative
from companion.stats import clusters, rates
from companion.stats.rates import Change, Z

FILE = "judge.json"
READERS = ("05", "06")  # the notebooks whose numbers are labelled answers
MIN_LABELS = 5
N_DRAWS = 10_000  # of a labeller's accuracy
PHRASES = "refusal phrases"
_AGAIN = "label a sample (python -m companion.run.judge_check, docs/real_models.md), or remove the file"
NO_SAMPLE = "without a labelled sample (columns id,label) the size of that error is unknown"
KNOWN_ERROR = (
    "labels are matches of refusal phrases: they miss refusals in other words and count an answer that only opens with an "
    f"apology; {NO_SAMPLE}"
)
EXACT = "labels are facts of the grammar: an exact judge, no error to correct for"
COLUMNS = ["group", "n", "labelled", "low", "high", "corrected", "corrected_low", "corrected_high"]
Limits = tuple[float, float, float]  # estimate, low, high
UNKNOWN: Limits = (np.nan, np.nan, np.nan)


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


def shown_source(name: str) -> str:
    """A model's or a prompt set's name without the place where it lies on this machine.

    >>> shown_source("/data/models/mine"), shown_source("org/model@main"), shown_source("embedded")
    ('mine', 'org/model@main', 'embedded')
    """
    base, adapter = split_adapter(name)
    shown = Path(base).name if Path(base).is_absolute() or Path(base).is_dir() else base
    return f"{shown}+{adapter.name}" if adapter else shown


def judge_name() -> str:
    """The labeller in force: a judge model's name, or the phrases."""
    return shown_source(os.environ.get(hub.JUDGE) or PHRASES)


def judge_files(known: KnownHashes) -> list[Any]:
    """The model that labels answers, if one was chosen: its name, and the files of a folder (the hub's has its commit)."""
    judge = os.environ.get(hub.JUDGE)
    if not judge:
        return []
    is_hub = hub.parse(judge) is not None and not Path(judge).is_dir()
    return [shown_source(judge), {} if is_hub else files.hash_folder(model_folder(judge), known)]


def accuracy_source(parameters: Mapping[str, Any], known: KnownHashes) -> Source:
    """What a run labels: its judge in force, its model and its prompts, whose files are hashed."""
    folders = (model_folder(parameters["MODEL"]), prompts_folder(parameters["PROMPTS"]))
    hashes = [files.hash_folder(folder, known) for folder in folders]
    names = (judge_name(), shown_source(parameters["MODEL"]), shown_source(parameters["PROMPTS"]))
    return Source(*names, files.digest(hashes, judge_files(known)))


def write_accuracy(measured: Measured, results: Path) -> Path:
    """Keep it for a run's notebooks; returns the path."""
    content = {"counts": asdict(measured.accuracy), **asdict(measured.source), "labels_sha256": measured.labels}
    return write_json(content, results / FILE)


def read_accuracy(results: Path) -> Measured | None:
    """A run's measured accuracy, None where nobody measured it; `InputError` for a torn or foreign file."""
    path = results / FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        found, source = (
            Accuracy(**content["counts"]),
            Source(**{name: content[name] for name in Source.__annotations__}),
        )
        for n, some in ((found.n_true, found.found), (found.n_false, found.cleared)):
            if type(n) is not int or type(some) is not int or not 0 <= some <= n or n < MIN_LABELS:
                raise ValueError("counts")
        if not all(isinstance(text, str) and text for text in (*asdict(source).values(), content["labels_sha256"])):
            raise ValueError("names")
    except (InputError, KeyError, TypeError, ValueError):
        raise InputError(f"{relative(path)} is torn, or holds no counts of a labeller's accuracy: {_AGAIN}") from None
    return Measured(found, source, content["labels_sha256"])


def own_accuracy(results: Path, parameters: Mapping[str, Any], known: KnownHashes) -> dict[str, Any]:
    """What the notebooks that label answers rest on beside what all do, by number: the measured accuracy, if any.

    `InputError` where it was measured for another model, other prompts or another judge than the run's.
    """
    measured = read_accuracy(results)
    if measured is None:
        return {}
    here, there = accuracy_source(parameters, known), measured.source
    if there != here:
        what = next((n for n, one in asdict(here).items() if getattr(there, n) != one and n != "inputs"), "files")
        was = f"{what} {getattr(there, what)}" if what != "files" else "an earlier state of the model, prompts or judge"
        raise InputError(f"{relative(results / FILE)} was measured for {was}, which is not this run's: {_AGAIN}")
    return {number: [asdict(measured.accuracy), measured.source.judge, measured.labels] for number in READERS}


def accuracy(given: Mapping[str, bool], truth: Mapping[str, bool]) -> Accuracy:
    """A labeller's accuracy on the answers that both have labelled; `InputError` if either kind is rarer than five."""
    common = sorted(set(given) & set(truth))
    said, true = (np.array([labels[id] for id in common], dtype=bool) for labels in (given, truth))
    made = Accuracy(int(true.sum()), int((said & true).sum()), int((~true).sum()), int((~said & ~true).sum()))
    if min(made.n_true, made.n_false) < MIN_LABELS:
        raise InputError(
            f"of the labelled answers {made.n_true} are positive and {made.n_false} negative among those judged; "
            f"label at least {MIN_LABELS} of each"
        )
    return made


def corrected_rates(
    groups: Mapping[str, Bool[np.ndarray, "answer"]], slug: str, *, exact: bool
) -> tuple[pd.DataFrame, str]:
    """The rate of each group of labels (True: does what was asked) and one sentence on who labelled, of the run `slug`.

    Columns (`COLUMNS`): the labelled rate with Wilson's interval over answers, and the rate corrected for the labeller's
    known mistakes (`rogan_gladen`); NaN where they are not known, the labelled one where the judge is `exact`. A group
    without answers has no row. Raises InputError for a `judge.json` that is torn or another judge's.
    """
    measured, rows = None if exact else _measured(slug), []
    for name, labels in groups.items():
        if len(labels):
            hits = np.asarray(labels, dtype=bool)
            labelled = clusters.rate(int(hits.sum()), len(hits))
            known = UNKNOWN if measured is None else rogan_gladen(hits, measured.accuracy)
            rows.append((name, len(hits), *labelled, *(labelled if exact else known)))
    return pd.DataFrame(rows, columns=COLUMNS), labeller(measured, exact=exact)


def differences(
    groups: Mapping[str, tuple[Bool[np.ndarray, "answer"], Bool[np.ndarray, "answer"]]],
    topic: Shaped[np.ndarray, "answer"], slug: str, *, exact: bool,
) -> tuple[pd.DataFrame, str]:  # fmt: skip
    """The same of differences of rates on the same prompts, first - second of each pair of labels, as shares.

    The labelled difference has the interval of `rates.rate_change` (topics drawn; at least Newcombe's), the
    corrected one that of `corrected_difference`. `topic` is the prompts' and holds for every group; one topic alone gives
    no row, for there is nothing to draw.
    """
    measured, rows = None if exact else _measured(slug), []
    for name, (one, other) in groups.items() if len(set(topic)) > 1 else ():
        change = rates.rate_change(np.asarray(other, dtype=bool), np.asarray(one, dtype=bool), topic)
        labelled = (change.estimate / 100, change.low / 100, change.high / 100)
        shares = Change(*labelled, change.n, 0)
        known = UNKNOWN if measured is None else corrected_difference(shares, measured.accuracy)
        rows.append((name, change.n, *labelled, *(labelled if exact else known)))
    return pd.DataFrame(rows, columns=COLUMNS), labeller(measured, exact=exact)


def labeller(measured: Measured | None, *, exact: bool) -> str:
    """One sentence: who labelled, and what is known of the labeller's error."""
    if exact:
        return EXACT
    name = judge_name()
    if measured is None and name == PHRASES:
        return KNOWN_ERROR
    if measured is None:
        return f"labels are the word of the judge model {name}, which errs as well; {NO_SAMPLE}"
    known = measured.accuracy
    return (
        f"labels by {name}: sensitivity {known.sensitivity:.2f} ({known.found} of {known.n_true}), specificity "
        f"{known.specificity:.2f} ({known.cleared} of {known.n_false}), measured on greedy answers of the unchanged model "
        "that were labelled by hand, and taken to be the same in every group"
    )


def _measured(slug: str) -> Measured | None:
    """The run's measured accuracy; the runner has compared model and prompts, the judge is that of this process."""
    folder = RESULTS / check_slug(slug)
    found = read_accuracy(folder)
    name = judge_name()
    if found is not None and found.source.judge != name:
        raise InputError(
            f"{relative(folder / FILE)} has the accuracy of {found.source.judge}, but {name} labels here: measure that "
            "one (python -m companion.run.judge_check), or remove the file"
        )
    return found


def rogan_gladen(labels: Bool[np.ndarray, "answer"], known: Accuracy) -> Limits:
    """Rogan-Gladen: the true rate behind a labelled one, (rate + specificity - 1) / (sensitivity + specificity - 1).

    With a 95 % interval that carries the uncertainty of the rate, of the sensitivity and of the specificity (Beta draws
    with Jeffreys' prior), all clipped to [0, 1]. Raises InputError for a labeller that is no better than chance. Source:
    Rogan and Gladen 1978.
    """
    gain = informed(known)
    rng, n, k = np.random.default_rng(0), len(labels), int(np.sum(labels))
    rate = rng.beta(k + 0.5, n - k + 0.5, N_DRAWS)
    sensitivity, specificity = _drawn(known, rng)
    low, high = _interval(rate + specificity - 1, sensitivity + specificity - 1, 0, rng)
    return float(np.clip((k / n + known.specificity - 1) / gain, 0, 1)), low, high


def corrected_difference(change: Change, known: Accuracy) -> Limits:
    """The true difference of two rates (as shares) behind a labelled one: difference / (sensitivity + specificity - 1).

    Valid where the labeller errs alike on both sides. The 95 % interval carries that of the labelled difference (a normal
    error on either side of it) and the uncertainty of the accuracy (Beta draws with Jeffreys' prior), clipped to [-1, 1].
    Raises InputError for a labeller that is no better than chance.
    """
    gain, rng = informed(known), np.random.default_rng(0)
    z = rng.standard_normal(N_DRAWS)
    drawn = change.estimate + z / Z * np.where(z < 0, change.estimate - change.low, change.high - change.estimate)
    sensitivity, specificity = _drawn(known, rng)
    low, high = _interval(drawn, sensitivity + specificity - 1, -1, rng)
    return float(np.clip(change.estimate / gain, -1, 1)), low, high


def _drawn(known: Accuracy, rng: np.random.Generator) -> list[Float[np.ndarray, "draw"]]:
    """Draws of sensitivity and specificity."""
    counts = ((known.found, known.n_true), (known.cleared, known.n_false))
    return [rng.beta(k + 0.5, n - k + 0.5, N_DRAWS) for k, n in counts]


def _interval(
    labelled: Float[np.ndarray, "draw"], gains: Float[np.ndarray, "draw"], least: float, rng: np.random.Generator
) -> tuple[float, float]:
    """95 % limits of draws divided by what a labeller keeps of a difference; the truth lies between `least` and 1."""
    # Where a draw has no information the truth may be anything.
    truth = np.where(gains > 0, labelled / np.where(gains > 0, gains, 1), rng.uniform(least, 1, len(gains)))
    low, high = np.quantile(np.clip(truth, least, 1), [0.025, 0.975])
    return float(low), float(high)


def informed(known: Accuracy) -> float:
    """Sensitivity + specificity - 1, by which a labeller shrinks every difference; InputError if it is not above 0."""
    gain = known.sensitivity + known.specificity - 1
    if gain <= 0:
        raise InputError(
            f"sensitivity {known.sensitivity:.2f} and specificity {known.specificity:.2f}: this labeller is no better than "
            "chance, so no rate can be corrected; use another judge"
        )
    return gain
