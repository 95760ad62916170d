"""The hooks of steering: what they change, what they leave alone, in every family and way of calling."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from models import FAMILIES, tiny_subject, tokens
from torch import Tensor

from companion.base.errors import InputError
from companion.generation import hooks
from companion.generation.hooks import PLAIN, Edit, Prompt, Read, Steering, applied
from companion.model.activations import on_call, on_output
from companion.model.architecture import Subject


def pushing(size: float = 1.0, seed: int = 0) -> hooks.Delta:
    """A delta that looks at the site's last token, so that a wrong place would show."""

    def delta(x: Tensor, prompt: Prompt) -> Tensor:
        fixed = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed)).to(x)
        return size * fixed * (1 + x[:, -1].mean(-1, keepdim=True).tanh())[:, None]

    return delta


def half_open(prompt: Prompt) -> Tensor:
    """A gate that follows what was read."""
    return torch.sigmoid(prompt.read["g"].sum(-1))


def everywhere(where: hooks.Where = "prompt") -> Steering:
    """Edits of both parts, gated by a plain read one token before the last."""
    parts = {1: "resid_post", 2: "mlp_out"}
    edits = tuple(Edit(layer, part, pushing(seed=layer), where) for layer, part in parts.items())
    return Steering("everywhere", edits, 0.5, half_open, (Read("g", 1, back=1),))


@torch.no_grad()
def last_logits(subject: Subject, steering: Steering, ids: Tensor) -> Tensor:
    """Logits behind each row's last token."""
    with applied(subject, steering):
        return subject.model(ids, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_steered_in_a_batch_as_they_are_alone(family: str) -> None:
    subject, ids = tiny_subject(family), tokens(3, 9)
    plainly = last_logits(subject, PLAIN, ids)
    for where in get_args(hooks.Where):
        steering = everywhere(where)
        alone = torch.cat([last_logits(subject, steering, row[None]) for row in ids])
        torch.testing.assert_close(last_logits(subject, steering, ids), alone, atol=2e-4, rtol=1e-4)
        assert (alone - plainly).abs().max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_no_strength_and_a_shut_gate_change_no_bit(family: str) -> None:
    subject, ids = tiny_subject(family), tokens()
    plain = last_logits(subject, PLAIN, ids)
    shut = replace(everywhere(), gate=lambda prompt: torch.zeros(len(prompt.ids)), reads=())
    for without in (replace(everywhere(), strength=0.0), shut):
        assert torch.equal(last_logits(subject, without, ids), plain)


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


FINE = everywhere()
WRONG = {
    "steers layer 9": (Steering("s", (Edit(9, "mlp_out", pushing()),)), "ids"),
    "'neuron' at 'prompt'": (Steering("s", (Edit(1, "neuron", pushing()),)), "ids"),
    "middle of an answer": (FINE, "cache"), "needs input_ids": (FINE, "embeddings"),
    "without padding": (FINE, "mask"),
}  # fmt: skip


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
            subject.model(ids, attention_mask=torch.arange(ids.shape[1]).clamp(max=1).expand_as(ids))
        else:
            subject.model(ids)
