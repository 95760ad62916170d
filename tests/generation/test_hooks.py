"""The hooks of steering: what they change, what they leave alone, in every family, padding and way of calling."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny_subject, tokens
from torch import Tensor

from companion.base.errors import InputError
from companion.generation import hooks
from companion.generation.hooks import Edit, Prompt, Read, Steering, applied
from companion.model.activations import model_inputs
from companion.model.architecture import Subject


def pushing(size: float = 1.0, seed: int = 0) -> hooks.Delta:
    """A delta that looks at the site and at the prompt's last token, so that a wrong place would show."""

    def delta(x: Tensor, prompt: Prompt) -> Tensor:
        last = x[torch.arange(len(x)), prompt.last] if x.shape[1] > 1 else x[:, 0]
        fixed = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed)).to(x)
        return size * fixed * (1 + last.mean(-1, keepdim=True).tanh())[:, None]

    return delta


def half_open(prompt: Prompt) -> Tensor:
    """A gate that follows what was read."""
    return torch.sigmoid(prompt.read["g"].sum(-1))


def everywhere(where: hooks.Where = "prompt", *, plain: bool = False) -> Steering:
    """Edits of all three parts, gated by a mid-layer read one token before the last."""
    edits = (
        Edit(1, "resid_post", pushing(seed=1), where),
        Edit(2, "mlp_out", pushing(seed=2), where),
        Edit(3, "neurons", pushing(seed=3), where),
    )
    return Steering("everywhere", edits, 0.5, half_open, (Read("g", 0, back=1, plain=plain),))


@torch.no_grad()
def last_logits(subject: Subject, steering: Steering, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits behind each row's last real token."""
    with applied(subject, steering):
        logits = subject.model(**model_inputs(ids, mask), use_cache=False).logits
    place = (
        torch.full((len(ids),), ids.shape[1] - 1) if mask is None else (torch.arange(ids.shape[1]) * mask).argmax(-1)
    )
    return logits[torch.arange(len(ids)), place]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of unequal length in one batch, and which of its tokens are real."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, span], mask[i, span] = row, True
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_side_and_batch_size_change_nothing(family: str) -> None:
    subject = tiny_subject(family)
    rows = [tokens(1, n, seed=n)[0] for n in (9, 6, 7)]
    for where in ("prompt", "last"):
        for plain in (False, True):
            steering = everywhere(where, plain=plain)
            alone = torch.cat([last_logits(subject, steering, row[None]) for row in rows])
            for side in ("left", "right"):
                torch.testing.assert_close(
                    last_logits(subject, steering, *padded(rows, side)), alone, atol=2e-4, rtol=1e-4
                )
            plainly = torch.cat([last_logits(subject, Steering("none"), row[None]) for row in rows])
            assert (alone - plainly).abs().max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_no_strength_and_a_shut_gate_change_no_bit(family: str) -> None:
    subject, ids = tiny_subject(family), tokens()
    plain = last_logits(subject, Steering("none"), ids)
    assert torch.equal(last_logits(subject, replace(everywhere("every"), strength=0.0), ids), plain)
    shut = replace(everywhere("every"), gate=lambda prompt: torch.zeros(len(prompt.ids)), reads=())
    assert torch.equal(last_logits(subject, shut, ids), plain)


@torch.no_grad()
def greedy(subject: Subject, ids: Tensor, steering: Steering, steps: int, *, cached: bool) -> Tensor:
    """Logits of `steps` steps in which token 5 is always said."""
    found, said = [], torch.full((len(ids), 1), 5)
    with applied(subject, steering):
        out = subject.model(ids, use_cache=cached)
        found.append(out.logits[:, -1])
        for step in range(1, steps):
            if cached:
                out = subject.model(said, past_key_values=out.past_key_values, use_cache=True)
                found.append(out.logits[:, -1])
            else:
                found.append(subject.model(torch.cat([ids, said.repeat(1, step)], 1), use_cache=False).logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_and_without_a_cache_agree(family: str) -> None:
    constant = Edit(1, "mlp_out", lambda x, prompt: 0.3 * x.tanh(), "every")
    own_state = Edit(3, "neurons", lambda x, prompt: -0.5 * x, "every")
    subject, steering = tiny_subject(family), Steering("every token", (constant, own_state))
    with_cache, without = (greedy(subject, tokens(), steering, 4, cached=cached) for cached in (True, False))
    torch.testing.assert_close(with_cache, without, atol=2e-4, rtol=1e-4)
    prompt_only = replace(steering, edits=tuple(replace(edit, where="prompt") for edit in steering.edits))
    changed = greedy(subject, tokens(), prompt_only, 4, cached=True)
    torch.testing.assert_close(changed[0], with_cache[0])
    assert (changed[1:] - with_cache[1:]).abs().max() > 0.01


def test_the_library_generates_under_steering() -> None:
    subject, steering = tiny_subject("llama"), everywhere("prompt")
    rows = [tokens(1, n, seed=n)[0] for n in (9, 6)]
    ids, mask = padded(rows, "left")
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with applied(subject, steering):
        together = subject.model.generate(ids, attention_mask=mask.long(), **settings)[:, ids.shape[1] :]
        alone = [subject.model.generate(row[None], **settings)[:, len(row) :] for row in rows]
    assert torch.equal(together, torch.cat(alone))


def test_hooks_are_gone_after_an_exception() -> None:
    subject, ids = tiny_subject("llama"), tokens()
    before = last_logits(subject, Steering("none"), ids)

    def broken(x: Tensor, prompt: Prompt) -> Tensor:
        raise RuntimeError("in the middle of a forward pass")

    steering = Steering("broken", (Edit(0, "resid_post", pushing()), Edit(1, "mlp_out", broken)))
    with pytest.raises(RuntimeError, match="middle"), applied(subject, steering):
        subject.model(ids)
    assert not [m for m in subject.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert torch.equal(last_logits(subject, Steering("none"), ids), before)


def test_the_record_is_what_was_added() -> None:
    subject, ids = tiny_subject("llama"), tokens(3, 9)
    one = torch.zeros(32)
    one[3] = 2.0
    edit = Edit(1, "resid_post", lambda x, prompt: one.expand(len(x), 1, -1), "prompt")
    rows, mask = padded([ids[0], ids[1, :4]], "left")
    with applied(subject, Steering("two", (edit, replace(edit, layer=2)), 1.5)) as record, torch.no_grad():
        subject.model(**model_inputs(rows, mask))
    np.testing.assert_allclose(record.squares[0].sqrt(), 1.5 * 2.0 * np.sqrt([2 * 9, 2 * 4]))
    neuron = Edit(1, "neurons", lambda x, prompt: torch.eye(48)[7].expand(len(x), 1, -1), "last")
    with applied(subject, Steering("neuron", (neuron,))) as record, torch.no_grad():
        subject.model(ids)
    down = subject.layers[1].down_proj
    assert down is not None
    np.testing.assert_allclose(record.squares[0].sqrt(), down.weight[:, 7].norm().detach(), rtol=1e-6)


WRONG = {
    "steers layer 9": (Steering("s", (Edit(9, "mlp_out", pushing()),)), "ids"),
    "steered already": (replace(everywhere("every"), reads=(Read("g", 1),)), "ids"),
    "'neuron' at 'prompt'": (Steering("s", (Edit(1, "neuron", pushing()),)), "ids"),
    "middle of an answer": (everywhere("every"), "cache"),
    "needs input_ids": (everywhere("every"), "embeddings"),
    "has no real token": (everywhere("every"), "mask"),
    "steer without beams": (everywhere("every"), "beams"),
}


@pytest.mark.parametrize("message", WRONG)
@torch.no_grad()
def test_wrong_calls_are_refused(message: str) -> None:
    subject, ids, (steering, call) = tiny_subject("llama"), tokens(), WRONG[message]
    cache = subject.model(ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match=message), applied(subject, steering):
        if call == "cache":
            subject.model(ids[:, :1], past_key_values=cache)
        elif call == "embeddings":
            subject.model(inputs_embeds=torch.zeros(1, 3, 32))
        elif call == "mask":
            subject.model(ids, attention_mask=torch.zeros_like(ids))
        else:
            cache = subject.model(ids, use_cache=True).past_key_values
            cache.batch_repeat_interleave(2)
            subject.model(ids[:, :1].repeat_interleave(2, 0), past_key_values=cache)
