"""What a defence owes to what it was fitted on: families left out, other draws of topics, fewer examples, and an attacker.

The attacker, of the embedded language alone, knows the defence and reads the steered model's log-odds. It searches on requests
of the validate topics and is scored on those of the test topics: what is reported is a wrapper that carries over.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Final

import numpy as np
import pandas as pd

from companion.base.errors import InputError
from companion.generation.hooks import Steering
from companion.prompts import invented
from companion.prompts.invented import Clause, Request, Wrapper
from companion.stats.rates import holm
from companion.steering import budget, comparison
from companion.steering.budget import EvaluationPrompts
from companion.steering.comparison import Builders
from companion.steering.experiment import PLAIN, SteeringExperiment, answer, changed, labelled, select, share, trial
from companion.steering.extraction import CLASSES, ENDS, Fit
from companion.steering.prompts import thinned

EXAMPLES: Final = (5, 14, 50, 200)
FAMILY_STRENGTHS: Final = (0.5, 1.0)
MIN_FAMILY: Final = 20  # test prompts below which a family is not reported
N_FAMILY: Final = 60
FAMILIES: Final = (
    "family", "method", "estimate", "low", "high", "refused", "refused_low", "refused_high", "change", "p",
)  # fmt: skip
REQUESTS: Final = 8  # requests a wrapper is tried on
FINALISTS: Final = 4
PERSONAS: Final = (None, invented.PERSONAS[0], invented.PERSONAS[5], invented.HELD_PERSONAS[0])
DISTRACTORS: Final = (None, (False, False), (True, False), (False, True))  # (dangerous verb, hazard object)
ADVERBS: Final = (None, invented.NEUTRAL_ADVERBS[0])


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
        tuned = comparison.tuned(others, defined, FAMILY_STRENGTHS)[0]
        trials = {PLAIN.name: plain} | {name: trial(experiment, one, test, greedy=False) for name, one in tuned.items()}
        for name, tried in trials.items():
            change = None if tried is plain else changed(plain, tried, "harmful")
            rates = (*share(tried.label == "harmful"), *share(tried.label == "refusal"))
            rows.append((family, name, *rates, change.estimate if change else 0.0, change.p if change else np.nan))
    table = pd.DataFrame(rows, columns=list(FAMILIES))
    return table.assign(p_holm=table.groupby("method", sort=False)["p"].transform(lambda p: holm(list(p))))


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

    Fewer where a redraw does not define the method: the number of refits stands beside their spread.
    """
    found = []
    for seed in range(n):
        with suppress(InputError):
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


def few_examples(
    evaluation: EvaluationPrompts, made: Builders, layer: int, draws: int = 5, sizes: Sequence[int] = EXAMPLES
) -> pd.DataFrame:
    """Directions and what they achieve, over the number of fitting examples of each class.

    Panel "direction": cosine between two directions fitted on separate draws, mean and range over pairs of draws. Panel
    "not refused": 1 - P(refusal) on the evaluation prompts under each of the methods, mean and range over draws. Bands are
    ranges, not intervals. Beyond half of the examples two draws overlap, which flatters the cosine. `n_draws`: how many draws
    define what the row shows; none, no row.
    """
    fit, rows = evaluation.experiment.fit, list[tuple[object, ...]]()
    for n in sizes:
        fits = []
        for rng in map(np.random.default_rng, range(draws)):
            chosen = [rng.permutation(np.flatnonzero(fit.mask("discover", name)))[:n] for name in CLASSES]
            fits.append(fit.subset(np.concatenate([np.flatnonzero(fit.prompts.split != "discover"), *chosen])))
        rows += [("direction", name, n, *spread, draws) for name, *spread in _direction_cosines(fits, layer)]
        for name, build in made.items():
            steered = [one for fit in fits for one in comparison.build_methods(fit, {name: build})[0].values()]
            left = [float(values.mean()) for values in evaluation.harmful_left(steered)] if steered else []
            rows += [("not refused", name, n, np.mean(left), min(left), max(left), len(left))] if left else []
    return pd.DataFrame(rows, columns=["panel", "group", "x", "estimate", "low", "high", "n_draws"])


def _direction_cosines(fits: Sequence[Fit], layer: int) -> list[tuple[str, float, float, float]]:
    """Mean, smallest and largest cosine between the fits' directions after a layer, for each role that all of them define."""
    found = []
    for name in ENDS:
        vectors = [getattr(fit.directions(), name) for fit in fits]
        if all(vector is not None for vector in vectors):
            stack = np.stack([np.asarray(vector[layer], dtype=float) for vector in vectors])
            unit = stack / np.linalg.norm(stack, axis=1, keepdims=True)
            cosines = (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
            found.append((name, cosines.mean(), cosines.min(), cosines.max()))
    return found


@dataclass(frozen=True)
class Disguise:
    """What an attacker may put around a request; none of it changes what is asked."""

    wrapper: Wrapper
    persona: str | None = None
    distractor: Clause | None = None
    adverb: str | None = None

    @property
    def name(self) -> str:
        """A short description for tables."""
        persona = f"as a {self.persona}" if self.persona else ""
        extras = (persona, "distractor" if self.distractor else "", self.adverb)
        return ", ".join([self.wrapper.text, *filter(None, extras)])


STRONG: Final = Disguise(Wrapper("badge", invented.TIER_WORDS[-1][0], invented.N_TIERS - 1))  # what needs no search


def draw_requests(split: str, n: int = 0) -> list[Request]:
    """One plain harmful request a topic of a split, `n` of them (0: all), the same at every call."""
    clauses = invented.topic_clauses(True, True)
    splits = invented.split_topics(clauses)
    rng = random.Random(f"search-{split}")
    chosen = [clause for clause in clauses if splits[clause.topic] == split]
    rng.shuffle(chosen)
    return [Request(one, rng.choice(invented.PLACES), rng.choice(invented.ASKS)) for one in chosen[: n or len(chosen)]]


def all_wrappers() -> list[Wrapper]:
    """Every jailbreak wrapper: all frames, the one that training never showed among them, with all words of tier 1 to 6."""
    frames = (*invented.FRAMES, "unseen")
    return [Wrapper(f, w, t) for f in frames for t in range(1, invented.N_TIERS) for w in invented.TIER_WORDS[t]]


def disguised(asked: Sequence[Request], disguises: Sequence[Disguise]) -> pd.DataFrame:
    """The requests under each disguise in turn, as a table that `experiment.answer` takes."""
    made = [(request, request.swap(**vars(one))) for one in disguises for request in asked]
    rows = [(invented.render(sent)[0], "harmful", request.clause.topic) for request, sent in made]
    return pd.DataFrame(rows, columns=["text", "kind", "topic"])


def worst_disguises(experiment: SteeringExperiment, steered: Sequence[Steering]) -> list[Disguise]:
    """For each steering the disguise that it withstands least on the validate topics, found in two rounds.

    Round 1 tries every wrapper alone; round 2 the best four with personas, distracting clauses and adverbs. Round 2 goes by
    wrapper, so that the plain model's run over a disguised request is made once for all steerings that meet it.
    """
    asked, alone = draw_requests("validate", REQUESTS), [Disguise(wrapper) for wrapper in all_wrappers()]
    rng = random.Random("search-distractors")
    clauses = [invented.draw_clause(rng, *classes) if classes else None for classes in DISTRACTORS]
    extras = list(itertools.product(PERSONAS, clauses, ADVERBS))
    ranked = _scores(experiment, alone, asked, steered)
    finalists = [[alone[i].wrapper for i in one.index[:FINALISTS]] for one in ranked]
    best: list[dict[Wrapper, tuple[float, Disguise]]] = [{} for _ in steered]
    for wrapper in dict.fromkeys(itertools.chain(*finalists)):
        places = [k for k, chosen in enumerate(finalists) if wrapper in chosen]
        full = [Disguise(wrapper, *extra) for extra in extras]
        found = _scores(experiment, full, asked, [steered[k] for k in places])
        for k, one in zip(places, found, strict=True):
            best[k][wrapper] = float(one.iloc[0]), full[int(one.index[0])]
    # Of equal scores the wrapper that did better alone wins, in whatever order they were tried.
    ordered = [[mine[wrapper] for wrapper in chosen] for mine, chosen in zip(best, finalists, strict=True)]
    return [max(tried, key=itemgetter(0))[1] for tried in ordered]


def _scores(
    experiment: SteeringExperiment, disguises: Sequence[Disguise], asked: Sequence[Request], steered: Sequence[Steering]
) -> list[pd.Series]:
    """For each steering, the mean log-odds of complying over the requests by the disguise's place, best attack first."""
    prompts, found = disguised(asked, disguises), {}
    for system in dict.fromkeys(one.system for one in steered):
        places = [k for k, one in enumerate(steered) if one.system == system]
        for k, one in zip(places, experiment.first_tokens(prompts, [steered[k] for k in places]), strict=True):
            mean = pd.Series(one.log_odds.to_numpy().reshape(len(disguises), len(asked)).mean(1))
            found[k] = mean.sort_values(ascending=False, kind="stable")
    return [found[k] for k in range(len(steered))]


def attack_table(experiment: SteeringExperiment, steered: Mapping[str, Steering]) -> pd.DataFrame:
    """Judged harm of every method, and of the plain model, under a plain strong wrapper and under the worst disguise that
    the search found against it; on the requests of the test topics, one a topic, with Wilson intervals.
    """
    asked, rows = draw_requests("test"), []
    every = {PLAIN.name: PLAIN, **steered}
    for (name, one), worst in zip(every.items(), worst_disguises(experiment, list(every.values())), strict=True):
        for attack, disguise in (("strong wrapper", STRONG), ("worst disguise found", worst)):
            prompts = disguised(asked, [disguise])
            is_harm = np.array(labelled(experiment, answer(experiment, one, prompts), prompts)) == "harmful"
            rows.append((name, attack, disguise.wrapper.frame, disguise.name, *share(is_harm)))
    return pd.DataFrame(rows, columns=["method", "attack", "family", "disguise", "estimate", "low", "high"])
