"""The hooks of steering: what they change, what they leave alone, in every family and way of calling."""

from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch
from models import FAMILIES, tiny_subject, tokens
from steering_lab import following_last, half_open, shut, varied_steerings
from torch import Tensor

from companion.base.errors import InputError
from companion.generation import hooks
from companion.generation.hooks import PLAIN, Edit, Steering, applied
from companion.model.activations import on_call, on_output
from companion.model.architecture import Subject


def everywhere(where: hooks.Where = "prompt") -> Steering:
    """Edits of both parts that look at the last token, so that a wrong place would show, behind a gate that looks at a read."""
    return replace(varied_steerings("resid_post", where)[0], gate=partial(half_open, -1))


@torch.no_grad()
def last_logits(subject: Subject, steering: Steering, ids: Tensor) -> Tensor:
    """Logits behind each row's last token."""
    with applied(subject, steering):
        return subject.model(ids, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_steered_together_as_alone_and_no_strength_or_a_shut_gate_changes_no_bit(family: str) -> None:
    subject, ids = tiny_subject(family), tokens(3, 9)
    plainly = last_logits(subject, PLAIN, ids)
    for where in get_args(hooks.Where):
        steering = everywhere(where)
        alone = torch.cat([last_logits(subject, steering, row[None]) for row in ids])
        torch.testing.assert_close(last_logits(subject, steering, ids), alone, atol=2e-4, rtol=1e-4)
        assert (alone - plainly).abs().max() > 0.05
    for without in (replace(everywhere(), strength=0.0), replace(everywhere(), gate=shut)):
        assert torch.equal(last_logits(subject, without, ids), plainly)


@torch.no_grad()
def test_the_library_generates_under_steering() -> None:
    """The prompt is steered and what is generated is not: so says one pass with the edit on the prompt's tokens by hand."""
    subject, ids = tiny_subject("llama"), tokens(2, 9)
    push = torch.randn(32, generator=torch.Generator().manual_seed(0))
    pushed = Steering("pushed", (Edit(1, "resid_post", lambda x, _: push.expand(len(x), 1, -1)),))
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with applied(subject, pushed):
        made = subject.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    is_prompt = torch.arange(made.shape[1])[:, None] < ids.shape[1]
    with on_output(subject.layers[1].block, lambda x: x + is_prompt * push):
        logits = subject.model(made).logits
    assert torch.equal(logits[:, ids.shape[1] - 1 : -1].argmax(-1), made[:, ids.shape[1] :])


@torch.no_grad()
def test_the_plain_pass_hands_layers_what_the_steered_one_does() -> None:
    subject, seen = tiny_subject("llama"), []
    with on_call(subject.layers[0].block, seen.append), applied(subject, everywhere()):
        subject.model(tokens(), output_hidden_states=True)
    plain, steered = map(sorted, seen)
    assert plain == steered


def test_the_record_is_what_was_added() -> None:
    subject, ids = tiny_subject("llama"), tokens(3, 9)
    edit = Edit(1, "resid_post", lambda x, prompt: 2 * torch.eye(32)[3].expand(len(x), 1, -1), "prompt")
    both = (edit, replace(edit, layer=2, where="last"))
    with applied(subject, Steering("two", both, 1.5)) as record, torch.no_grad():
        subject.model(ids)
    is_last = torch.arange(9) == 8
    for layer, where in ((1, torch.ones(9)), (2, is_last)):
        torch.testing.assert_close(record.added[layer], 9.0 * where.double().expand(3, 9))


WRONG = {
    "steers layer 9": (Steering("s", (Edit(9, "mlp_out", following_last),)), "ids"),
    "'neuron' at 'prompt'": (Steering("s", (Edit(1, "neuron", following_last),)), "ids"),
    "middle of an answer": (everywhere(), "cache"), "needs input_ids": (everywhere(), "embeddings"),
    "without padding": (everywhere(), "mask"),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
@torch.no_grad()
def test_wrong_calls_are_refused(message: str) -> None:
    subject, ids, (steering, call) = tiny_subject("llama"), tokens(), WRONG[message]
    calls = {
        "ids": {"input_ids": ids}, "embeddings": {"inputs_embeds": torch.zeros(1, 3, 32)},
        "cache": {"input_ids": ids[:, :1], "past_key_values": subject.model(ids, use_cache=True).past_key_values},
        "mask": {"input_ids": ids, "attention_mask": torch.arange(ids.shape[1]).clamp(max=1).expand_as(ids)},
    }  # fmt: skip
    with pytest.raises(InputError, match=message), applied(subject, steering):
        subject.model(**calls[call])
