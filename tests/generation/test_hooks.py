"""The hooks of steering: what they change, what they leave alone, in every family, padding and way of calling."""

import itertools
from dataclasses import replace

import pytest
import torch
from models import FAMILIES, tiny_subject, tokens
from torch import Tensor

from companion.base.errors import InputError
from companion.generation import hooks
from companion.generation.hooks import Edit, Prompt, Read, Steering, applied
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
    """Edits of both parts, gated by a mid-layer read one token before the last."""
    parts = {1: "resid_post", 2: "mlp_out"}
    edits = tuple(Edit(layer, part, pushing(seed=layer), where) for layer, part in parts.items())
    return Steering("everywhere", edits, 0.5, half_open, (Read("g", 0, back=1, plain=plain),))


def model_inputs(ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """The library does not count padded positions from the first real token by itself."""
    places = None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places}


@torch.no_grad()
def last_logits(subject: Subject, steering: Steering, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits behind each row's last real token."""
    with applied(subject, steering):
        logits = subject.model(**model_inputs(ids, mask), use_cache=False).logits
    real = torch.ones_like(ids) if mask is None else mask
    return logits[torch.arange(len(ids)), (torch.arange(ids.shape[1]) * real).argmax(-1)]


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
    plainly = torch.cat([last_logits(subject, Steering("none"), row[None]) for row in rows])
    for where, plain in itertools.product(("prompt", "last"), (False, True)):
        steering = everywhere(where, plain=plain)
        alone = torch.cat([last_logits(subject, steering, row[None]) for row in rows])
        for side in ("left", "right"):
            together = last_logits(subject, steering, *padded(rows, side))
            torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
        assert (alone - plainly).abs().max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_no_strength_and_a_shut_gate_change_no_bit(family: str) -> None:
    subject, ids = tiny_subject(family), tokens()
    plain = last_logits(subject, Steering("none"), ids)
    shut = replace(everywhere(), gate=lambda prompt: torch.zeros(len(prompt.ids)), reads=())
    for without in (replace(everywhere(), strength=0.0), shut):
        assert torch.equal(last_logits(subject, without, ids), plain)


def test_the_library_generates_under_steering() -> None:
    subject, rows = tiny_subject("llama"), [tokens(1, n, seed=n)[0] for n in (9, 6)]
    ids, mask = padded(rows, "left")
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with applied(subject, everywhere("prompt")):
        together = subject.model.generate(ids, attention_mask=mask.long(), **settings)[:, ids.shape[1] :]
        alone = [subject.model.generate(row[None], **settings)[:, len(row) :] for row in rows]
    assert torch.equal(together, torch.cat(alone))


def test_the_record_is_what_was_added() -> None:
    subject, ids = tiny_subject("llama"), tokens(3, 9)
    edit = Edit(1, "resid_post", lambda x, prompt: 2 * torch.eye(32)[3].expand(len(x), 1, -1), "prompt")
    rows, mask = padded([ids[0], ids[1, :4]], "left")
    with applied(subject, Steering("two", (edit, replace(edit, layer=2)), 1.5)) as record, torch.no_grad():
        subject.model(**model_inputs(rows, mask))
    for layer in (1, 2):
        torch.testing.assert_close(record.added[0][layer], 9.0 * mask.double())


FINE = everywhere()
WRONG = {
    "steers layer 9": (Steering("s", (Edit(9, "mlp_out", pushing()),)), "ids"),
    "steered already": (replace(FINE, reads=(Read("g", 1),)), "ids"),
    "'neuron' at 'prompt'": (Steering("s", (Edit(1, "neuron", pushing()),)), "ids"),
    "middle of an answer": (FINE, "cache"), "needs input_ids": (FINE, "embeddings"),
    "has no real token": (FINE, "mask"),
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
            subject.model(ids, attention_mask=torch.zeros_like(ids))
        else:
            subject.model(ids)
