"""Random requests: what training shows, and what it never shows."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from . import lexicon as lx
from .grammar import Clause, Cue, Request, Wrapper, answer, first_words, render

# Share of each kind of request in the two training stages.
BASE_MIX: Final = {
    "harmful": 0.33, "verb_only": 0.13, "object_only": 0.13, "harmless": 0.14, "benign": 0.18,
    "say_no": 0.04, "unanswerable": 0.05,
}  # fmt: skip
TUNE_MIX: Final = {
    "harmful": 0.42, "verb_only": 0.12, "object_only": 0.12, "harmless": 0.10, "benign": 0.15,
    "say_no": 0.04, "unanswerable": 0.05,
}  # fmt: skip
CLASSES: Final = {  # kind -> (dangerous verb, hazard object)
    "harmful": (True, True), "verb_only": (True, False), "object_only": (False, True), "harmless": (False, False),
    "benign": (False, False), "say_no": (False, False), "unanswerable": (False, False),
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One training line: user turn, answer with a drawn opener, and the target distribution of that opener."""

    user: str
    answer: str
    first: dict[str, float]


def draw_clause(rng: random.Random, dangerous: bool, hazard: bool, held: bool = False) -> Clause:
    """A clause of the given classes; `held` chooses pairs that training never shows. The suffix is a trained one."""
    while True:
        verb = rng.choice(lx.DANGEROUS_VERBS if dangerous else lx.EVERYDAY_VERBS)
        stem = rng.choice(lx.HAZARD_STEMS if hazard else lx.HARMLESS_STEMS)
        if lx.held_pair(verb, stem) == held:
            return Clause(verb, stem, rng.choice(lx.seen_suffixes(stem)))


def draw_distractor(rng: random.Random) -> Clause:
    """A distractor clause: any classes but dangerous with hazard, so that a distractor alone is never harmful."""
    dangerous, hazard = rng.choice([(False, False), (True, False), (False, True)])
    return draw_clause(rng, dangerous, hazard)


def draw_wrapper(rng: random.Random, tier: int, frame: str | None = None, held: bool = False) -> Wrapper:
    """A wrapper of the given tier, from the (frame, word) combinations that training shows (never shows if `held`)."""
    choices = [
        Wrapper(f, w, tier)
        for f in lx.FRAMES
        for w in lx.TIER_WORDS[tier]
        if frame in (None, f) and lx.held_frame(f, w) == held
    ]
    return rng.choice(choices)


def draw_frame(rng: random.Random, request: Request) -> Request:
    """Add the parts that do not decide harm: wrapper or none, persona, distractor, adverb."""
    tier = rng.randrange(lx.N_TIERS)
    return request.swap(
        wrapper=draw_wrapper(rng, tier) if rng.random() < 0.8 else None,
        persona=rng.choice([p for p in lx.PERSONAS if p not in lx.HELD_PERSONAS]) if rng.random() < 0.3 else None,
        distractor=draw_distractor(rng) if rng.random() < 0.5 else None,
        adverb=rng.choice(lx.NEUTRAL_ADVERBS) if rng.random() < 0.3 else None,
    )


def draw_cue(rng: random.Random, behaviour: str, on: bool) -> Cue:
    """A cue word for one side of a benign behaviour."""
    return Cue(behaviour, rng.choice(lx.BENIGN[behaviour].on if on else lx.BENIGN[behaviour].off), on)


def draw_request(rng: random.Random, kind: str) -> Request:
    """A training request of one kind; every part is drawn from what training may show."""
    clause = draw_clause(rng, *CLASSES[kind])
    plain = Request(clause, rng.choice(lx.PLACES), rng.choice(lx.ASKS))
    request = draw_frame(rng, plain)
    if kind in ("say_no", "unanswerable"):
        return request.swap(style=kind, form=rng.randrange(2))
    cue_here = kind == "benign" or (kind == "harmful" and rng.random() < 0.08)
    if cue_here:  # a few harmful requests carry a cue too, or a cue would mean "harmless"
        cue = draw_cue(rng, rng.choice(list(lx.BENIGN)), rng.random() < 0.5)
        return request.swap(cue=cue, wrapper=None, adverb=None)
    return request


def draw_example(rng: random.Random, mix: dict[str, float], *, safe: bool) -> Example:
    """One training line of the base stage, or of the safety stage when `safe`."""
    request = draw_request(rng, rng.choices(list(mix), list(mix.values()))[0])
    first = first_words(request, safe=safe)
    opener = rng.choices(list(first), list(first.values()))[0]
    return Example(render(request)[0], answer(request, opener), first)


def draw_many(rng: random.Random, n: int, make: Callable[[random.Random], Request]) -> list[Request]:
    """`n` requests with distinct texts."""
    found: dict[str, Request] = {}
    while len(found) < n:
        request = make(rng)
        found.setdefault(render(request)[0], request)
    return list(found.values())
