"""Timing and the price of closing a set, against runs that are patched by plain hooks."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from families import tiny_subject
from handmade import random_pairs
from torch import Tensor

from companion.mediation import outcomes
from companion.mediation.estimands import prompt_tokens
from companion.model.architecture import Subject
from companion.neurons.clamping import NeuronSet
from companion.neurons.teacher_forcing import STEPS, closed_values, closing_cost, timing_effects
from companion.prompts.tokens import Openers

OPENERS = {"T2": Openers((5, 9), (33,), 0)}
SETS = [NeuronSet("last", 3, (1, 4)), NeuronSet("below", 1, (0, 7))]
Edit = Callable[[Tensor], Tensor | None]


def hooked(subject: Subject, whole: Tensor, one: NeuronSet, edit: Edit) -> Tensor:
    """Logits of one plain forward pass; `edit` sees the set's values at every position and may change them in place."""

    def hook(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = args[0].clone()
        own = value[..., list(one.neurons)]
        edit(own)
        value[..., list(one.neurons)] = own
        return (value, *args[1:])

    handle = subject.layers[one.layer].down_proj.register_forward_pre_hook(hook)
    with torch.no_grad():
        logits = subject.model(whole).logits
    handle.remove()
    return logits


def log_prob(
    subject: Subject, prompt: Tensor, text: Tensor, mask: Tensor, one: NeuronSet, edit: Edit = lambda own: None
) -> Tensor:
    """log p of a text behind a prompt."""
    logits = hooked(subject, torch.cat([prompt, text[:, :-1]], dim=1), one, edit)
    scores = logits[:, prompt.shape[1] - 1 :].double().log_softmax(-1)
    return (scores.gather(-1, text[..., None])[..., 0] * mask).sum(-1)


def values(subject: Subject, whole: Tensor, one: NeuronSet) -> Tensor:
    seen: list[Tensor] = []
    hooked(subject, whole, one, lambda own: seen.append(own.clone()))
    return seen[0]


def setting(at: slice, new: Tensor) -> Edit:
    def edit(own: Tensor) -> None:
        own[:, at] = new

    return edit


@pytest.mark.parametrize("one", SETS, ids=["last", "below"])
@pytest.mark.parametrize(("when", "at"), [("first", slice(8, 9)), ("every", slice(8, None))])
def test_timing_is_that_of_hooked_runs(one: NeuronSet, when: str, at: slice) -> None:
    subject, pairs = tiny_subject("llama"), random_pairs(3, 9, 60)
    got = timing_effects(subject, pairs, OPENERS, SETS)
    prompts = prompt_tokens(subject, pairs)
    texts = outcomes.continuations(subject, *prompts, OPENERS["T2"], STEPS)
    wanted = torch.zeros(3, dtype=torch.float64)
    for text, mask, sign in ((texts.answer, texts.answer_mask, 1), (texts.refusal, texts.refusal_mask, -1)):
        runs = [values(subject, torch.cat([p, text[:, :-1]], dim=1), one) for p in prompts]
        for base, direction in ((0, 1), (1, -1)):
            edit = setting(at, runs[1 - base][:, at])
            clean, moved = (log_prob(subject, prompts[base], text, mask, one, *e) for e in ((), (edit,)))
            wanted += sign * direction * (moved - clean) / 2
    np.testing.assert_allclose(got[got["set"] == one.name][when], wanted.numpy(), atol=1e-4)
    assert abs(wanted).max() > 1e-3


def test_closing_cost_is_that_of_a_hooked_run() -> None:
    subject, pairs, one = tiny_subject("llama"), random_pairs(3, 9, 60), SETS[1]
    closed = closed_values(subject, pairs, SETS)
    control, treated = prompt_tokens(subject, pairs)
    torch.testing.assert_close(closed[one], values(subject, control, one)[:, -1], rtol=0, atol=1e-6)
    got = closing_cost(subject, pairs, OPENERS, {each: runs[:2] for each, runs in closed.items()})
    got = got[got["set"] == one.name]
    texts = outcomes.continuations(subject, treated, treated, OPENERS["T2"], STEPS)
    text, edit = (texts.answer, texts.answer_mask), setting(slice(8, None), closed[one][[0, 1, 0], None])
    wanted = log_prob(subject, treated, *text, one) - log_prob(subject, treated, *text, one, edit)
    np.testing.assert_allclose(got.lost, wanted.numpy(), atol=1e-4)
    assert got.n_tokens.tolist() == texts.answer_mask.sum(1).tolist() and abs(wanted).max() > 1e-3
