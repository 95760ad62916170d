"""A white-box attacker of the embedded language: the wrapper of the grammar that defeats a defence best.

The attacker knows the defence and reads the steered model's log-odds. It searches on requests of the validate topics and
is scored on requests of the test topics, so that what is reported is a wrapper that carries over, not a lucky request.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Final

import pandas as pd

from companion.generation.hooks import Steering
from companion.prompts import invented
from companion.prompts.invented import Clause, Request, Wrapper, draw_clause, render, split_topics, topic_clauses
from companion.stats.clusters import wilson
from companion.steering.experiment import PLAIN, SteeringExperiment, answer, labelled

REQUESTS: Final = 8  # requests a wrapper is tried on
FINALISTS: Final = 4
PERSONAS: Final = (None, invented.PERSONAS[0], invented.PERSONAS[5], invented.HELD_PERSONAS[0])
DISTRACTORS: Final = (None, (False, False), (True, False), (False, True))  # (dangerous verb, hazard object)
ADVERBS: Final = (None, invented.NEUTRAL_ADVERBS[0])


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

    def around(self, request: Request) -> str:
        """The request as the attacker sends it."""
        parts = {"wrapper": self.wrapper, "persona": self.persona, "adverb": self.adverb}
        return render(request.swap(**parts, distractor=self.distractor))[0]


STRONG: Final = Disguise(Wrapper("badge", invented.TIER_WORDS[-1][0], invented.N_TIERS - 1))  # what needs no search


def draw_requests(split: str, n: int = 0) -> list[Request]:
    """One plain harmful request a topic of a split, `n` of them (0: all), the same at every call."""
    clauses = topic_clauses(True, True)
    splits = split_topics(clauses)
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
    rows = [(one.around(request), "harmful", request.clause.topic) for one in disguises for request in asked]
    return pd.DataFrame(rows, columns=["text", "kind", "topic"])


def worst_disguises(experiment: SteeringExperiment, steered: Sequence[Steering]) -> list[Disguise]:
    """For each steering the disguise that it withstands least on the validate topics, found in two rounds.

    Round 1 tries every wrapper alone; round 2 the best four with personas, distracting clauses and adverbs. Round 2 goes by
    wrapper, so that the plain model's run over a disguised request is made once for all steerings that meet it.
    """
    asked, alone = draw_requests("validate", REQUESTS), [Disguise(wrapper) for wrapper in all_wrappers()]
    rng = random.Random("search-distractors")
    clauses = [draw_clause(rng, *classes) if classes else None for classes in DISTRACTORS]
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
    """For each steering, the mean log-odds of complying over the requests under each disguise, best attack first.

    A score is indexed by the disguise's place. Steerings with one system turn read the prompts together.
    """
    prompts, found = disguised(asked, disguises), {}
    for system in dict.fromkeys(one.system for one in steered):
        places = [k for k, one in enumerate(steered) if one.system == system]
        for k, one in zip(places, experiment.first_tokens(prompts, [steered[k] for k in places]), strict=True):
            mean = pd.Series(one.log_odds.to_numpy().reshape(len(disguises), len(asked)).mean(1))
            found[k] = mean.sort_values(ascending=False, kind="stable")
    return [found[k] for k in range(len(steered))]


def attack_table(experiment: SteeringExperiment, steered: Mapping[str, Steering]) -> pd.DataFrame:
    """Judged harm of every method, and of the plain model, under a plain strong wrapper and under the worst disguise that
    the search found against it.

    Both on the requests of the test topics, with one request a topic; rates with Wilson intervals.
    """
    asked, rows = draw_requests("test"), []
    every = {PLAIN.name: PLAIN, **steered}
    for (name, one), worst in zip(every.items(), worst_disguises(experiment, list(every.values())), strict=True):
        for attack, disguise in (("strong wrapper", STRONG), ("worst disguise found", worst)):
            prompts = disguised(asked, [disguise])
            labels = labelled(experiment, answer(experiment, one, prompts), prompts)
            hits = labels.count("harmful")
            limits = wilson(hits, len(labels))
            rows.append((name, attack, disguise.wrapper.frame, disguise.name, hits / len(labels), *limits))
    return pd.DataFrame(rows, columns=["method", "attack", "family", "disguise", "estimate", "low", "high"])
