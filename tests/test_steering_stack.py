"""Steerings that share a batch do what each does alone; what is known without a forward pass is what one measures."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from families import tiny_subject, tokens
from steering_lab import fitted
from torch import Tensor

from companion.generation import hooks
from companion.generation.hooks import Prompt
from companion.steering import budget, methods


def following_last(size: float, x: Tensor, prompt: Prompt) -> Tensor:
    """What is added everywhere hangs on the last token and on what was read."""
    return size * x[torch.arange(len(x)), prompt.last].tanh()[:, None] * prompt.read["g"].mean(-1)[:, None, None].exp()


def own_state(size: float, x: Tensor, prompt: Prompt) -> Tensor:
    """The same for every token by itself, generated ones too."""
    return size * x.tanh() * prompt.read["g"].mean(-1)[:, None, None].exp()


def gate(shut: int, prompt: Prompt) -> Tensor:
    """Shut for one prompt (or none), open for the others as far as what was read says."""
    return torch.sigmoid(prompt.read["g"].sum(-1)) * (torch.arange(len(prompt.ids)) != shut)


def steerings(part: hooks.Part, where: hooks.Where) -> list[hooks.Steering]:
    """Four that differ in what they add, in strength, in what their gates read, and in whom they open for."""

    def one(size: float, strength: float, layer: int, opening: hooks.Opening | None) -> hooks.Steering:
        delta = partial(own_state if where == "every" else following_last, size)
        edits = (hooks.Edit(2, part, delta, where), hooks.Edit(3, "mlp_out", delta, where))
        return hooks.Steering(f"{size}", edits, strength, opening, (hooks.Read("g", layer, plain=True),))

    shut = lambda prompt: torch.zeros(len(prompt.ids))  # noqa: E731
    return [one(0.5, 1.0, 1, None), one(-0.7, 2.0, 0, partial(gate, 0)), one(1.0, 0.5, 1, partial(gate, 2)),
            one(1.0, 1.0, 0, shut), one(1.0, 0.0, 0, None)]  # fmt: skip


@pytest.mark.parametrize("part", ["resid_post", "mlp_out", "neurons"])
@torch.no_grad()
def test_norms_of_a_batch_are_those_of_each_steering_alone(part: hooks.Part) -> None:
    subject, ids = tiny_subject("llama"), tokens(4, 9)
    many = steerings(part, "prompt")
    found = budget.added_squares(subject, many, ids)
    for squares, one in zip(found, many, strict=True):
        with hooks.applied(subject, one) as record:
            subject.model.base_model(ids, use_cache=False)
        expected = record.squares[0] if record.squares else torch.zeros(4, dtype=torch.float64)
        torch.testing.assert_close(squares, expected, rtol=1e-5, atol=1e-9)
    assert (found[0] > 0.01).all() and found[1, 0] == 0 and not found[3:].any()


@pytest.mark.parametrize("where", ["prompt", "last"])
def test_a_blind_edit_needs_no_forward_pass_to_know_its_norm(where: hooks.Where) -> None:
    fit = fitted()
    texts = fit.prompts.text.tolist()
    edits = tuple(replace(edit, where=where) for edit in methods.fixed(fit).edits)
    blind = [hooks.Steering("fixed", edits, strength) for strength in (0.5, 2.0)] + [methods.cast(fit)]
    seeing = [replace(s, edits=tuple(replace(edit, blind=False) for edit in s.edits)) for s in blind]
    assert all(edit.blind for one in blind for edit in one.edits)
    for one, other in zip(blind, seeing, strict=True):
        (known,) = budget.added_norms(fit.subject, [one], texts)
        np.testing.assert_allclose(known, budget.added_norms(fit.subject, [other], texts)[0], rtol=1e-5)
        assert known.max() > 0
    assert (known == 0).any()  # the gate of the last one
