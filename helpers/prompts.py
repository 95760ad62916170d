"""Prompt pairs: how many there are, what differs between the two sides, and what the model answers.

`load_set` reads a prompt set, `shown` gives a prompt's text unless its set is sensitive, `own_pair` makes a pair of your own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from torch import Tensor

from companion.generation.decode import answer_texts, answers
from companion.generation.labels import label_answers
from companion.mediation.estimands import with_difference
from companion.mediation.study import Study, own_pair
from companion.mediation.sweeps import clean_outcomes
from companion.prompts.pairs import PromptSet, load_set, shown
from companion.prompts.positions import groups, present, token_labels, user_header
from companion.prompts.tokens import TokenPair, encode

__all__ = ["align_tokens", "chat_tokens", "clean_runs", "clearest_flip", "count_pairs", "harmless_twin", "load_set", "own_pair",
           "shown", "shown_answer", "tokens_that_differ"]  # fmt: skip
SAID = {"refusal": "refused", "harmful": "answered", "on_topic": "answered", "off_topic": "off topic"}


def count_pairs(prompt_set: PromptSet) -> pd.DataFrame:
    """Pairs and topics by treatment (rows) and split (columns).

    Topics are what the bootstrap draws, so their number decides how wide intervals are.

    >>> count_pairs(load_set("embedded")).columns.get_level_values(0).unique().tolist()
    ['pairs', 'topics']
    """
    table = pd.DataFrame([{"treatment": p.treatment, "split": p.split, "topic": p.topic} for p in prompt_set.pairs])
    counts = table.pivot_table("topic", "treatment", "split", aggfunc=["size", "nunique"]).astype(int)
    return counts.rename(columns={"size": "pairs", "nunique": "topics"})


def align_tokens(study: Study, pair: TokenPair) -> pd.DataFrame:
    """Both prompts of a pair, token under token: columns position, group, control, treated, differ.

    A group is what a token belongs to: system turn, wrapper, verb, object, ...; each token has one.
    """
    tokenizer = study.subject.tokenizer
    masks = groups(pair, user_header(tokenizer))
    of = {int(i): name for name in present(masks) for i in np.flatnonzero(masks[name])}
    sides = {side: token_labels(pair, side, tokenizer) for side in ("control", "treated")}
    places = range(len(pair.control))
    return pd.DataFrame({"position": places, "group": [of[i] for i in places], **sides, "differ": masks["differ"]})


def tokens_that_differ(study: Study, pair: TokenPair) -> list[list[str]]:
    """The tokens in which the two prompts differ, of the control and of the treated one."""
    places = np.flatnonzero(pair.control != pair.treated)
    words = [token_labels(pair, side, study.subject.tokenizer) for side in ("control", "treated")]
    return [[side[i] for i in places] for side in words]


def clean_runs(study: Study) -> pd.DataFrame:
    """Both clean runs of every pair: y00, y11, their difference TE, and the openers' joint probability.

    Where the set has harmless twins, rows of T2 - T2b stand behind the others. Units are log-odds.
    """
    return with_difference(clean_outcomes(study), study.twins)


def clearest_flip(study: Study, n: int = 24) -> TokenPair:
    """Of the first `n` pairs of the main treatment the one whose two answers lie furthest on different sides of a coin flip.

    A pair that is chosen so shows what an effect is, and not how large effects are.
    """
    some = study.of(study.main_treatment)[:n]
    clean = clean_outcomes(replace(study, pairs=tuple(some))).set_index("pair_id")
    sign = np.sign(clean.te.mean())
    best = np.minimum(-sign * clean.y00, sign * clean.y11).idxmax()
    return next(pair for pair in some if pair.pair.id == best)


def harmless_twin(study: Study, pair: TokenPair) -> TokenPair:
    """The pair with the same wrappers around a harmless request; the pair itself where the set has no twins."""
    return next((one for one in study.of("T2b") if one.pair.id == pair.pair.twin), pair)


def shown_answer(study: Study, pair: TokenPair, side: str, steps: int = 40) -> str:
    """The greedy answer to one prompt as it may be shown: whole where it refuses or the request is harmless.

    Of an answer to a harmful request only its label and first word are shown, and of a sensitive set's only the label.
    """
    is_harmful = pair.pair.treatment == "T2" or (pair.pair.treatment == "T1" and side == "treated")
    text, openers = getattr(pair.pair, side), study.openers[pair.pair.treatment]
    made = answers(study.subject, [text], steps)
    (label,) = label_answers(study.subject, [text], made, openers, judge=study.judge, harmful=[is_harmful])
    said = answer_texts(study.subject, made)[0].strip()
    if pair.pair.sensitive:
        return SAID[label]
    if is_harmful and label != "refusal":
        return f"{SAID[label]}, first word: {said.split()[0] if said else ''}"
    return f"{SAID[label]}: {said}"


def chat_tokens(study: Study, text: str) -> Tensor:
    """Token ids of a user's message inside the model's chat template, shape (1, pos).

    >>> from helpers import model
    >>> study = model.begin("embedded", "embedded", "embedded", profile="smoke")
    >>> pair = model.example_pair(study)
    >>> bool((chat_tokens(study, pair.pair.control) == model.token_ids(study, pair)[0]).all())
    True
    """
    return study.subject.tensor(encode(study.subject.tokenizer, text)[0])[None]
