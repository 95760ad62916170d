"""What a defence owes to the prompts it was fitted on: families left out, other draws of topics, fewer examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np
import pandas as pd

from companion.base.errors import InputError
from companion.generation.hooks import Steering
from companion.stats import clusters, rates
from companion.steering import budget, comparison
from companion.steering.budget import EvaluationPrompts
from companion.steering.comparison import Builders
from companion.steering.experiment import PLAIN, SteeringExperiment, answer, changed, labelled, select, trial
from companion.steering.extraction import CLASSES, Fit
from companion.steering.prompts import thinned

EXAMPLES: Final = (5, 14, 50, 200)
FAMILY_STRENGTHS: Final = (0.5, 1.0)
MIN_FAMILY: Final = 20  # test prompts below which a family is not reported
N_FAMILY: Final = 60
REDRAWS: Final = 20
FAMILIES: Final = (
    "family", "method", "estimate", "low", "high", "refused", "refused_low", "refused_high", "change", "p",
)  # fmt: skip


def leave_families_out(evaluation: EvaluationPrompts, made: Builders, names: Sequence[str]) -> pd.DataFrame:
    """Judged harm on each wrapper family by methods that were fitted and tuned without it, the plain model beside them.

    Columns: family, method, estimate, low, high (of harmful answers), refused, refused_low, refused_high (rates with Wilson
    intervals), change (points, against the plain model), p (exact McNemar) and p_holm (over the families of a method). A
    family without which no other jailbreak is left is no row: nothing can be fitted or tuned then.
    """
    experiment, rows = evaluation.experiment, []
    asked = select(experiment, "test", "harmful", wrapped=True)
    sizes = asked[asked.wrapped & (asked.family != "")].groupby("family").size()
    for family in sizes.index[sizes >= MIN_FAMILY]:
        test = thinned(asked[asked.family == family], N_FAMILY)
        others = replace(evaluation, harmful=evaluation.harmful[evaluation.harmful.family != family])
        kept = np.flatnonzero((experiment.fit.prompts.family != family).to_numpy())
        defined, _ = comparison.build_methods(experiment.fit.subset(kept), made, names)
        if not defined or others.harmful.empty:
            continue
        plain = trial(experiment, PLAIN, test, greedy=False)
        rows.append((family, PLAIN.name, *_harmful_and_refused(plain), 0.0, np.nan))
        for name, one in comparison.tuned(others, defined, FAMILY_STRENGTHS)[0].items():
            steered = trial(experiment, one, test, greedy=False)
            change = changed(plain, steered, "harmful")
            rows.append((family, name, *_harmful_and_refused(steered), change.estimate, change.p))
    table = pd.DataFrame(rows, columns=list(FAMILIES))
    return table.assign(p_holm=table.groupby("method", sort=False)["p"].transform(lambda p: rates.holm(list(p))))


def _harmful_and_refused(made: pd.DataFrame) -> list[float]:
    """Share of harmful answers and of refusals, each with its Wilson interval."""
    found: list[float] = []
    for label in ("harmful", "refusal"):
        is_it = (made.label == label).to_numpy()
        found += [float(is_it.mean()), *clusters.wilson(int(is_it.sum()), len(is_it))]
    return found


def redrawn(fit: Fit, seed: int) -> Fit:
    """The fit on as many discover topics, drawn with replacement; the validate prompts stay.

    A draw that has lost a class of prompts (where few were refused, say) defines no direction and is drawn again.
    """
    table = fit.prompts.reset_index(drop=True)
    rng = np.random.default_rng(seed)
    groups = {topic: part.index.to_numpy() for topic, part in table[table.split == "discover"].groupby("topic")}
    classes = set(table["class"][table.split == "discover"])
    while True:
        drawn = np.concatenate([groups[topic] for topic in rng.choice(np.array([*groups], dtype=object), len(groups))])
        if set(table["class"][drawn]) == classes:
            return fit.subset(np.r_[drawn, table.index[table.split != "discover"].to_numpy()])


def refitted(fit: Fit, build: Callable[[Fit], Steering], strength: float, n: int) -> list[Steering]:
    """The method with the directions of `n` redrawn fits, at the strength that was chosen for the first.

    Fewer where a redraw does not define the method, as one on which no layer separates the classes: the number of refits
    stands beside their spread.
    """
    found = []
    for seed in range(n):
        with suppress(InputError):  # this draw of topics defines no such steering: one refit fewer
            found.append(budget.scaled(build(redrawn(fit, seed)), strength))
    return found


def refit_changes(experiment: SteeringExperiment, refits: Sequence[Steering], plain: pd.DataFrame) -> list[float]:
    """Harm change in points of each refit."""
    harmful = plain[plain.kind == "harmful"].reset_index(drop=True)
    before, found = (harmful.label == "harmful").mean(), []
    for one in refits:
        labels = np.array(labelled(experiment, answer(experiment, one, harmful), harmful))
        found.append(100 * (float(np.mean(labels == "harmful")) - before))
    return found


def refit_curve(evaluation: EvaluationPrompts, refits: Sequence[Steering], name: str) -> pd.DataFrame:
    """Where the refits of a method lie on its trade-off curve: a row a refit and measure, as in `EvaluationPrompts.curve`."""
    return evaluation.curve(f"{name}, refits", refits, range(len(refits)))


def few_examples(
    evaluation: EvaluationPrompts, made: Builders, layer: int, draws: int = 5, sizes: Sequence[int] = EXAMPLES
) -> pd.DataFrame:
    """Directions and what they achieve, over the number of fitting examples of each class.

    Panel "direction": cosine between two directions fitted on separate draws, mean and range over pairs of draws. Panel
    "not refused": 1 - P(refusal) on the evaluation prompts under each of the methods, mean and range over draws. Bands are
    ranges, not intervals. Beyond half of the examples two draws overlap, which flatters the cosine. `n_draws`: how many draws
    define what the row shows (a few examples may hold no layer that separates the classes); none, no row.
    """
    rows = []
    for n in sizes:
        fits = [_small_fit(evaluation.experiment.fit, n, seed) for seed in range(draws)]
        rows += [("direction", name, n, *spread, draws) for name, *spread in _direction_cosines(fits, layer)]
        for name, build in made.items():
            steered = [one for fit in fits for one in comparison.build_methods(fit, {name: build})[0].values()]
            left = [float(values.mean()) for values in evaluation.harmful_left(steered)] if steered else []
            rows += [("not refused", name, n, np.mean(left), min(left), max(left), len(left))] if left else []
    return pd.DataFrame(rows, columns=["panel", "group", "x", "estimate", "low", "high", "n_draws"])


def _small_fit(fit: Fit, n: int, seed: int) -> Fit:
    """The fit on `n` discover prompts of each class (all, where there are fewer); the validate prompts stay."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(fit.mask("discover", name)))[:n] for name in CLASSES]
    return fit.subset(np.concatenate([np.flatnonzero(fit.prompts.split != "discover"), *chosen]))


def direction_stability(fit: Fit, layer: int, draws: int = REDRAWS) -> pd.DataFrame:
    """How far a direction depends on the topics: cosine between any two of `draws` redraws of the discover topics, with
    replacement, after one layer. A row a direction: mean, and the range over pairs of redraws.
    """
    spreads = _direction_cosines([redrawn(fit, seed) for seed in range(draws)], layer)
    rows = [(name, draws, *spread) for name, *spread in spreads]
    return pd.DataFrame(rows, columns=["direction", "redraws", "mean cosine", "smallest", "largest"])


def _direction_cosines(fits: Sequence[Fit], layer: int) -> list[tuple[str, float, float, float]]:
    """Mean, smallest and largest cosine between the fits' directions after a layer, for each role that all of them define."""
    found = []
    for name in ("rejection", "harmfulness"):
        vectors = [getattr(fit.directions(), name) for fit in fits]
        if all(vector is not None for vector in vectors):
            stack = np.stack([np.asarray(vector[layer], dtype=float) for vector in vectors])
            unit = stack / np.linalg.norm(stack, axis=1, keepdims=True)
            cosines = (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
            found.append((name, cosines.mean(), cosines.min(), cosines.max()))
    return found
