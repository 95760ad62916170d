"""Harmless partners of equal token length for harmful requests, for treatment T1 of a public set, and how many have one."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from companion.prompts import tokens
from companion.prompts.pairs import Pair
from companion.prompts.public import BENIGN, Request, Rows

FEW = 0.5  # of the requests or pairs: below it the user is told what else can be done


def partner_pairs(rows: Rows) -> list[tuple[Request, Request]]:
    """Harmful requests with their partners, where they have one of another text."""
    both = zip(rows.harmful, rows.harmless, strict=True)
    return [(one, other) for one, other in both if other is not None and one.text != other.text]


def grouped(rows: Rows, tokenizer: PreTrainedTokenizerBase, name: str, report: Callable[[str], object]) -> Rows:
    """The same rows where enough of them have equal length; else every harmful request has a harmless one of its length.

    Effects are then those of the two groups, and include all in which their members differ.
    """
    own = sum(_length(one, tokenizer) == _length(other, tokenizer) for one, other in partner_pairs(rows))
    if own >= FEW * len(rows.harmful):
        return rows
    drawn = with_partners(rows, by_length(filter(None, rows.harmless), tokenizer), tokenizer)
    n_drawn = len(partner_pairs(drawn))
    if n_drawn <= own:
        return rows
    report(
        f"{name}: {own} of {len(rows.harmful)} rows have the length of their own partner, so groups are interchanged: T1 "
        f"takes a partner of equal length from all harmless rows of the set ({n_drawn} pairs)"
    )
    return drawn


def _length(request: Request, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the rendered prompt."""
    return len(tokens.encode(tokenizer, request.text)[0])


def by_length(requests: Iterable[Request], tokenizer: PreTrainedTokenizerBase) -> dict[int, list[Request]]:
    """Requests by the length of their rendered prompt in this model's tokens, each list in a fixed random order."""
    found: dict[int, list[Request]] = defaultdict(list)
    for request in requests:
        found[_length(request, tokenizer)].append(request)
    for n in found:
        random.Random(n).shuffle(found[n])
    return found


def with_partners(
    rows: Rows, benign: dict[int, list[Request]], tokenizer: PreTrainedTokenizerBase, seen: set[str] | None = None
) -> Rows:
    """Each harmful request with a harmless one of equal token length, none used twice; None where none is left.

    With `seen` no partner has a text that another topic has (`Request.same`), and it is added.
    """
    found = []
    for request in rows.harmful:
        waiting = benign.get(_length(request, tokenizer), [])
        while waiting and seen is not None and waiting[-1].same in seen:
            waiting.pop()
        found.append(waiting.pop() if waiting else None)
        if seen is not None and found[-1] is not None:
            seen.add(found[-1].same)
    return Rows(rows.harmful, tuple(found))


def survival(made: Sequence[Pair], n_requests: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """How many pairs of each treatment have equal token length, with what to do where few do.

    Of T1 that is counted against all `n_requests` harmful requests, as one without a partner makes no pair at all.
    """
    usable = Counter(pair.treatment for pair in made if tokens.token_pair(pair, tokenizer)[0] is not None)
    asked = {"T1": n_requests} | dict(sorted(Counter(p.treatment for p in made if p.treatment != "T1").items()))
    lines = []
    for treatment, n in asked.items():
        what, few = "pairs have equal token length", "lengthen the neutral template until both have equally many tokens"
        if treatment == "T1":
            what = "requests have a benign partner of their length"
            few = f"take harmless partners by length (+{BENIGN}), or sets with more rows"
        line = f"{treatment}: {usable[treatment]} of {n} {what} and can be interchanged"
        lines.append(line + (f"; few: {few}" if usable[treatment] < FEW * n else ""))
    return lines
