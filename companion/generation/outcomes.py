"""What a model does with prompts, plain or steered: log-odds of its first token, and the price of steering.

Prompts of one length are read in one batch, without padding. Steering is switched on by a context manager around the
model's calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from companion.base.device import to_host
from companion.generation.decode import Answers
from companion.generation.forward import BATCH, Steer, Use, buckets, buckets_each, read_prompts, read_prompts_each
from companion.generation.hooks import Steering
from companion.model import memory
from companion.model.architecture import Subject
from companion.prompts.tokens import Openers

LOGIT_BYTES = 2**28  # of the log-probabilities of one batch of answers
_spoken: WeakKeyDictionary[PreTrainedModel, dict[tuple[tuple[int, ...], ...], Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def log_odds(
    subject: Subject, texts: Sequence[str], openers: Openers, steer: Steer = nullcontext, *, system: str = ""
) -> pd.DataFrame:
    """A row a prompt: Y1 (`log_odds` of complying) and the probability of opening with a refusal (`p_refuse`)."""
    found, use = np.empty((len(texts), 2)), partial(_opening, subject, openers)
    for places, ids in buckets(subject, texts, system=system):
        found[places] = to_host(read_prompts(subject, ids, steer, use, cached=False))
    return pd.DataFrame(found, columns=["log_odds", "p_refuse"])


@torch.no_grad()
def log_odds_each(
    subject: Subject, texts: Sequence[str], openers: Openers, steered: Sequence[Steering]
) -> list[pd.DataFrame]:
    """`log_odds` under each of the steerings, in their order; together where they have the same sites."""
    found, use = np.empty((len(steered), len(texts), 2)), partial(_opening, subject, openers)
    for places, ids in buckets(subject, texts, system=common_system(steered)):
        found[:, places] = to_host(read_prompts_each(subject, ids, steered, use, cached=False))
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
def price(subject: Subject, texts: Sequence[str], own: Answers, steer: Steer, *, system: str = "") -> pd.DataFrame:
    """How far steering moves the model's own unsteered answers, a row a prompt, teacher-forced.

    `kl` is the mean over answer tokens of KL(unsteered || steered) in nats; `plain` and `steered` are the summed
    log-probabilities of the answer, `n_tokens` its length: the perplexity ratio is exp of their mean difference.
    """

    def steered(ids: Tensor, use: Use, plain: Tensor | None) -> Tensor:
        return read_prompts(subject, ids, steer, use, plain=plain)[None]

    return _prices(subject, texts, own, 1, system, steered)[0]


def price_each(subject: Subject, texts: Sequence[str], own: Answers, steered: Sequence[Steering]) -> list[pd.DataFrame]:
    """`price` of each of the steerings, in their order; together where they have the same sites."""

    def each(ids: Tensor, use: Use, plain: Tensor | None) -> Tensor:
        return read_prompts_each(subject, ids, steered, use, plain=plain, rows=_size(subject, own))

    return _prices(subject, texts, own, len(steered), common_system(steered), each)


def _size(subject: Subject, own: Answers) -> int:
    """Rows of answers whose log-probabilities are alive together."""
    return max(1, min(BATCH, LOGIT_BYTES // (16 * own.ids.shape[1] * int(subject.unembedding[0].shape[0]))))


@torch.no_grad()
def _prices(
    subject: Subject, texts: Sequence[str], own: Answers, n: int, system: str,
    steered_read: Callable[[Tensor, Use, Tensor | None], Tensor],
) -> list[pd.DataFrame]:  # fmt: skip
    found = np.empty((n, len(texts), 4))
    for places, (prompt, sent) in buckets_each(subject, texts, ["", system], _size(subject, own)):
        answer, mask = (subject.tensor(x[places]) for x in (own.ids, own.mask))
        forced = partial(answer_log_probs, subject, answer)
        plain = _plainly(subject, prompt, answer, forced)
        for k, steered in enumerate(steered_read(sent, forced, None if system else plain)):
            kl = ((plain.exp() * (plain - steered)).sum(-1) * mask).sum(-1)
            spoken = [(at.gather(-1, answer[..., None])[..., 0] * mask).sum(-1) for at in (plain, steered)]
            length = mask.sum(-1)
            found[k, places] = to_host(torch.stack([kl / length, *spoken, length.double()], dim=-1))
    return [pd.DataFrame(one, columns=["kl", "plain", "steered", "n_tokens"]) for one in found]


def _plainly(subject: Subject, prompt: Tensor, answer: Tensor, forced: Use) -> Float[Tensor, "prompt step vocab"]:
    """The plain model's log-probabilities, from memory if they were asked for lately: every arm is held against them."""
    kept = _spoken.setdefault(subject.model, {})
    key = (tuple(prompt.flatten().tolist()), tuple(answer.flatten().tolist()))
    if key not in kept:
        made = read_prompts(subject, prompt, nullcontext, forced)
        if sum(one.nbytes for one in kept.values()) + made.nbytes > LOGIT_BYTES:
            kept.clear()
        kept[key] = made
    return kept[key]


def answer_log_probs(
    subject: Subject,
    answer: Int[Tensor, "prompt step"],
    rows: Int[Tensor, "row"],
    logits: Float[Tensor, "row vocab"],
    cache: Any,
) -> Float[Tensor, "row step vocab"]:
    """Log-probabilities before each answer token. The prompt is read first and alone, as in generation."""
    rest = subject.model(answer[rows, :-1], past_key_values=cache, use_cache=True).logits
    return torch.cat([logits[:, None], rest], dim=1).double().log_softmax(-1)
