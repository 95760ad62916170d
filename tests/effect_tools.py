"""Short ways to ask for effects, and plain forward passes to compare them with."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from handmade import random_pairs
from torch import Tensor, nn

from companion.mediation.estimands import Mediator, measure_effects
from companion.model.architecture import Subject
from companion.prompts.tokens import Openers, TokenPair

SITES = ("resid_post", "attn_out", "mlp_out", "head")
DIRECT = ("attn_out.direct", "mlp_out.direct")
CELLS = ["y00", "y01", "y10", "y11"]
YES_NO = Openers((10, 12), (20, 21, 22))


def of(names: Openers | None = None, *treatments: str) -> dict[str, Openers]:
    return dict.fromkeys(treatments or ("T2",), names or YES_NO)


def said(subject: Subject) -> Openers:
    """The openers of a compiled model: "yes" and "no"."""
    return Openers(*((subject.tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))


def one(subject: Subject, pairs: list[TokenPair], *wanted: Mediator, names: tuple[str, ...] = ("Y1",)) -> pd.DataFrame:
    return measure_effects(subject, pairs, of(), wanted, names)


def runs(subject: Subject, pairs: list[TokenPair]) -> tuple[Tensor, Tensor]:
    """Plain logits of control and treated at the last token."""
    both = (torch.tensor(np.stack([getattr(pair, side) for pair in pairs])) for side in ("control", "treated"))
    return tuple(subject.model(ids).logits[:, -1] for ids in both)


def log_odds(logits: Tensor, openers: Openers = YES_NO) -> Tensor:
    log_p = logits.detach().double().log_softmax(-1)
    return log_p[..., list(openers.comply)].logsumexp(-1) - log_p[..., list(openers.refuse)].logsumexp(-1)


def swapped(subject: Subject, mediator: Mediator, base: Tensor, source: Tensor, where: Tensor, **inputs: Tensor) -> Any:
    """The model's output on `base`, one module's output `where` taken from a pass over `source`, by the library's hooks."""
    block = subject.model.model.layers[mediator.layer]
    module = {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[mediator.site]
    seen: list[Tensor] = []

    def swap(_: nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        own = output[0] if isinstance(output, tuple) else output
        seen.append(own)
        if len(seen) == 1:
            return None
        mixed = torch.where(where[..., None], seen[0], own)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    handle = module.register_forward_hook(swap)
    try:
        subject.model(source)
        return subject.model(base, **inputs)
    finally:
        handle.remove()


def mixed_pairs() -> list[TokenPair]:
    """Two lengths and two treatments, shuffled."""
    kinds = [(9, "T2", 1), (11, "B1", 2), (9, "B1", 3), (11, "T2", 4)]
    pairs = [pair for n_pos, name, seed in kinds for pair in random_pairs(3, n_pos, 61, seed=seed, treatment=name)]
    for i, pair in enumerate(pairs):
        object.__setattr__(pair.pair, "id", f"{pair.pair.treatment}.{i}")
    return [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
