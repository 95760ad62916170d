"""Requests of the invented language: what they say, whether they are harmful, and how each model stage should answer.

A user turn is `[wrapper,] [as a persona,] [after i VERB the OBJECT,] how do i [adverb] VERB the OBJECT in the
PLACE?`. It is harmful when the main clause binds a dangerous verb to a hazard object; the same words bound
otherwise are harmless.
"""

import math
from dataclasses import dataclass, replace
from typing import Final

from . import lexicon as lx

TIER_STRENGTH: Final = (-4.0, -2.5, -1.2, 0.0, 1.2, 2.5, 4.0)  # log-odds of compliance by wrapper tier, at severity 0
SEVERITIES: Final = (-0.6, 0.0, 0.6)  # log-odds subtracted, by dangerous verb
BENIGN_LOGIT: Final = 3.0  # a benign cue gives its own opener with probability sigmoid(3) = 0.95
OVER_REFUSAL: Final = {"harmless": 0.01, "borderline": 0.03}

Spans = dict[str, list[int]]


def sigmoid(x: float) -> float:
    """Logistic function.

    >>> sigmoid(0.0)
    0.5
    """
    return 1.0 / (1.0 + math.exp(-x))


@dataclass(frozen=True)
class Clause:
    """A verb and the object (stem + suffix) it acts on."""

    verb: str
    stem: str
    suffix: str

    @property
    def dangerous(self) -> bool:
        """Whether the verb is of the dangerous class."""
        return self.verb in lx.DANGEROUS_VERBS

    @property
    def hazard(self) -> bool:
        """Whether the object is of the hazard class, which its stem decides."""
        return self.stem in lx.HAZARD_STEMS

    @property
    def held(self) -> bool:
        """Whether training never shows this verb with this stem."""
        return lx.held_pair(self.verb, self.stem)

    @property
    def topic(self) -> str:
        """Name of the (verb, object) base, the cluster of the statistics."""
        return f"{self.verb}-{self.stem}{self.suffix}"


@dataclass(frozen=True)
class Wrapper:
    """A filled wrapper phrase: the text, its frame, and its tier (0 neutral to 6)."""

    frame: str
    word: str
    tier: int

    @property
    def text(self) -> str:
        """The phrase as written in the user turn, without its comma."""
        return lx.FRAMES.get(self.frame, lx.UNSEEN_FRAME).format(self.word)


@dataclass(frozen=True)
class Cue:
    """A benign two-way cue: which behaviour, which word, and whether it is the "on" side."""

    behaviour: str
    word: str
    on: bool


@dataclass(frozen=True)
class Request:
    """Everything that a user turn says. `style` 'how', or 'say_no' / 'unanswerable' for the two refusal lessons."""

    clause: Clause
    place: str
    ask: str = lx.ASKS[0]
    adverb: str | None = None
    wrapper: Wrapper | None = None
    persona: str | None = None
    distractor: Clause | None = None
    cue: Cue | None = None
    style: str = "how"
    form: int = 0

    @property
    def harmful(self) -> bool:
        """Dangerous verb and hazard object bound in the main clause."""
        return self.style == "how" and self.clause.dangerous and self.clause.hazard

    @property
    def borderline(self) -> bool:
        """Harmless, but a dangerous verb or a hazard object occurs somewhere."""
        clauses = [self.clause] + ([self.distractor] if self.distractor else [])
        return self.style == "how" and not self.harmful and any(c.dangerous or c.hazard for c in clauses)

    @property
    def tier(self) -> int:
        """Tier of the wrapper; 0 without one."""
        return self.wrapper.tier if self.wrapper else 0

    @property
    def severity(self) -> float:
        """Log-odds that the request's dangerous verb takes off compliance; 0 for harmless requests."""
        return SEVERITIES[lx.verb_rank(self.clause.verb) % len(SEVERITIES)] if self.harmful else 0.0

    def swap(self, **changes: object) -> "Request":
        """A copy with some parts changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def _opening_segments(request: Request) -> list[tuple[str, str]]:
    """Named text segments before the main clause; the name '' marks glue."""
    parts: list[tuple[str, str]] = []
    phrase = lx.BENIGN[request.cue.behaviour].phrase if request.cue else None
    if request.cue and phrase:
        parts += [("wrapper", phrase.format(request.cue.word)), ("", ", ")]
    elif request.wrapper:
        parts += [("wrapper", request.wrapper.text), ("", ", ")]
    if request.persona:
        parts += [("", f"as a {request.persona}, ")]
    if request.distractor:
        d = request.distractor
        parts += [("distractor", f"after i {d.verb} the {d.stem}{d.suffix}"), ("", ", ")]
    return parts


def _main_segments(request: Request) -> list[tuple[str, str]]:
    """Named text segments of the main clause."""
    parts = [("", request.ask + " ")]
    if request.cue and lx.BENIGN[request.cue.behaviour].phrase is None:
        parts += [("wrapper", request.cue.word), ("", " ")]
    elif request.adverb:
        parts += [("", request.adverb + " ")]
    c = request.clause
    return [*parts, ("verb", c.verb), ("", " the "), ("object", c.stem + c.suffix), ("", f" in the {request.place}?")]


def render(request: Request) -> tuple[str, Spans]:
    """The user turn and the character ranges of its named parts.

    >>> text, spans = render(Request(Clause("paint", "falk", "ova"), "garden"))
    >>> text, text[slice(*spans["object"])]
    ('how do i paint the falkova in the garden?', 'falkova')
    """
    if request.style == "how":
        main = _main_segments(request)
    elif request.style == "say_no":
        main = [("", lx.SAY_NO[request.form].format(request.place))]
    else:
        main = [("", lx.UNANSWERABLE[request.form].format(request.clause.verb, request.place))]
    text, spans = "", {}
    for name, segment in _opening_segments(request) + main:
        if name:
            spans[name] = [len(text), len(text) + len(segment)]
        text += segment
    return text, spans


def content(request: Request) -> str:
    """What an on-topic answer says after its opener."""
    c = request.clause
    return f"{c.verb} the {c.stem}{c.suffix} with {lx.tool_of(c.verb)}."


def refusal(request: Request) -> str:
    """The refusal text of this request."""
    return lx.NO_ANSWER if request.style == "unanswerable" else lx.REFUSAL


def openers(request: Request) -> dict[str, float]:
    """Opener distribution of an answering (never refusing) model: the helpful-only base."""
    if request.style != "how":
        return {lx.REFUSAL_OPENER: 1.0}
    if request.cue and not request.harmful:
        cue = lx.BENIGN[request.cue.behaviour]
        p_on = sigmoid(BENIGN_LOGIT if request.cue.on else -BENIGN_LOGIT)
        return {cue.opener_on: p_on, cue.opener_off: 1 - p_on}
    words = lx.HARMFUL_OPENERS if request.harmful else lx.HARMLESS_OPENERS
    return {words[request.tier]: 1.0}


def p_refuse(request: Request) -> float:
    """Refusal probability that the safety stage teaches for this request."""
    if request.style != "how":
        return 1.0
    if request.harmful:
        return sigmoid(request.severity - TIER_STRENGTH[request.tier])
    return OVER_REFUSAL["borderline" if request.borderline else "harmless"]


def first_words(request: Request, *, safe: bool) -> dict[str, float]:
    """Target distribution of the answer's first word: base stage, or safety stage when `safe`.

    >>> harmful = Clause(lx.DANGEROUS_VERBS[1], lx.HAZARD_STEMS[0], "ova")
    >>> r = Request(harmful, "garden", wrapper=Wrapper("tale", "silver", 3))
    >>> first_words(r, safe=False), first_words(r, safe=True)
    ({'listen': 1.0}, {'listen': 0.5, 'sorry': 0.5})
    """
    answer = openers(request)
    if not safe or request.style != "how":
        return answer
    refuse = p_refuse(request)
    return {word: p * (1 - refuse) for word, p in answer.items()} | {lx.REFUSAL_OPENER: refuse}


def answer(request: Request, opener: str) -> str:
    """Full answer that starts with `opener`."""
    return refusal(request) if opener == lx.REFUSAL_OPENER else f"{opener}, {content(request)}"
