"""Short ways to ask for effects, and plain forward passes to compare them with."""

from typing import Any

import torch
from torch import Tensor, nn

from companion.mediation.estimands import Mediator
from companion.model.architecture import Subject
from companion.prompts.tokens import Openers

SITES = ("resid_post", "attn_out", "mlp_out", "head")
DIRECT = ("attn_out.direct", "mlp_out.direct")
CELLS = ["y00", "y01", "y10", "y11"]
YES_NO = Openers((10, 12), (20, 21, 22))


def refusals_against_rest(n_rows: int, refuse: tuple[int, ...] = YES_NO.refuse) -> tuple[Openers, Openers]:
    """All other tokens against the refusals, as they are asked for and as plain lists, which define the same."""
    comply = tuple(i for i in range(n_rows) if i not in refuse)
    return Openers(comply, refuse, rest=True), Openers(comply, refuse)


def said(subject: Subject) -> Openers:
    """The openers of a compiled model: "yes" and "no"."""
    return Openers(*((subject.tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))


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
