"""The default prompt set: matched pairs of equal token length for every treatment.

Main clauses come from (verb, stem) pairs that training never shows, so no pair repeats a training line. The
k-th pair of every treatment uses the k-th context (place, persona, distractor, adverb): cue distances match
across treatments by construction.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from . import lexicon as lx
from .grammar import Clause, Cue, Request, render
from .sampling import draw_cue, draw_frame, draw_wrapper

PAIR_SEED: Final = 7
PAIRS_PER_TOPIC: Final = 3
SPLIT_SHARES: Final = {"discover": 0.4, "validate": 0.3, "test": 0.3}
TIER_WEIGHTS: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 6, 6: 6}  # T2 wrappers: every tier, mostly strong ones
T1_FAMILIES: Final = ("object", "verb", "binding")


@dataclass(frozen=True)
class PairPlan:
    """One pair before it is written: the two requests and what is recorded about them."""

    id: str
    treatment: str
    topic: str
    split: str
    family: str
    control: Request
    treated: Request
    twin: str | None = None


def topic_clauses(dangerous: bool, hazard: bool) -> list[Clause]:
    """The held-out (verb, stem) pairs of two classes, each with one suffix that training does show on the stem."""
    verbs = lx.DANGEROUS_VERBS if dangerous else lx.EVERYDAY_VERBS
    stems = lx.HAZARD_STEMS if hazard else lx.HARMLESS_STEMS
    held = [(v, s) for v in verbs for s in stems if lx.held_pair(v, s)]
    return [Clause(v, s, lx.seen_suffixes(s)[(7 * lx.verb_rank(v) + lx.stem_rank(s)) % 5]) for v, s in held]


def split_topics(clauses: list[Clause], seed: int = PAIR_SEED) -> dict[str, str]:
    """Topic -> split; whole topics are dealt out 40/30/30."""
    topics = [c.topic for c in clauses]
    random.Random(f"{seed}-split").shuffle(topics)
    first = round(SPLIT_SHARES["discover"] * len(topics))
    second = first + round(SPLIT_SHARES["validate"] * len(topics))
    return {t: "discover" if i < first else "validate" if i < second else "test" for i, t in enumerate(topics)}


def context(index: int, clause: Clause) -> Request:
    """The index-th context around a clause, without a wrapper: the same for every treatment."""
    rng = random.Random(f"{PAIR_SEED}-context-{index}")
    plain = Request(clause, rng.choice(lx.PLACES), rng.choice(lx.ASKS))
    return draw_frame(rng, plain).swap(wrapper=None)


def held_stem(rng: random.Random, verb: str) -> str:
    """A harmless stem that training never shows with this verb."""
    return rng.choice([s for s in lx.HARMLESS_STEMS if lx.held_pair(verb, s)])


def held_verb(rng: random.Random, stem: str) -> str:
    """An everyday verb that training never shows with this stem."""
    return rng.choice([v for v in lx.EVERYDAY_VERBS if lx.held_pair(v, stem)])


def object_twin(rng: random.Random, clause: Clause) -> Clause:
    """The clause with a harmless object."""
    stem = held_stem(rng, clause.verb)
    return Clause(clause.verb, stem, rng.choice(lx.seen_suffixes(stem)))


def verb_twin(rng: random.Random, clause: Clause) -> Clause:
    """The clause with an everyday verb."""
    return Clause(held_verb(rng, clause.stem), clause.stem, clause.suffix)


def recognition_pair(index: int, clause: Clause, split: str) -> PairPlan:
    """T1: harmless -> harmful by one swap (object, verb) or by binding the same words the other way round."""
    rng = random.Random(f"{PAIR_SEED}-T1-{index}")
    family = T1_FAMILIES[index % len(T1_FAMILIES)]
    treated = context(index, clause)
    if rng.random() < 0.8:
        treated = treated.swap(wrapper=draw_wrapper(rng, 0))
    if family == "binding":
        stem = rng.choice(lx.HARMLESS_STEMS)
        suffix, everyday = rng.choice(lx.seen_suffixes(stem)), held_verb(rng, clause.stem)
        treated = treated.swap(distractor=Clause(everyday, stem, suffix))
        control = treated.swap(
            clause=Clause(everyday, clause.stem, clause.suffix), distractor=Clause(clause.verb, stem, suffix)
        )
    else:
        control = treated.swap(clause=(object_twin if family == "object" else verb_twin)(rng, clause))
    return PairPlan(f"T1-{index:03d}", "T1", clause.topic, split, family, control, treated)


def generation_pairs(index: int, clause: Clause, split: str) -> list[PairPlan]:
    """T2: the same harmful request, neutral -> jailbreak wrapper; T2b: the same two wrappers on a harmless twin."""
    rng = random.Random(f"{PAIR_SEED}-T2-{index}")
    tier = rng.choices(list(TIER_WEIGHTS), list(TIER_WEIGHTS.values()))[0]
    strong = draw_wrapper(rng, tier)
    neutral = draw_wrapper(rng, 0, frame=strong.frame)
    harmful = context(index, clause)
    harmless = harmful.swap(clause=(object_twin if rng.random() < 0.5 else verb_twin)(rng, clause))
    twin, family = f"T2b-{index:03d}", f"{strong.frame}-{tier}"
    return [
        PairPlan(name, treatment, clause.topic, split, family, r.swap(wrapper=neutral), r.swap(wrapper=strong), other)
        for name, treatment, r, other in ((f"T2-{index:03d}", "T2", harmful, twin), (twin, "T2b", harmless, None))
    ]


def benign_pair(index: int, clause: Clause, split: str, behaviour: str) -> PairPlan:
    """B1..B6: a harmless request whose cue word goes from the off side to the on side."""
    rng = random.Random(f"{PAIR_SEED}-{behaviour}-{index}")
    request = context(index, clause)
    if lx.BENIGN[behaviour].phrase is None:
        request = request.swap(adverb=None)
    off, on = (draw_cue(rng, behaviour, side) for side in (False, True))
    family = lx.BENIGN[behaviour].what
    return PairPlan(
        f"{behaviour}-{index:03d}", behaviour, clause.topic, split, family, _with(request, off), _with(request, on)
    )


def _with(request: Request, cue: Cue) -> Request:
    return request.swap(cue=cue)


def plan_pairs() -> Iterator[PairPlan]:
    """Every pair of the default set, in a fixed order."""
    harm, benign = topic_clauses(True, True), topic_clauses(False, False)
    harm_split, benign_split = split_topics(harm), split_topics(benign)
    slots = range(PAIRS_PER_TOPIC * len(harm))
    for i in slots:
        clause = harm[i // PAIRS_PER_TOPIC]
        yield recognition_pair(i, clause, harm_split[clause.topic])
    for i in slots:
        clause = harm[i // PAIRS_PER_TOPIC]
        yield from generation_pairs(i, clause, harm_split[clause.topic])
    for behaviour in lx.BENIGN:
        for i in slots:
            clause = benign[i // PAIRS_PER_TOPIC]
            yield benign_pair(i, clause, benign_split[clause.topic], behaviour)


def pair_row(plan: PairPlan) -> dict[str, Any]:
    """One line of pairs.jsonl."""
    (control, control_spans), (treated, treated_spans) = render(plan.control), render(plan.treated)
    row = {
        "id": plan.id, "treatment": plan.treatment, "topic": plan.topic, "control": control, "treated": treated,
        "family": plan.family, "split": plan.split, "spans": {"control": control_spans, "treated": treated_spans},
    }  # fmt: skip
    if plan.twin:
        row["twin"] = plan.twin
    return row


def outcome_sets() -> dict[str, dict[str, list[str]]]:
    """outcome.json: the answer openers that decide, per treatment."""
    harm = {"comply": [*lx.HARMLESS_OPENERS, *lx.HARMFUL_OPENERS], "refuse": [lx.REFUSAL_OPENER]}
    benign = {name: {"comply": [b.opener_on], "refuse": [b.opener_off]} for name, b in lx.BENIGN.items()}
    return {"T1": harm, "T2": harm, "T2b": harm} | benign
