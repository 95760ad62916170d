"""Timing and the price of closing a set, against runs that are patched by plain hooks."""

import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny_subject
from handmade import random_pairs
from test_gates import synthetic

from companion.mediation import outcomes
from companion.mediation.estimands import prompt_tokens
from companion.model.architecture import Subject
from companion.neurons import clamping, gating
from companion.neurons.clamping import NeuronSet
from companion.prompts.tokens import Openers

OPENERS = {"T2": Openers((5, 9), (33,), 0)}
SETS = [NeuronSet("last", 3, (1, 4)), NeuronSet("below", 1, (0, 7))]


def log_prob(subject: Subject, prompt: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, edit=None, one=SETS[0]):
    """log p of a text behind a prompt in one plain forward pass; `edit` changes the set's values at every position."""
    whole = torch.cat([prompt, text[:, :-1]], dim=1)

    def hook(module, args):
        value = args[0].clone()
        value[..., list(one.neurons)] = edit(value[..., list(one.neurons)])
        return (value, *args[1:])

    handle = subject.layers[one.layer].down_proj.register_forward_pre_hook(hook) if edit else None
    with torch.no_grad():
        scores = subject.model(whole).logits[:, prompt.shape[1] - 1 :].double().log_softmax(-1)
    if handle:
        handle.remove()
    return (scores.gather(-1, text[..., None])[..., 0] * mask).sum(-1)


def values(subject: Subject, whole: torch.Tensor, one: NeuronSet) -> torch.Tensor:
    seen = []
    handle = subject.layers[one.layer].down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        subject.model(whole)
    handle.remove()
    return seen[0][..., list(one.neurons)]


@pytest.mark.parametrize("one", SETS, ids=["last", "below"])
@pytest.mark.parametrize("when", ["first", "every"])
def test_timing_is_that_of_hooked_runs(one: NeuronSet, when: str) -> None:
    subject, pairs = tiny_subject("llama"), random_pairs(3, 9, 60)
    got = clamping.timing(subject, pairs, OPENERS, SETS)
    prompts = prompt_tokens(subject, pairs)
    texts = outcomes.continuations(subject, *prompts, OPENERS["T2"], clamping.STEPS)
    at = slice(8, 9) if when == "first" else slice(8, None)
    wanted = torch.zeros(3, dtype=torch.float64)
    for text, mask, sign in ((texts.answer, texts.answer_mask, 1), (texts.refusal, texts.refusal_mask, -1)):
        runs = [values(subject, torch.cat([p, text[:, :-1]], dim=1), one) for p in prompts]
        for base, direction in ((0, 1), (1, -1)):

            def edit(own: torch.Tensor, source: torch.Tensor = runs[1 - base]) -> torch.Tensor:
                new = own.clone()
                new[:, at] = source[:, at]
                return new

            clean = log_prob(subject, prompts[base], text, mask)
            wanted += sign * direction * (log_prob(subject, prompts[base], text, mask, edit, one) - clean) / 2
    found = got[got["set"] == one.name][when].to_numpy()
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
    assert abs(wanted).max() > 1e-3


def test_closing_cost_is_that_of_a_hooked_run() -> None:
    subject, pairs, one = tiny_subject("llama"), random_pairs(3, 9, 60), SETS[1]
    closed = clamping.closed_values(subject, pairs, SETS)
    control, treated = prompt_tokens(subject, pairs)
    torch.testing.assert_close(closed[one], values(subject, control, one)[:, -1], rtol=0, atol=1e-6)
    got = clamping.closing_cost(subject, pairs, OPENERS, {each: runs[:2] for each, runs in closed.items()})
    got = got[got["set"] == one.name]
    texts = outcomes.continuations(subject, treated, treated, OPENERS["T2"], clamping.STEPS)

    def edit(own: torch.Tensor) -> torch.Tensor:
        new = own.clone()
        new[:, 8:] = closed[one][[0, 1, 0], None]
        return new

    text = (texts.answer, texts.answer_mask)
    wanted = log_prob(subject, treated, *text) - log_prob(subject, treated, *text, edit, one)
    np.testing.assert_allclose(got.lost, wanted.numpy(), atol=1e-4)
    assert got.n_tokens.tolist() == texts.answer_mask.sum(1).tolist() and abs(wanted).max() > 1e-3


def test_shares_are_ratios_of_means() -> None:
    table = synthetic(np.random.default_rng(0), "T2", 1.0, 1.0, 0.0)
    table = table.assign(first=table.y01 - table.y00, every=table.y11 - table.y00)
    share = gating.timing_share(table, "T2", "set")
    assert (
        share is not None and share.estimate[0] == pytest.approx(0.5, abs=0.02) and share.low[0] < 0.5 < share.high[0]
    )
    cost = pd.DataFrame({"topic": list("aabbcc"), "set": "set", "lost": [0.0, 0.3] * 3, "n_tokens": [1.0, 2.0] * 3})
    ratio = gating.perplexity_ratio(cost, "set")
    assert ratio is not None and ratio.estimate[0] == pytest.approx(np.exp(0.1))
