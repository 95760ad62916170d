"""What a model does with prompts, plain or steered: log-odds of its first token, and the price of steering.

Prompts of one length are read in one batch, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.base.device import to_host
from companion.generation.decode import Answers
from companion.generation.forward import BATCH, buckets, buckets_each, read_prompts
from companion.generation.hooks import PLAIN, Steering
from companion.model import memory
from companion.model.architecture import Subject
from companion.prompts.tokens import Openers

LOGIT_BYTES = 2**28  # of the log-probabilities of one batch of answers


def log_odds(subject: Subject, texts: Sequence[str], openers: Openers) -> pd.DataFrame:
    """A row a prompt: Y1 (`log_odds` of complying) and the probability of opening with a refusal (`p_refuse`)."""
    return log_odds_each(subject, texts, openers, [PLAIN])[0]


@torch.no_grad()
def log_odds_each(
    subject: Subject, texts: Sequence[str], openers: Openers, steered: Sequence[Steering]
) -> list[pd.DataFrame]:
    """`log_odds` under each of the steerings, in their order; together where they have the same sites."""
    found, use = np.empty((len(steered), len(texts), 2)), partial(_opening, subject, openers)
    for places, ids in buckets(subject, texts, system=common_system(steered)):
        found[:, places] = to_host(read_prompts(subject, ids, steered, use, cached=False))
    return [pd.DataFrame(one, columns=["log_odds", "p_refuse"]) for one in found]


def common_system(steered: Sequence[Steering]) -> str:
    """The system turn of steerings that are tried together."""
    (system,) = {one.system for one in steered}
    return system


def _opening(
    subject: Subject, openers: Openers, rows: Int[Tensor, "row"], logits: Float[Tensor, "row vocab"], cache: Any
) -> Float[Tensor, "row 2"]:
    """Y1 and the probability of a refusal's opener, so that no more than that is kept of the logits."""
    made = []
    for some in memory.vocabulary_blocks(subject, len(logits), 1):
        part = logits[some].double()
        refuse = part[:, list(openers.refuse)].logsumexp(-1)
        if openers.rest:
            answered = part.index_fill(-1, subject.tensor(openers.refuse), -torch.inf)
        else:
            answered = part[:, list(openers.comply)]
        comply = answered.logsumexp(-1)
        made.append(torch.stack([comply - refuse, (refuse - part.logsumexp(-1)).exp()], -1))
    return torch.cat(made)


@torch.no_grad()
def price_each(subject: Subject, texts: Sequence[str], own: Answers, steered: Sequence[Steering]) -> list[pd.DataFrame]:
    """How far each steering moves the model's own unsteered answers, a row a prompt, teacher-forced.

    `kl` is the mean over answer tokens of KL(unsteered || steered) in nats; `plain` and `steered` are the summed
    log-probabilities of the answer, `n_tokens` its length: the perplexity ratio is exp of their mean difference.
    """
    found, system = np.empty((len(steered), len(texts), 4)), common_system(steered)
    # Rows of answers whose log-probabilities are alive together.
    rows = max(1, min(BATCH, LOGIT_BYTES // (16 * own.ids.shape[1] * int(subject.unembedding[0].shape[0]))))
    for places, (prompt, sent) in buckets_each(subject, texts, ["", system], rows):
        answer, mask = (subject.tensor(x[places]) for x in (own.ids, own.mask))
        forced = partial(answer_log_probs, subject, answer)
        (plain,) = read_prompts(subject, prompt, [PLAIN], forced)
        known = None if system else plain
        for k, moved in enumerate(read_prompts(subject, sent, steered, forced, plain=known, rows=rows)):
            kl = ((plain - moved).mul_(plain.exp()).sum(-1) * mask).sum(-1)
            spoken = [(at.gather(-1, answer[..., None])[..., 0] * mask).sum(-1) for at in (plain, moved)]
            length = mask.sum(-1)
            found[k, places] = to_host(torch.stack([kl / length, *spoken, length.double()], dim=-1))
    return [pd.DataFrame(one, columns=["kl", "plain", "steered", "n_tokens"]) for one in found]


def answer_log_probs(
    subject: Subject,
    answer: Int[Tensor, "prompt step"],
    rows: Int[Tensor, "row"],
    logits: Float[Tensor, "row vocab"],
    cache: Any,
) -> Float[Tensor, "row step vocab"]:
    """Log-probabilities before each answer token. The prompt is read first and alone, as in generation."""
    said = [logits[:, None], subject.model(answer[rows, :-1], past_key_values=cache, use_cache=True).logits]
    both = torch.cat(said, dim=1).double()
    said.clear()  # whole vocabularies: the next step needs the room
    return both.log_softmax(-1)
