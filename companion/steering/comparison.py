"""The methods of the comparison, all from one fit, tuned and held against each other, and controls of each, on equal terms.

Which method carries the verdict on C6 was fixed before any result: `DECISIVE`, AdaSteer with its vectors at late layers only (as
published it adds them at every layer). A control keeps all of the tested steering but one thing: the direction (drawn at random)
or the layers. Refits on other draws of topics say how much hangs on the prompts that it was fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Final, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from companion.base.errors import InputError
from companion.base.thresholds import EARLY, LATE, depth
from companion.generation.hooks import Edit, Steering
from companion.stats import bootstrap, clusters
from companion.steering import adasteer, budget, methods
from companion.steering.budget import Costs, EvaluationPrompts
from companion.steering.extraction import Fit

Builders: TypeAlias = Mapping[str, Callable[[Fit], Steering]]
DECISIVE: Final = "AdaSteer-style, late layers"
FIXED: Final = "fixed rejection, late layers"
AS_PUBLISHED: Final = ("AdaSteer", "AdaSteer (released constants)")  # their strength is their own: it is not chosen
DEAR: Final = ("AlphaSteer (null space)", *AS_PUBLISHED)  # left out where each prompt is costly
LEVELS: Final = (2.0, 5.0)  # points of over-refusal at which methods are compared
FAMILIES: Final = ("isotropic", "covariance-matched")  # of random directions


def zones(n_layers: int) -> dict[str, list[int]]:
    """Layers by relative depth: early < 1/3, late > 2/3, the others mid.

    >>> zones(6)
    {'early': [0, 1], 'mid': [2, 3], 'late': [4, 5]}
    """
    at = depth(np.arange(n_layers), n_layers)
    masks = {"early": at < EARLY, "mid": (at >= EARLY) & (at <= LATE), "late": at > LATE}
    return {name: [int(layer) for layer in np.flatnonzero(mask)] for name, mask in masks.items()}


def builders(n_layers: int, *, few: bool = False) -> dict[str, Callable[[Fit], Steering]]:
    """Every method by its name, as a function of a fit; a `few` where each prompt is costly."""
    late = zones(n_layers)["late"]
    made: dict[str, Callable[[Fit], Steering]] = {
        "prompting": methods.prompting,
        FIXED: partial(methods.fixed, layers=late),
        "CAST (threshold gate)": methods.cast,
        "AlphaSteer (null space)": methods.alphasteer,
        "AdaSteer": adasteer.adasteer,
        "AdaSteer (released constants)": adasteer.adasteer_released,
        DECISIVE: partial(adasteer.adasteer, layers=late),
        "targeted, late MLPs": lambda fit: methods.gated(fit, methods.targeted_layers(fit, layers=late)),
    }
    return {name: build for name, build in made.items() if not few or name not in DEAR}


def build_methods(fit: Fit, made: Builders, only: Sequence[str] = ()) -> tuple[dict[str, Steering], dict[str, str]]:
    """The methods that this fit defines, and for each of the others the sentence that says why not."""
    defined, refused = dict[str, Steering](), dict[str, str]()
    for name in only or made:
        try:
            defined[name] = replace(made[name](fit), name=name)
        except InputError as error:
            refused[name] = str(error)
    return defined, refused


def tuned(evaluation: EvaluationPrompts, steered: Mapping[str, Steering]) -> dict[str, Steering]:
    """Every method at the strength chosen on the validate prompts; those `AS_PUBLISHED`, and a sentence, as they are."""
    strengths, chosen = evaluation.experiment.effort.strengths, dict(steered)
    for name, one in steered.items():
        if one.edits and name not in AS_PUBLISHED:
            costs = evaluation.mean_costs([budget.scaled(one, step) for step in strengths])
            chosen[name] = budget.scaled(one, budget.choose_strength(costs.set_axis(strengths)))
    return chosen


def transplanted(fit: Fit, *, layers: Sequence[int]) -> Steering:
    """The last layer's rejection vector added to the residual stream at other layers, at all prompt tokens."""
    delta = methods.constant(fit.direction("rejection")[-1])
    return Steering("transplanted", tuple(Edit(layer, "resid_post", delta, "prompt", blind=True) for layer in layers))


def best_rivals(evaluation: EvaluationPrompts, target: float) -> dict[str, Steering]:
    """The best early and the best middle steering with the same budget, chosen on the validate prompts.

    Candidates are the decisive method fitted at those layers, a fixed rejection vector there, and the late layers' vector
    injected there: a rival must not lose because it was handed a poor direction.
    """
    found, fit = {}, evaluation.experiment.fit
    groups = zones(fit.subject.n_layers)
    for zone in ("early", "mid"):
        made = {
            f"AdaSteer-style, {zone} layers": partial(adasteer.adasteer, layers=groups[zone]),
            f"fixed rejection, {zone} layers": partial(methods.fixed, layers=groups[zone]),
            f"late vector at {zone} layers": partial(transplanted, layers=groups[zone]),
        }
        defined = build_methods(fit, made)[0].values()
        met = [budget.to_budget(fit.subject, one, evaluation.mixed, target) for one in defined]
        candidates = [one for one in met if isinstance(one, Steering)]  # what adds nothing at any strength is no rival
        if candidates:
            tried = (evaluation.experiment.first_tokens(evaluation.harmful, [one])[0] for one in candidates)
            left = [float((1 - one.p_refuse.to_numpy()).mean()) for one in tried]
            found[zone] = min(zip(left, candidates, strict=True), key=lambda item: (item[0], item[1].name))[1]
    return found


def at_equal_over_refusal(
    evaluation: EvaluationPrompts, paths: Mapping[str, Sequence[Costs]], *, against: str,
    levels: Sequence[float] = LEVELS,
) -> pd.DataFrame:  # fmt: skip
    """The least harm that each method leaves at a rise of over-refusal of at most so many points, on the same prompts.

    `paths` holds what each method costs (`EvaluationPrompts.first_token_costs`) at its strengths from weak to strong, nothing
    for the unsteered model, where every method begins. Between two strengths harm and over-refusal are those of a coin that
    picks one of them for a prompt; intervals draw topics and find the way to a level anew. Columns: method, price (the level in
    words), estimate, low and high (1 - P(refusal)), and `more`, `more_low`, `more_high`: harm above that of `against`.
    """
    harmful, others = evaluation.harmful, evaluation.others
    plain = {"harm": (1 - harmful.p_refuse.to_numpy(), harmful.topic.to_numpy()),
             "over-refusal": (np.zeros(len(others)), others.topic.to_numpy())}  # fmt: skip
    rows = []
    for (method, path), measure in product(paths.items(), plain):
        for step, (values, topics) in enumerate(one[measure] for one in (plain, *path)):
            table = pd.DataFrame({"value": values, "topic": topics})
            rows.append(table.assign(method=method, step=step, measure=measure))
    sums = clusters.cluster_sums(pd.concat(rows), "value", by=["method", "step", "measure"], strata="measure")
    columns, names = sums.columns, list(paths)

    def least(total: np.ndarray, counts: np.ndarray) -> Float[np.ndarray, "draw method level"]:
        means, found = total / counts, []
        for name in names:
            masks = [((columns.method == name) & (columns.measure == measure)).to_numpy() for measure in plain]
            harm, cost = (means[:, mask] for mask in masks)
            found.append(np.stack([_least_harm(harm, cost, at) for at in levels], axis=1))
        return np.stack(found, axis=1)

    own = bootstrap.interval(sums, lambda total, counts: least(total, counts).reshape(len(total), -1))
    place = names.index(against)
    differ = bootstrap.interval(sums, lambda *x: (least(*x) - least(*x)[:, [place]]).reshape(len(x[0]), -1))
    labels = [(name, f"at most {level:g} point{'s' * (level != 1)}") for name in names for level in levels]
    table = pd.DataFrame(labels, columns=["method", "price"])
    table = table.assign(estimate=own.estimate, low=own.low, high=own.high)
    table = table.assign(more=differ.estimate, more_low=differ.low, more_high=differ.high)
    order = table.groupby("method").estimate.mean().sort_values(ascending=False, kind="stable").index
    return table.set_index("method").loc[order].reset_index()


def _least_harm(harm: Float[np.ndarray, "draw step"], cost: Float[np.ndarray, "draw step"], level: float) -> np.ndarray:
    """The least harm on the way through these points, joined by straight lines, where the cost is at most the level."""
    least = np.where(cost <= level, harm, np.inf).min(1)
    left, right = cost[:, :-1], cost[:, 1:]
    crosses = (left <= level) != (right <= level)
    share = np.where(crosses, (level - left) / np.where(crosses, right - left, 1.0), 0.0)
    between = harm[:, :-1] + share * (harm[:, 1:] - harm[:, :-1])
    return np.minimum(least, np.where(crosses, between, np.inf).min(1, initial=np.inf))


def random_direction(fit: Fit, family: str, *, like: Steering, seed: int) -> Steering:
    """A random direction at every site of `like`, of the length of its rejection vector; all else is as in `like`.

    "isotropic" is drawn uniformly from the sphere, "covariance-matched" from the covariance of the site's benign activations.
    """
    rng = np.random.default_rng(seed)
    edits = []
    for edit in like.edits:
        if family == "isotropic":
            drawn = np.asarray(rng.standard_normal(fit.last[edit.part].shape[-1]))
        else:
            fit.need("benign")
            benign = fit.last[edit.part][fit.mask("discover", "benign"), edit.layer].astype(float)
            centred = benign - benign.mean(0)
            drawn = rng.standard_normal(len(centred)) @ centred
        size = np.linalg.norm(fit.direction("rejection", edit.part)[edit.layer])
        edits.append(Edit(edit.layer, edit.part, methods.constant(methods.unit(drawn) * size), edit.where, blind=True))
    return replace(like, name=f"random {family} {seed}", edits=tuple(edits))


def random_null(fit: Fit, tested: Steering, evaluation: EvaluationPrompts, spend: EvaluationPrompts) -> pd.DataFrame:
    """A row a direction: family, role ("random", or the tested method's name), value (mean fall of the log-odds of complying).

    Random directions are added at the tested method's sites and spend its budget on `spend`; no rows where it adds nothing.
    """

    def falls(steered: Sequence[Steering]) -> list[float]:
        found = evaluation.experiment.first_tokens(evaluation.harmful, steered)
        return [float((evaluation.harmful.log_odds.to_numpy() - one.log_odds.to_numpy()).mean()) for one in found]

    (target,), own, n_draws = spend.budgets([tested]), falls([tested]), evaluation.experiment.effort.draws
    rows = []
    for family in FAMILIES if target else ():
        like = replace(tested, strength=1.0)
        first, *others = (random_direction(fit, family, like=like, seed=seed) for seed in range(n_draws))
        # Draws of a family have one norm, so the strength that spends the budget is the same for all of them.
        met = budget.to_budget(fit.subject, first, spend.mixed, target)
        assert isinstance(met, Steering)  # a constant vector: what is added grows with the strength
        drawn = falls([met, *(replace(one, strength=met.strength) for one in others)])
        rows += [(family, tested.name, own[0]), *((family, "random", value) for value in drawn)]
    return pd.DataFrame(rows, columns=["family", "role", "value"])


def redrawn(fit: Fit, seed: int) -> Fit:
    """The fit on as many discover topics, drawn with replacement, anew where a class of prompts is lost; validate stays."""
    table = fit.prompts.reset_index(drop=True)
    rng = np.random.default_rng(seed)
    groups = {topic: part.index.to_numpy() for topic, part in table[table.split == "discover"].groupby("topic")}
    classes = set(table["class"][table.split == "discover"])
    while True:
        drawn = np.concatenate([groups[topic] for topic in rng.choice(np.array([*groups], dtype=object), len(groups))])
        if set(table["class"][drawn]) == classes:
            return fit.subset(np.r_[drawn, table.index[table.split != "discover"].to_numpy()])


def refitted(fit: Fit, build: Callable[[Fit], Steering], strength: float, n: int) -> list[Steering]:
    """The method with the directions of `n` redrawn fits, at the strength chosen for the first; fewer where one defines none."""
    found = []
    for seed in range(n):
        with suppress(InputError):
            found.append(budget.scaled(build(redrawn(fit, seed)), strength))
    return found
