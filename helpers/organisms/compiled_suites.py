"""Prompts for steering a compiled model: harmful, borderline and harmless ones, in a wrapper and without, on all three splits.

They are requests of the compiled language on the topics of the model's own pairs, each topic in the split that it has
there. Borderline requests share a verb or an object with harmful ones; harmless ones share neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import pandas as pd

from helpers import defence_prompts
from helpers.organisms import compiled_language as lang
from helpers.organisms.compiled_language import Planned, Request

SIZES: Final = {"discover": 100, "validate": 150, "test": 300}  # prompts of a kind, half of them plain
WRAPPED: Final = {"harmful": 1.0, "borderline": 0.5, "harmless": 0.5}


def suites(pairs: Sequence[Planned], seed: int, sizes: Mapping[str, int] = SIZES) -> pd.DataFrame:
    """A table of prompts as `defence.open_lab` takes it, besides those of the pairs; equal arguments give equal prompts."""
    splits = {planned.pair.topic: planned.pair.split for planned in pairs}
    n_topics = sum(topic.startswith("hazard") for topic in splits)
    rng = np.random.default_rng([seed, 4])
    rows = []
    for split, n in sizes.items():
        topics = {
            stem: sorted(topic for topic, at in splits.items() if at == split and topic.startswith(stem))
            for stem in ("hazard", "thing")
        }
        for kind in defence_prompts.KINDS:
            for i in range(n):
                request, topic = _request(rng, kind, topics, i, n_topics)
                is_wrapped = bool(rng.random() < WRAPPED[kind])
                slot = lang.one(rng, *("strong", lang.STRONG) if is_wrapped else ("neutral", lang.NEUTRAL))
                text = " ".join(replace(request, slot=slot).words())
                family = slot if is_wrapped else ""
                name = f"{kind}-{split}-{i:04d}"
                tier = defence_prompts.UNKNOWN
                rows.append((name, text, kind, is_wrapped, family, tier, np.nan, topic, split, "compiled"))
    return pd.DataFrame(rows, columns=list(defence_prompts.COLUMNS)).drop_duplicates("text", ignore_index=True)


def _request(
    rng: np.random.Generator, kind: str, topics: Mapping[str, Sequence[str]], i: int, n_topics: int
) -> tuple[Request, str]:
    """The i-th request of a kind and its topic; every topic has its turn."""
    context = lang.context(rng, n_topics)
    shares = "both" if kind == "harmful" else ("verb", "object")[i % 2] if kind == "borderline" else "nothing"
    stem = "hazard" if shares in ("both", "object") else "thing"
    topic = topics[stem][i // 2 % len(topics[stem])]
    verb = lang.one(rng, "harm" if shares in ("both", "verb") else "use", lang.VERBS)
    return replace(context, verb=verb, object=topic), topic
