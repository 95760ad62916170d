"""The methods of the comparison, all from one fit, tuned and held against each other, and controls of each, on equal terms.

Which method carries the verdict on C6 was fixed before any result: `DECISIVE`, an adaptive method in the style of AdaSteer
whose vectors are added at late layers only (AdaSteer as published adds them at every layer). A control keeps all of the tested
steering but one thing, which may then get the credit: the direction (drawn at random), the layers, or the gate.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import Final, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from companion.base.display import NotDefined
from companion.base.errors import InputError
from companion.base.thresholds import EARLY, LATE, depth
from companion.generation import forward
from companion.generation.hooks import Edit, Opening, Part, Prompt, Steering
from companion.mediation.study import Study
from companion.neurons import single
from companion.stats import bootstrap, clusters
from companion.stats.rates import mean_change
from companion.steering import adasteer, budget, methods
from companion.steering.budget import EvaluationPrompts
from companion.steering.experiment import SteeringExperiment
from companion.steering.extraction import Fit

Builders: TypeAlias = Mapping[str, Callable[[Fit], Steering]]
DECISIVE: Final = "AdaSteer-style, late layers"
AS_PUBLISHED: Final = ("AdaSteer", "AdaSteer (released constants)")  # their strength is their own: it is not chosen
N_NEURONS: Final = 32
SHARES: Final = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the decisive method's budget
PANELS: Final = {
    "harm": "1 - P(refusal), jailbroken requests",
    "over-refusal": "rise of P(refusal) on the others, points",
}
LEVELS: Final = (1.0, 2.0, 5.0)  # points of over-refusal at which methods are compared
ROWS: Final = ("at all layers, or in the prompt", "at some layers only")
EQUAL: Final = (
    "row", "panel", "group", "x", "estimate", "low", "high", "strength", "why", "more", "more_low", "more_high",
)  # fmt: skip
FAMILIES: Final = ("isotropic", "covariance-matched")  # of random directions


def zones(n_layers: int) -> dict[str, list[int]]:
    """Layers by relative depth: early < 1/3, late > 2/3, the others mid.

    >>> zones(6)
    {'early': [0, 1], 'mid': [2, 3], 'late': [4, 5]}
    """
    at = depth(np.arange(n_layers), n_layers)
    masks = {"early": at < EARLY, "mid": (at >= EARLY) & (at <= LATE), "late": at > LATE}
    return {name: [int(layer) for layer in np.flatnonzero(mask)] for name, mask in masks.items()}


def top_neurons(study: Study) -> dict[int, list[int]]:
    """The last-layer neurons with the largest mean indirect effect in the direction of TE, on the discover pairs of T2."""
    last = study.subject.n_layers - 1
    discover = tuple(p for p in study.of("T2") if p.pair.split == "discover")
    columns = single.all_neurons(study.subject, [last])
    effects, _ = single.measure_chosen(replace(study, pairs=discover), "T2", columns)
    toward = effects.nie.mean(0) * np.sign(effects.pairs.te.mean())
    return {last: sorted(int(i) for i in np.argsort(-toward, kind="stable")[:N_NEURONS])}


def builders(n_layers: int, neurons: Mapping[int, Sequence[int]] | None) -> dict[str, Callable[[Fit], Steering]]:
    """Every method by its name, as a function of a fit."""
    late = zones(n_layers)["late"]
    made: dict[str, Callable[[Fit], Steering]] = {
        "prompting": methods.prompting,
        "fixed rejection, all layers": methods.fixed,
        "fixed rejection, late layers": partial(methods.fixed, layers=late),
        "ablation of harmfulness": methods.ablation,
        "CAST (threshold gate)": methods.cast,
        "AlphaSteer (null space)": methods.alphasteer,
        "AdaSteer": adasteer.adasteer,
        "AdaSteer (released constants)": adasteer.adasteer_released,
        DECISIVE: partial(adasteer.adasteer, layers=late),
        "targeted, late MLPs": lambda fit: methods.gated(fit, methods.targeted_layers(fit, layers=late)),
    }
    if neurons:
        last = partial(methods.targeted_neurons, neurons=neurons)
        made["targeted, last-layer neurons"] = lambda fit: methods.gated(fit, last(fit))
    return made


def build_methods(fit: Fit, made: Builders, only: Sequence[str] = ()) -> tuple[dict[str, Steering], dict[str, str]]:
    """The methods that this fit defines, and for each of the others the sentence that says why not."""
    defined: dict[str, Steering] = {}
    refused: dict[str, str] = {}
    for name in only or made:
        try:
            defined[name] = replace(made[name](fit), name=name)
        except InputError as error:
            refused[name] = str(error)
    return defined, refused


def tuned(
    evaluation: EvaluationPrompts, steered: Mapping[str, Steering], strengths: Sequence[float] = budget.STRENGTHS
) -> tuple[dict[str, Steering], pd.DataFrame]:
    """Every method at the strength chosen on the validate prompts (1 for those `AS_PUBLISHED`), and the curves."""
    chosen, curves = {}, [pd.DataFrame(columns=list(budget.COLUMNS))]
    for name, one in steered.items():
        steps = strengths if one.edits else (1.0,)  # a sentence in the prompt is there or not
        curves.append(evaluation.curve(name, [budget.scaled(one, step) for step in steps], steps))
        chosen[name] = one if name in AS_PUBLISHED else budget.scaled(one, budget.choose_strength(curves[-1]))
    return chosen, pd.concat(curves[1:] or curves, ignore_index=True)


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
        met = [budget.to_budgets(fit.subject, one, evaluation.mixed, [target])[0] for one in defined]
        candidates = [one for one in met if isinstance(one, Steering)]  # what adds nothing at any strength is no rival
        if candidates:
            left = [float(evaluation.harmful_left([one])[0].mean()) for one in candidates]
            found[zone] = min(zip(left, candidates, strict=True), key=lambda item: (item[0], item[1].name))[1]
    return found


def equal_budgets(
    steered: Mapping[str, Steering], largest: float, spend: EvaluationPrompts, evaluation: EvaluationPrompts,
    shares: Sequence[float] = SHARES, *, against: str,
) -> pd.DataFrame:  # fmt: skip
    """What methods do with the same L2 budget (met on `spend`), first token, on `evaluation`; the columns are those of `EQUAL`.

    `x` is the budget, shares of the largest; `row` says which layers a method steers, all or some. `more`: by how many points
    a method lies above the one named `against` at the same budget, on the same prompts. A budget that a method cannot spend
    has a row without numbers, whose `why` says so.
    """
    subject, targets = evaluation.experiment.subject, [share * largest for share in shares]
    met = {name: budget.to_budgets(subject, one, spend.mixed, targets) for name, one in steered.items()}
    found = {}
    for name, made in met.items():
        spendable = [one for one in made if isinstance(one, Steering)]
        measured = iter(evaluation.first_token_costs(spendable) if spendable else [])
        found[name] = [next(measured) if one else None for one in made]
    rows: list[dict[str, object]] = []
    for name, place, (key, panel) in itertools.product(steered, range(len(targets)), PANELS.items()):
        one, values, other = met[name][place], found[name][place], found[against][place]
        row = {"row": which_layers(subject.n_layers, steered[name]), "panel": panel, "group": name, "x": targets[place]}
        if isinstance(one, NotDefined) or values is None:
            rows.append(row | {"why": str(one)})
            continue
        estimates = dict(zip(("estimate", "low", "high"), astuple(mean_change(*values[key])), strict=False))
        row |= {"strength": one.strength, "why": ""} | estimates
        if other is not None and name != against:
            points = (100 if key == "harm" else 1) * (values[key][0] - other[key][0])
            row |= dict(zip(EQUAL[-3:], astuple(mean_change(points, values[key][1])), strict=False))
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(EQUAL))
    return table.sort_values(["row", "panel"], kind="stable", ignore_index=True)


def at_equal_over_refusal(
    evaluation: EvaluationPrompts, steered: Mapping[str, Sequence[Steering]], *, against: str,
    levels: Sequence[float] = LEVELS,
) -> pd.DataFrame:  # fmt: skip
    """The least harm that each method leaves at a rise of over-refusal of at most so many points, on the same prompts.

    `steered` holds each method's strengths from weak to strong, none for the unsteered model, where every method begins.
    Between two strengths harm and over-refusal are those of a coin that picks one of them for a prompt. Intervals draw
    topics, and the way to a level is found anew in each draw. Columns: method, price (the level in words), estimate, low
    and high (1 - P(refusal)), and `more`, `more_low`, `more_high`: how much more harm than the method named `against`.
    """
    plain = {"harm": 1 - evaluation.harmful.p_refuse.to_numpy(), "over-refusal": np.zeros(len(evaluation.others))}
    rows = []
    for method, strengths in steered.items():
        path = evaluation.first_token_costs(strengths) if strengths else []
        for measure, topics in (("harm", evaluation.harmful.topic), ("over-refusal", evaluation.others.topic)):
            values = [plain[measure], *(step[measure][0] for step in path)]
            for step, one in enumerate(values):
                rows.append(pd.DataFrame({"value": one, "topic": topics.to_numpy()}).assign(
                    method=method, step=step, measure=measure))  # fmt: skip
    sums = clusters.cluster_sums(pd.concat(rows), "value", by=["method", "step", "measure"], strata="measure")
    columns, names = sums.columns, list(steered)

    def means_of(means: np.ndarray, name: str, measure: str) -> Float[np.ndarray, "draw step"]:
        return means[:, ((columns.method == name) & (columns.measure == measure)).to_numpy()]

    def least(total: np.ndarray, counts: np.ndarray) -> Float[np.ndarray, "draw method level"]:
        found = []
        for name in names:
            harm, cost = (means_of(total / counts, name, measure) for measure in ("harm", "over-refusal"))
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


def _least_harm(
    harm: Float[np.ndarray, "draw step"], cost: Float[np.ndarray, "draw step"], level: float
) -> Float[np.ndarray, "draw"]:
    """The least harm on the way through these points, joined by straight lines, where the cost is at most the level."""
    least = np.where(cost <= level, harm, np.inf).min(1)
    left, right = cost[:, :-1], cost[:, 1:]
    crosses = (left <= level) != (right <= level)
    share = np.where(crosses, (level - left) / np.where(crosses, right - left, 1.0), 0.0)
    between = harm[:, :-1] + share * (harm[:, 1:] - harm[:, :-1])
    return np.minimum(least, np.where(crosses, between, np.inf).min(1, initial=np.inf))


def which_layers(n_layers: int, steered: Steering) -> str:
    """Whether a method steers every layer of the model, for the two rows of figures in which all would not fit."""
    every = {edit.layer for edit in steered.edits} >= set(range(n_layers))
    return ROWS[0] if every or not steered.edits else ROWS[1]


def random_direction(fit: Fit, family: str, *, like: Steering, seed: int = 0) -> Steering:
    """A random direction at every site of `like`, with its gate, layers, tokens and strength.

    "isotropic" is drawn uniformly from the sphere, "covariance-matched" from the covariance of benign activations at the
    site: a direction in which activations do vary. Each vector has the length of the site's rejection vector.
    """
    rng = np.random.default_rng(seed)
    edits = []
    for edit in like.edits:
        layer = fit.neuron_layers.index(edit.layer) if edit.part == "neurons" else edit.layer
        if family == "isotropic":
            drawn = np.asarray(rng.standard_normal(fit.last[edit.part].shape[-1]))
        else:
            centred = _centred(fit, edit.part, layer)
            drawn = rng.standard_normal(len(centred)) @ centred
        size = np.linalg.norm(fit.direction("rejection", edit.part)[layer])
        edits.append(Edit(edit.layer, edit.part, methods.constant(methods.unit(drawn) * size), edit.where, blind=True))
    return replace(like, name=f"random {family} {seed}", edits=tuple(edits))


def _centred(fit: Fit, part: Part, layer: int) -> Float[np.ndarray, "prompt width"]:
    """Benign activations less their mean; a hundred directions are drawn at the same few sites."""
    key = "centred", part, layer
    if key not in fit.memo:
        fit.need("benign")
        benign = fit.last[part][fit.mask("discover", "benign"), layer].astype(float)
        fit.memo[key] = benign - benign.mean(0)
    centred: Float[np.ndarray, "prompt width"] = fit.memo[key]
    return centred


def random_null(
    fit: Fit, tested: Steering, evaluation: EvaluationPrompts, spend: EvaluationPrompts, draws: int
) -> pd.DataFrame:
    """A row a direction: family, role ("random", or the tested method's name), value (fall of the log-odds on `evaluation`).

    Every random direction is added at the tested method's sites, to every prompt, and spends its budget (on `spend`). No
    rows where the method adds nothing there.
    """

    def falls(steered: Sequence[Steering]) -> list[float]:
        """Mean fall of the log-odds of complying under each steering."""
        found = evaluation.experiment.first_tokens(evaluation.harmful, steered)
        return [float((evaluation.harmful.log_odds.to_numpy() - one.log_odds.to_numpy()).mean()) for one in found]

    (target,), own = spend.budgets([tested]), falls([tested])
    rows = []
    for family in FAMILIES if target else ():
        like = replace(tested, strength=1.0)
        first, *others = (random_direction(fit, family, like=like, seed=seed) for seed in range(draws))
        # Draws of a family have one norm, so the strength that spends the budget is the same for all of them.
        (met,) = budget.to_budgets(fit.subject, first, spend.mixed, [target])
        assert isinstance(met, Steering)  # a constant vector: what is added grows with the strength
        drawn = falls([met, *(replace(one, strength=met.strength) for one in others)])
        rows += [(family, tested.name, own[0]), *((family, "random", value) for value in drawn)]
    return pd.DataFrame(rows, columns=["family", "role", "value"])


def elsewhere(like: Steering, layers: Collection[int]) -> Steering | NotDefined:
    """What a steering adds, at other layers: lowest goes to lowest, with the same vectors, coefficients and gate.

    What it reads of a prompt it reads from an unsteered pass, which no edit can change. Not defined for another number of
    layers than its own.
    """
    own, at = sorted({edit.layer for edit in like.edits}), sorted(set(layers))
    if len(own) != len(at):
        return NotDefined(f"{like.name} steers {len(own)} layers; expected as many to move it to, not {len(at)}")
    to = dict(zip(own, at, strict=True))
    edits = tuple(replace(edit, layer=to[edit.layer]) for edit in like.edits)
    reads = tuple(replace(read, plain=True) for read in like.reads)
    return replace(like, name=f"{like.name} at layers {', '.join(map(str, at))}", edits=edits, reads=reads)


def shuffled_gate(fit: Fit, steering: Steering) -> Steering:
    """The steering with a gate that opens as far and as often as its own on validate, but for the wrong prompts.

    A prompt's value is drawn from those on validate by a number made from its token ids, so it is the same on every run.
    """
    texts = fit.prompts.text[fit.mask("validate")].tolist()
    values = np.sort(budget.gate_values(fit.subject, steering, texts))

    def drawn(prompt: Prompt) -> Float[torch.Tensor, "prompt"]:
        digests = [hashlib.sha256(f"0 {ids}".encode()).digest() for ids in _token_rows(prompt)]
        chosen = [values[int.from_bytes(digest[:8], "big") * len(values) >> 64] for digest in digests]
        return torch.tensor(chosen, device=prompt.ids.device, dtype=torch.float32)

    return _with_gate(steering, drawn)


def oracle_gate(fit: Fit, steering: Steering, harmful: Sequence[str]) -> Steering:
    """The steering with a gate that knows: 1 for these user turns, 0 for all others. An upper bound, not a defence."""
    known = frozenset(tuple(map(int, forward.encode(fit.subject, text))) for text in harmful)

    def is_known(prompt: Prompt) -> Float[torch.Tensor, "prompt"]:
        return torch.tensor([float(ids in known) for ids in _token_rows(prompt)], device=prompt.ids.device)

    return _with_gate(steering, is_known)


def gate_controls(
    experiment: SteeringExperiment, chosen: Mapping[str, Steering], names: Sequence[str]
) -> dict[str, Steering]:
    """Those of the named methods that have a gate, with a shuffled and with an oracle gate, at their chosen strength."""
    harmful = experiment.prompts.text[experiment.prompts.kind == "harmful"].tolist()
    made = {}
    for name in names:
        if (one := chosen.get(name)) is not None and one.gate is not None:
            made[f"{name}, shuffled gate"] = shuffled_gate(experiment.fit, one)
            made[f"{name}, oracle gate"] = oracle_gate(experiment.fit, one, harmful)
    return {name: replace(one, name=name) for name, one in made.items()}


def _with_gate(steering: Steering, gate: Opening) -> Steering:
    """Another gate; what an adaptive steering's edits read stays, names of gates are dropped."""
    reads = tuple(read for read in steering.reads if read.name not in ("gate", "condition"))
    return replace(steering, gate=gate, reads=reads)


def _token_rows(prompt: Prompt) -> list[tuple[int, ...]]:
    return [tuple(map(int, ids[real])) for ids, real in zip(prompt.ids.cpu(), prompt.real.cpu(), strict=True)]
