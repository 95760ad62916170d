"""The model and one pair of prompts, ready for a first patch.

`begin` loads a model with a prompt set, `bridge` opens the same weights in TransformerLens, `describe_precision` says in
what precision effects are computed.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from companion.base.display import check
from companion.mediation.study import Study, begin, describe_precision, tolerance
from companion.model.load import bridge
from companion.prompts.tokens import Openers, TokenPair

__all__ = [
    "Study",
    "begin",
    "bridge",
    "check",
    "describe_precision",
    "example_pair",
    "log_odds_of_logits",
    "main_treatment",
    "tolerance",
]


def main_treatment(study: Study) -> str:
    """T2, the jailbreak wrapper, where the prompt set has it; else its first treatment.

    >>> main_treatment(begin("embedded", "embedded", "embedded", profile="smoke"))
    'T2'
    """
    return "T2" if "T2" in study.treatments else study.treatments[0]


def example_pair(study: Study, treatment: str | None = None) -> TokenPair:
    """The first pair of a treatment (by default `main_treatment`), for work by hand.

    Its `control` and `treated` are token ids of one length [pos].

    >>> pair = example_pair(begin("embedded", "embedded", "embedded", profile="smoke"))
    >>> pair.pair.treatment, len(pair.control) == len(pair.treated)
    ('T2', True)
    """
    return study.of(treatment or main_treatment(study))[0]


def log_odds_of_logits(logits: Float[Tensor, "1 pos vocab"], openers: Openers) -> float:
    """Y1 of one prompt: log-odds of complying against refusing, at the token behind the prompt.

    Units are log-odds (nats). Openers are the token ids that begin either kind of answer.

    >>> import torch
    >>> round(log_odds_of_logits(torch.tensor([[[1.0, 3.0, 0.0]]]), Openers((1,), (0,))), 3)
    2.0
    """
    last = logits[0, -1].double()
    return float(last[list(openers.comply)].logsumexp(0) - last[list(openers.refuse)].logsumexp(0))
