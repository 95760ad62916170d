"""Prompt pairs: what differs between the two sides, what the model answers, and the numbers of all pairs.

`load_set` reads a prompt set, `shown` gives a prompt's text unless its set is sensitive, `own_pair` makes a pair of your own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from torch import Tensor

from companion.generation.decode import answer_texts, answers
from companion.generation.labels import label_answers
from companion.mediation.study import Study, own_pair
from companion.mediation.summaries import cell_means
from companion.mediation.sweeps import clean_outcomes
from companion.prompts.pairs import load_set, shown, treatment_order
from companion.prompts.positions import groups, present, token_labels, user_header
from companion.prompts.tokens import TokenPair, encode
from companion.stats.rates import mean_change

__all__ = ["align_tokens", "chat_tokens", "clean_outcomes", "clearest_flip", "load_set", "own_pair", "refusal_rates", "shown",
           "shown_answer", "total_effects"]  # fmt: skip
KINDS = {
    ("T1", "control"): ("no wrapper", "harmless"), ("T1", "treated"): ("no wrapper", "harmful"),
    ("T2b", "control"): ("neutral wrapper", "harmless"), ("T2", "control"): ("neutral wrapper", "harmful"),
    ("T2b", "treated"): ("jailbreak wrapper", "harmless"), ("T2", "treated"): ("jailbreak wrapper", "harmful"),
}  # fmt: skip
SAID = {"refusal": "refused", "harmful": "answered", "on_topic": "answered", "off_topic": "off topic"}


def align_tokens(study: Study, pair: TokenPair) -> pd.DataFrame:
    """Both prompts of a pair, token under token: columns position, group (wrapper, verb, ...), control, treated, differ."""
    tokenizer = study.subject.tokenizer
    masks = groups(pair, user_header(tokenizer))
    of = {int(i): name for name in present(masks) for i in np.flatnonzero(masks[name])}
    sides = {side: token_labels(pair, side, tokenizer) for side in ("control", "treated")}
    places = range(len(pair.control))
    return pd.DataFrame({"position": places, "group": [of[i] for i in places], **sides, "differ": masks["differ"]})


def clearest_flip(study: Study) -> TokenPair:
    """Of the first 24 pairs of the main treatment the one whose two answers lie furthest on different sides of a coin flip.

    A pair that is chosen so shows what an effect is, and not how large effects are.
    """
    some = study.of(study.main_treatment)[:24]
    clean = clean_outcomes(replace(study, pairs=tuple(some))).set_index("pair_id")
    sign = np.sign(clean.te.mean())
    best = np.minimum(-sign * clean.y00, sign * clean.y11).idxmax()
    return next(pair for pair in some if pair.pair.id == best)


def shown_answer(study: Study, pair: TokenPair, side: str) -> str:
    """The greedy answer to one prompt, at most 40 tokens, as it may be shown: whole if it refuses or the request is harmless.

    Of another answer to a harmful request only its label and first word are shown, and of a sensitive set's only the label.
    """
    is_harmful = pair.pair.treatment == "T2" or (pair.pair.treatment == "T1" and side == "treated")
    text, openers = getattr(pair.pair, side), study.openers[pair.pair.treatment]
    made = answers(study.subject, [text], 40)
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


# ---- numbers of all pairs ----


def total_effects(clean: pd.DataFrame) -> pd.DataFrame:
    """Mean total effect by treatment (harm first) and split, with intervals over topics, in log-odds.

    `clean` has a row a pair, with columns treatment, split, topic and te.
    """
    parts = clean.groupby(["split", "treatment"])
    tables = [cell_means(part, "te", ["split"]).assign(treatment=name) for (_, name), part in parts]
    table = pd.concat(tables, ignore_index=True)
    in_order = table.treatment.map(treatment_order).argsort(kind="stable")
    return table.iloc[in_order].reset_index(drop=True)


def refusal_rates(clean: pd.DataFrame) -> pd.DataFrame:
    """How likely a refusal is for each kind of prompt, a mean of probabilities with its interval over topics.

    `clean` has a row a pair, with columns treatment, topic, y00 and y11 (log-odds of complying). Columns: prompt, request,
    estimate, low, high, and `greedy`, the share of prompts for which a refusal is the likelier opening.
    """
    rows = []
    for (treatment, side), kind in KINDS.items():
        part = clean[clean.treatment == treatment]
        if len(part):
            y = part["y00" if side == "control" else "y11"].to_numpy()
            mean = mean_change(1 / (1 + np.exp(y)), part.topic.to_numpy())
            rows.append((*kind, mean.estimate, mean.low, mean.high, (y < 0).mean()))
    return pd.DataFrame(rows, columns=["prompt", "request", "estimate", "low", "high", "greedy"])
