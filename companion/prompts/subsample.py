"""Fewer pairs, fairly: a quick look must not change which topics, splits and kinds of pairs are seen."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from companion.base.errors import InputError
from companion.prompts.pairs import MIN_PAIRS, SPLIT_SHARES, SPLITS, Pair

SMOKE_PAIRS = 24  # a treatment, in the smoke profile


def pairs_asked(pairs: int, profile: str) -> int:
    """How many pairs a treatment a run takes at most (0: all).

    >>> pairs_asked(0, "full"), pairs_asked(0, "smoke"), pairs_asked(50, "smoke")
    (0, 24, 50)
    """
    return pairs or (SMOKE_PAIRS if profile == "smoke" else 0)


def subsample(pairs: Sequence[Pair], n: int) -> tuple[Pair, ...]:
    """At most `n` pairs a treatment (0: all), in the order of the file, split 40/30/30, twins kept with their pairs."""
    if n == 0:
        return tuple(pairs)
    if n < MIN_PAIRS:
        raise InputError(f"--pairs {n}: at least {MIN_PAIRS} pairs a treatment are needed (0 means all)")
    cuts = np.rint(np.cumsum((0, *SPLIT_SHARES)) * n).astype(int)
    quota = dict(zip(SPLITS, np.diff(cuts).tolist(), strict=True))
    twins = {pair.twin for pair in _first(pairs, quota, "T2") if pair.twin}
    kept: set[str] = set()
    for treatment in {pair.treatment for pair in pairs}:
        chosen = _first(pairs, quota, treatment)
        kept |= twins if treatment == "T2b" and twins else {pair.id for pair in chosen}
    return tuple(pair for pair in pairs if pair.id in kept)


def _first(pairs: Sequence[Pair], quota: Mapping[str, int], treatment: str) -> list[Pair]:
    """Pairs of each split: one topic after another, and of each topic's pairs one of the family seen least so far.

    So few pairs still span many topics and kinds of pairs. Ties are broken by a hash of the id, since files often list
    one kind of pair first.
    """
    chosen: list[Pair] = []
    for split, size in quota.items():
        members = [pair for pair in pairs if pair.treatment == treatment and pair.split == split]
        members.sort(key=lambda pair: hashlib.sha256(pair.id.encode()).hexdigest())
        waiting: dict[str, list[Pair]] = {}
        for pair in members:
            waiting.setdefault(pair.topic, []).append(pair)
        families: Counter[str] = Counter()
        taken: list[Pair] = []
        while waiting and len(taken) < size:
            for topic in list(waiting)[: size - len(taken)]:
                pair = min(waiting[topic], key=lambda one: families[one.family])
                families[pair.family] += 1
                taken.append(pair)
                waiting[topic].remove(pair)
                if not waiting[topic]:
                    del waiting[topic]
        chosen += taken
    return chosen
