"""Rates of labelled answers as a notebook shows them: as labelled, and corrected for what is known of the labeller.

Three cases, said in one sentence: the exact judge of the embedded language, a labeller of unknown error, and one whose
accuracy was measured on a sample labelled by hand (`helpers.judge_accuracy`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Bool, Shaped

from helpers import defence_stats, judge_accuracy, judging, stats
from helpers.defence_stats import Change, Z
from helpers.errors import InputError
from helpers.judge_accuracy import FILE, PHRASES, Accuracy, Measured
from helpers.paths import RESULTS, check_slug, relative

EXACT = "labels are facts of the grammar: an exact judge, no error to correct for"
COLUMNS = ["group", "n", "labelled", "low", "high", "corrected", "corrected_low", "corrected_high"]
Triple = tuple[float, float, float]


def stated(groups: Mapping[str, Bool[np.ndarray, "answer"]], slug: str, *, exact: bool) -> tuple[pd.DataFrame, str]:
    """The rate of each group of labels (True: does what was asked) and one sentence on who labelled, of the run `slug`.

    Columns (`COLUMNS`): the labelled rate with Wilson's interval over answers, and the rate corrected for the labeller's
    known mistakes (`judging.corrected_rate`); NaN where they are not known, the labelled one where the judge is `exact`.
    A group without answers has no row. Raises InputError for a `judge.json` that is torn or another judge's.
    """
    measured = None if exact else _measured(slug)
    rows = []
    for name, labels in groups.items():
        if len(labels):
            hits = np.asarray(labels, dtype=bool)
            labelled = (float(hits.mean()), *stats.wilson(int(hits.sum()), len(hits)))
            known = None if measured is None else judging.corrected_rate(hits, measured.accuracy)
            rows.append((name, len(hits), *labelled, *_corrected(labelled, known, exact)))
    return pd.DataFrame(rows, columns=COLUMNS), labeller(measured, exact=exact)


def differences(
    groups: Mapping[str, tuple[Bool[np.ndarray, "answer"], Bool[np.ndarray, "answer"]]],
    topic: Shaped[np.ndarray, "answer"], slug: str, *, exact: bool,
) -> tuple[pd.DataFrame, str]:  # fmt: skip
    """The same of differences of rates on the same prompts, first - second of each pair of labels, as shares.

    The labelled difference has the interval of `defence_stats.rate_change` (topics drawn; at least Newcombe's), the
    corrected one that of `corrected_difference`. `topic` is the prompts' and holds for every group; one topic alone gives
    no row, for there is nothing to draw.
    """
    measured = None if exact else _measured(slug)
    rows = []
    for name, (one, other) in groups.items() if len(set(topic)) > 1 else ():
        change = defence_stats.rate_change(np.asarray(other, dtype=bool), np.asarray(one, dtype=bool), topic)
        labelled = (change.estimate / 100, change.low / 100, change.high / 100)
        known = None if measured is None else corrected_difference(Change(*labelled, change.n, 0), measured.accuracy)
        rows.append((name, change.n, *labelled, *_corrected(labelled, known, exact)))
    return pd.DataFrame(rows, columns=COLUMNS), labeller(measured, exact=exact)


def corrected_difference(change: Change, known: Accuracy, n_draws: int = 10_000, seed: int = 0) -> Triple:
    """The true difference of two rates (shares) behind a labelled one: difference / (sensitivity + specificity - 1).

    Valid where the labeller errs alike on both sides. The 95 % interval carries that of the labelled difference (a normal
    error on either side of it) and the uncertainty of the accuracy (Beta draws with Jeffreys' prior), clipped to [-1, 1].
    Raises InputError for a labeller that is no better than chance.
    """
    gain, rng = judging.informed(known), np.random.default_rng(seed)
    z = rng.standard_normal(n_draws)
    drawn = change.estimate + z / Z * np.where(z < 0, change.estimate - change.low, change.high - change.estimate)
    counts = ((known.found, known.n_true), (known.cleared, known.n_false))
    gains = sum(rng.beta(k + 0.5, n - k + 0.5, n_draws) for k, n in counts) - 1
    # Where a draw has no information the truth may be anything.
    truth = np.where(gains > 0, drawn / np.where(gains > 0, gains, 1), rng.uniform(-1, 1, n_draws))
    low, high = np.quantile(np.clip(truth, -1, 1), [0.025, 0.975])
    return float(np.clip(change.estimate / gain, -1, 1)), float(low), float(high)


def labeller(measured: Measured | None, *, exact: bool) -> str:
    """One sentence: who labelled, and what is known of the labeller's error."""
    if exact:
        return EXACT
    name = judge_accuracy.judge_name()
    if measured is None and name == PHRASES:
        return judging.KNOWN_ERROR
    if measured is None:
        return f"labels are the word of the judge model {name}, which errs as well; {judging.NO_SAMPLE}"
    known = measured.accuracy
    return (
        f"labels by {name}: sensitivity {known.sensitivity:.2f} ({known.found} of {known.n_true}), specificity "
        f"{known.specificity:.2f} ({known.cleared} of {known.n_false}), measured on greedy answers of the unchanged model "
        "that were labelled by hand, and taken to be the same in every group"
    )


def _measured(slug: str) -> Measured | None:
    """The run's measured accuracy; the runner has compared model and prompts, the judge is that of this process."""
    folder = RESULTS / check_slug(slug)
    found = judge_accuracy.read(folder)
    name = judge_accuracy.judge_name()
    if found is not None and found.source.judge != name:
        raise InputError(
            f"{relative(folder / FILE)} has the accuracy of {found.source.judge}, but {name} labels here: measure that "
            "one (python -m helpers.judge_check), or remove the file"
        )
    return found


def _corrected(labelled: Triple, known: Triple | None, exact: bool) -> Triple:
    return labelled if exact else known or (np.nan, np.nan, np.nan)
