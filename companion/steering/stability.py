"""What a defence owes to the prompts it was fitted on: families left out, other draws of topics, fewer examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import pandas as pd

from companion.base.errors import InputError
from companion.generation.hooks import Steering
from companion.stats import clusters, rates
from companion.steering import budget, comparison, experiment, extraction, prompts
from companion.steering.budget import EvaluationPrompts
from companion.steering.experiment import PLAIN, SteeringExperiment
from companion.steering.extraction import Fit

Builders = Mapping[str, Callable[[Fit], Steering]]


EXAMPLES: Final = (5, 14, 50, 200)


CLASSES: Final = ("refused", "complied", "benign")


FAMILY_STRENGTHS: Final = (0.5, 1.0)


MIN_FAMILY: Final = 20  # test prompts below which a family is not reported


N_FAMILY: Final = 60


REDRAWS: Final = 20


def families(lab: SteeringExperiment) -> list[str]:
    """Wrapper families with enough wrapped harmful prompts in the test split."""
    wrapped = experiment.select(lab, "test", "harmful", wrapped=True)
    sizes = wrapped[wrapped.wrapped & (wrapped.family != "")].groupby("family").size()
    return [str(name) for name in sizes.index[sizes >= MIN_FAMILY]]


def leave_families_out(
    lab: SteeringExperiment, fit: Fit, made: Builders, names: Sequence[str], on: EvaluationPrompts
) -> pd.DataFrame:
    """Judged harm on each wrapper family by methods that were fitted and tuned without it, the plain model beside them.

    Columns: family, method, estimate, low, high (of harmful answers), refused, refused_low, refused_high (rates with Wilson
    intervals), change (points, against the plain model), p (exact McNemar) and p_holm (over the families of a method). A
    family without which no other jailbreak is left is no row: nothing can be fitted or tuned then.
    """
    rows = []
    for family in families(lab):
        test = experiment.select(lab, "test", "harmful", wrapped=True)
        test = prompts.thinned(test[test.family == family], N_FAMILY)
        kept = np.flatnonzero((fit.prompts.family != family).to_numpy())
        others = replace(on, harmful=on.harmful[on.harmful.family != family])
        chosen, _ = comparison.arms(extraction.fit_of(fit, kept), made, names)
        if not chosen or others.harmful.empty:
            continue
        plain = experiment.trial(lab, PLAIN, test, greedy=False)
        rows.append((family, PLAIN.name, *_rates(plain), 0.0, np.nan))
        for name, one in comparison.tuned(lab, chosen, others, FAMILY_STRENGTHS)[0].items():
            steered = experiment.trial(lab, experiment.arm_of(lab.subject, one), test, greedy=False)
            change = experiment.changed(plain, steered, "harmful")
            rows.append((family, name, *_rates(steered), change.estimate, change.p))
    refused = ["refused", "refused_low", "refused_high"]
    columns = ["family", "method", "estimate", "low", "high", *refused, "change", "p"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=table.groupby("method", sort=False)["p"].transform(lambda p: rates.holm(list(p))))


def _rates(trial: pd.DataFrame) -> list[float]:
    """Share of harmful answers and of refusals, each with its interval."""
    made: list[float] = []
    for label in ("harmful", "refusal"):
        is_it = (trial.label == label).to_numpy()
        made += [float(is_it.mean()), *clusters.wilson(int(is_it.sum()), len(is_it))]
    return made


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
            return extraction.fit_of(fit, np.r_[drawn, table.index[table.split != "discover"].to_numpy()])


def refitted(fit: Fit, build: Callable[[Fit], Steering], strength: float, n: int = 10) -> list[Steering]:
    """The method with the directions of `n` redrawn fits, at the strength that was chosen for the first.

    Fewer where a redraw does not define the method, as one on which no layer separates the classes: the number of refits
    stands beside their spread.
    """
    found = []
    for seed in range(n):
        try:
            found.append(budget.scaled(build(redrawn(fit, seed)), strength))
        except InputError:
            continue  # this draw of topics defines no such steering: one refit fewer
    return found


def refit_changes(lab: SteeringExperiment, refits: Sequence[Steering], plain: pd.DataFrame) -> list[float]:
    """Harm change in points of each refit."""
    harmful = plain[plain.kind == "harmful"].reset_index(drop=True)
    before = (harmful.label == "harmful").mean()
    found = []
    for one in refits:
        labels = experiment.labelled(lab, experiment.answer(lab, experiment.arm_of(lab.subject, one), harmful), harmful)
        found.append(100 * (float(np.mean(np.array(labels) == "harmful")) - before))
    return found


def refit_curve(lab: SteeringExperiment, refits: Sequence[Steering], name: str, on: EvaluationPrompts) -> pd.DataFrame:
    """Where the refits of a method lie on its trade-off curve: a row a refit and measure, as in `budget.curve`."""
    return budget.points(lab, f"{name}, refits", refits, range(len(refits)), on)


def small_fit(fit: Fit, n: int, seed: int) -> Fit:
    """The fit on `n` discover prompts of each class (all, where there are fewer); the validate prompts stay."""
    table = fit.prompts.reset_index(drop=True)
    rng = np.random.default_rng(seed)
    chosen = [table.index[table.split != "discover"].to_numpy()]
    for name in CLASSES:
        members = table.index[(table.split == "discover") & (table["class"] == name)].to_numpy()
        chosen.append(rng.permutation(members)[:n])
    return extraction.fit_of(fit, np.concatenate(chosen))


def examples(
    lab: SteeringExperiment,
    fit: Fit,
    made: Builders,
    layer: int,
    on: EvaluationPrompts,
    draws: int = 5,
    sizes: Sequence[int] = EXAMPLES,
) -> pd.DataFrame:
    """Directions and what they achieve, over the number of fitting examples of each class.

    Panel "direction": cosine between two directions fitted on separate draws, mean and range over pairs of draws. Panel
    "not refused": 1 - P(refusal) on the bench under each of the methods, mean and range over draws. Bands are ranges,
    not intervals. Beyond half of the examples two draws overlap, which flatters the cosine. `n_draws`: how many draws
    define what the row shows (a few examples may hold no layer that separates the classes); none, no row.
    """
    rows = []
    for n in sizes:
        fits = [small_fit(fit, n, seed) for seed in range(draws)]
        for name in ("rejection", "harmfulness"):
            vectors = [getattr(extraction.fit_directions(one), name) for one in fits]
            if all(vector is not None for vector in vectors):
                cosines = _cosines(np.stack([np.asarray(vector[layer], dtype=float) for vector in vectors]))
                rows.append(("direction", name, n, cosines.mean(), cosines.min(), cosines.max(), draws))
        for name, build in made.items():
            steered = [arm for one in fits for arm in comparison.arms(one, {name: build})[0].values()]
            left = budget.harms(lab, steered, on) if steered else []
            rows += [("not refused", name, n, np.mean(left), min(left), max(left), len(left))] if left else []
    return pd.DataFrame(rows, columns=["panel", "group", "x", "estimate", "low", "high", "n_draws"])


def stability(fit: Fit, layer: int, draws: int = REDRAWS) -> pd.DataFrame:
    """How far a direction depends on the topics: cosine between any two of `draws` redraws of the discover topics, with
    replacement, after one layer. A row a direction: mean, and the range over pairs of redraws.
    """
    fits = [extraction.fit_directions(redrawn(fit, seed)) for seed in range(draws)]
    rows = []
    for name in ("rejection", "harmfulness"):
        vectors = [getattr(one, name) for one in fits]
        if all(vector is not None for vector in vectors):
            cosines = _cosines(np.stack([np.asarray(vector[layer], dtype=float) for vector in vectors]))
            rows.append((name, draws, cosines.mean(), cosines.min(), cosines.max()))
    return pd.DataFrame(rows, columns=["direction", "redraws", "mean cosine", "smallest", "largest"])


def _cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
