"""Runs that set in above the plain model's give what full forward passes give, and touch nothing that is not steered."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny_subject, tokens
from torch import Tensor

from companion.generation import forward, hooks
from companion.model import activations
from companion.model.architecture import Subject


def following_last(x: Tensor, prompt: hooks.Prompt) -> Tensor:
    """What is added everywhere hangs on the last token."""
    return 0.5 * x[torch.arange(len(x)), prompt.last].tanh()[:, None]


def half_shut(prompt: hooks.Prompt) -> Tensor:
    """Shut for the first prompt, and open for the others as far as what was read says."""
    return torch.sigmoid(prompt.read["g"].sum(-1)) * (torch.arange(len(prompt.ids)) > 0)


READ = (hooks.Read("g", 1, back=1, plain=True),)
STEERINGS = {
    "late, all tokens": hooks.Steering("a", (hooks.Edit(2, "resid_post", following_last), hooks.Edit(3, "mlp_out", following_last))),
    "last token": hooks.Steering("b", (hooks.Edit(2, "mlp_out", lambda x, _: x.tanh(), "last"),), gate=half_shut, reads=READ),
    "neurons": hooks.Steering("c", (hooks.Edit(3, "neurons", lambda x, _: 1 - x, "last"),), gate=half_shut, reads=READ),
    "every token": hooks.Steering("d", (hooks.Edit(1, "resid_post", lambda x, _: -0.5 * x, "every"),)),
}  # fmt: skip


def said(subject: Subject, answer: Tensor, rows: Tensor, logits: Tensor, cache: object) -> Tensor:
    """Logits before each of three given answer tokens."""
    rest = subject.model(answer[rows, :-1], past_key_values=cache, use_cache=True).logits
    return torch.cat([logits[:, None], rest], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STEERINGS)
@torch.no_grad()
def test_a_resumed_run_is_the_full_one(family: str, name: str) -> None:
    subject, ids, answer = tiny_subject(family), tokens(4, 9), tokens(4, 3, seed=7)
    use, steering = partial(said, subject, answer), STEERINGS[name]
    full = forward.read_prompts(subject, ids, partial(hooks.applied, subject, steering), use)
    fast = forward.read_prompts(subject, ids, forward.Switch(subject, steering), use)
    torch.testing.assert_close(fast, full, atol=2e-4, rtol=1e-4)
    plain = use(torch.arange(4), *_plain(subject, ids))
    assert (full[1:] - plain[1:]).abs().amax((1, 2)).min() > 1e-3
    if steering.gate is not None:
        torch.testing.assert_close(fast[0], plain[0], atol=2e-4, rtol=1e-4)


def _plain(subject: Subject, ids: Tensor) -> tuple[Tensor, object]:
    out = subject.model(ids, use_cache=True)
    return out.logits[:, -1], out.past_key_values


@torch.no_grad()
def test_no_strength_changes_no_bit_of_a_resumed_run() -> None:
    subject, ids, answer = tiny_subject("llama"), tokens(4, 9), tokens(4, 3, seed=7)
    use = partial(said, subject, answer)
    plain = forward.read_prompts(subject, ids, nullcontext, use)
    for steering in STEERINGS.values():
        switch = forward.Switch(subject, replace(steering, strength=0.0))
        assert torch.equal(forward.read_prompts(subject, ids, switch, use), plain)


@torch.no_grad()
def test_after_an_exception_in_a_resumed_run_the_model_is_as_it_was() -> None:
    subject, ids = tiny_subject("llama"), tokens(4, 9)
    before = subject.model(ids).logits

    def broken(x: Tensor, prompt: hooks.Prompt) -> Tensor:
        raise RuntimeError("in the middle of a block")

    for first in (following_last, broken):  # in the block that is replaced by its known output, and above it
        edits = (hooks.Edit(1, "resid_post", first), hooks.Edit(2, "mlp_out", broken))
        with pytest.raises(RuntimeError, match="middle"):
            switch = forward.Switch(subject, hooks.Steering("broken", edits))
            forward.read_prompts(subject, ids, switch, lambda rows, logits, cache: logits)
    modules = list(subject.model.modules())
    assert not [m for m in modules if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
    assert torch.equal(subject.model(ids).logits, before)


def test_the_plain_pass_is_made_once_and_forgotten_when_too_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, made = tiny_subject("llama"), []
    real = activations.clean_run
    monkeypatch.setattr(forward, "clean_run", lambda *a, **k: made.append(1) or real(*a, **k))
    first, second = tokens(2, 8, seed=1), tokens(2, 8, seed=2)
    assert forward.plain_run(subject, first) is forward.plain_run(subject, first) and len(made) == 1
    one = 2 * 8 * subject.n_layers * 3 * subject.d_model * 4
    monkeypatch.setattr(forward, "KEPT_BYTES", one)
    forward.plain_run(subject, second)
    forward.plain_run(subject, first)
    assert len(made) == 3
    monkeypatch.setattr(forward, "BATCH_BYTES", one - 1)
    assert forward.plain_run(subject, first) is None


def test_an_answer_that_is_known_is_copied_only_behind_a_shut_gate() -> None:
    subject, ids = tiny_subject("llama"), tokens(4, 9)
    steering = STEERINGS["last token"]
    asked: list[list[int]] = []

    def use(rows: Tensor, logits: Tensor, cache: object) -> Tensor:
        asked.append(rows.tolist())
        return logits[:, :1]

    known = torch.full((4, 1), 77.0)
    with torch.no_grad():
        found = forward.read_prompts(subject, ids, forward.Switch(subject, steering), use, plain=known)
    assert asked == [[1, 2, 3]]
    assert np.array_equal((found == 77).flatten(), [True, False, False, False])
