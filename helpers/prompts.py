"""Prompt pairs as tables: how many there are, and what differs between the two sides.

`load_set` reads a prompt set, `shown` gives a prompt's text unless its set is sensitive, `own_pair` makes a pair of your own.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import Tensor

from companion.mediation.study import Study, own_pair
from companion.prompts.pairs import PromptSet, load_set, shown
from companion.prompts.positions import groups, present, token_labels, user_header
from companion.prompts.tokens import TokenPair, encode

__all__ = ["align_tokens", "chat_tokens", "count_pairs", "load_set", "own_pair", "shown", "tokens_that_differ"]


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


def chat_tokens(study: Study, text: str) -> Tensor:
    """Token ids of a user's message inside the model's chat template, shape (1, pos).

    >>> from helpers import model
    >>> study = model.begin("embedded", "embedded", "embedded", profile="smoke")
    >>> pair = model.example_pair(study)
    >>> bool((chat_tokens(study, pair.pair.control) == model.token_ids(study, pair)[0]).all())
    True
    """
    return study.subject.tensor(encode(study.subject.tokenizer, text)[0])[None]
