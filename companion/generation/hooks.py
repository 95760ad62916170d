"""Steering a model: what is added, where, and the hooks that add it in one forward pass or while it generates.

A `Steering` is data: edits of named sites, a strength, and a gate. `applied` turns it into hooks on the plain library model for
a `with` block. The call that finds an empty cache reads the prompt; no edit acts in later ones, which read generated tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from companion.base.errors import InputError
from companion.model.activations import named_arguments, on_output
from companion.model.architecture import Subject


@dataclass(frozen=True)
class Prompt:
    """Prompts of one length: what the steering's reads name of them, and in `opened` the gate's values once it was asked."""

    ids: Int[Tensor, "prompt pos"]
    read: dict[str, Tensor] = field(default_factory=dict)
    opened: list[Float[Tensor, "prompt"]] = field(default_factory=list)


def some(prompt: Prompt, rows: Int[Tensor, "row"] | slice) -> Prompt:
    """Some of the prompts, with what was read of them and their gates."""
    read = {name: x[rows] for name, x in prompt.read.items()}
    return Prompt(prompt.ids[rows], read, [x[rows] for x in prompt.opened])


def tail(prompt: Prompt, n: int) -> Prompt:
    """The last `n` positions, where nothing else is computed."""
    return replace(prompt, ids=prompt.ids[:, -n:])


Part = Literal["resid_post", "mlp_out"]
Where = Literal["prompt", "last"]
Delta = Callable[[Float[Tensor, "prompt pos width"], Prompt], Float[Tensor, "prompt #pos width"]]
Opening = Callable[[Prompt], Float[Tensor, "prompt"]]


@dataclass(frozen=True)
class Edit:
    """What is added to one site at strength 1, computed from the site's own activation.

    `part` is the residual stream after the block, or what the MLP writes into it (behind a post-norm where there is one);
    `where` all tokens of the prompt, or its last one. A `blind` delta looks at the prompt alone and is the same at all
    positions: what it adds is known without a forward pass.
    """

    layer: int
    part: Part
    delta: Delta
    where: Where = "prompt"
    blind: bool = False


@dataclass(frozen=True)
class Read:
    """The unsteered residual stream after a layer, `back` tokens before the last one, handed to gates and edits by name."""

    name: str
    layer: int
    back: int = 0

    def of(self, x: Float[Tensor, "prompt pos d"]) -> Float[Tensor, "prompt d"]:
        return x[:, max(x.shape[1] - 1 - self.back, 0)]


@dataclass(frozen=True)
class Steering:
    """One way to steer. The gate (None: always open) multiplies every edit; who renders the prompt puts `system` before it."""

    name: str
    edits: tuple[Edit, ...] = ()
    strength: float = 1.0
    gate: Opening | None = None
    reads: tuple[Read, ...] = ()
    system: str = ""

    def openness(self, prompt: Prompt) -> Float[Tensor, "prompt"]:
        """The gate's values; 1 where there is none."""
        return torch.ones(len(prompt.ids), device=prompt.ids.device) if self.gate is None else self.gate(prompt)


PLAIN: Final = Steering("unsteered")


@dataclass(frozen=True)
class Record:
    """What steering did to a batch of prompts, by layer: squared norms of what it `added`, and of what `stood` there before.

    The latter only where it was asked for; `gates` holds the gate's values of each batch.
    """

    added: dict[int, Float[Tensor, "prompt pos"]] = field(default_factory=dict)
    stood: dict[int, Float[Tensor, "prompt pos"]] = field(default_factory=dict)
    gates: list[Float[Tensor, "prompt"]] = field(default_factory=list)


@contextmanager
def applied(
    subject: Subject, steering: Steering, prompt: Prompt | None = None, *, count_stood: bool = False
) -> Iterator[Record]:
    """Steers every call of the model within the block, and records what is added (and what stood there, with `count_stood`).

    A strength of 0 sets no hooks, and none are left behind, also after an exception. The prompts of a call have one length, and
    one call reads them whole. With a `prompt` that was read already, blocks may be called one by one instead.

    Raises:
        InputError: a site that the model lacks, embeddings instead of ids, padding, or an answer that began without it.
    """
    check_sites(subject, steering)
    run = _SteeredCalls(steering, Record(), count_stood, prompt, "outside" if prompt is None else "prompt")
    with ExitStack() as hooks:
        if steering.edits and steering.strength:
            decoder = subject.model.base_model
            hooks.callback(decoder.register_forward_pre_hook(run.before_decoder, with_kwargs=True).remove)
            for read in steering.reads:
                hooks.enter_context(on_output(subject.layers[read.layer].block, partial(run.note, read)))
            for edit in steering.edits:
                parts = subject.layers[edit.layer]
                module = parts.block if edit.part == "resid_post" else parts.mlp_write
                hooks.enter_context(on_output(module, partial(run.add, edit)))
        yield run.record


def check_sites(subject: Subject, steering: Steering) -> None:
    """`InputError` where a steering names a site that the model does not have."""
    layers = [*(edit.layer for edit in steering.edits), *(read.layer for read in steering.reads)]
    if wrong := sorted({layer for layer in layers if not 0 <= layer < subject.n_layers}):
        raise InputError(f"{steering.name} steers layer {wrong[0]}; {subject.name} has 0 to {subject.n_layers - 1}")
    for edit in steering.edits:
        if edit.part not in get_args(Part) or edit.where not in get_args(Where):
            expected = f"one of {get_args(Part)} at one of {get_args(Where)}"
            raise InputError(f"{edit.part!r} at {edit.where!r}: expected {expected}")


@dataclass
class _SteeredCalls:
    """Where in the calls of a steered model its hooks are; their outputs are what the model goes on with."""

    steering: Steering
    record: Record
    count_stood: bool
    prompt: Prompt | None
    phase: Literal["plain", "prompt", "outside"]

    def before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Is it a prompt or generated tokens?"""
        if self.phase == "plain":
            return
        call = named_arguments(inspect.signature(decoder.forward), args, kwargs)
        cache = call.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()):
            if self.prompt is None:
                raise InputError("steering began in the middle of an answer: enter it before the prompt is read")
            self.phase = "outside"
            return
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        is_padded = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all()))
        if ids is None or is_padded:
            raise InputError("a steered call needs input_ids, of prompts of one length without padding")
        self.prompt = Prompt(ids)
        self.record.added.clear()
        self.record.stood.clear()
        if self.steering.reads:
            self.phase = "plain"
            decoder(**{**call, "past_key_values": None, "use_cache": False})
        self.phase = "prompt"

    def note(self, read: Read, x: Float[Tensor, "prompt pos d"]) -> None:
        if self.phase == "plain":
            assert self.prompt is not None  # the decoder's own hook came first
            self.prompt.read[read.name] = read.of(x).detach()

    def add(self, edit: Edit, x: Float[Tensor, "prompt pos width"]) -> Float[Tensor, "prompt pos width"] | None:
        """The site's activation with the edit, whose norm is recorded; None where it does not act."""
        if self.phase != "prompt":
            return None
        assert self.prompt is not None
        # `companion.generation.forward` leaves out positions on which nothing hangs.
        prompt = tail(self.prompt, x.shape[1])
        scale = self.steering.strength * self._opened(prompt).to(x)[:, None, None]
        added, steered = (scale * edit.delta(x, prompt).to(x)).expand_as(x), x
        if edit.where == "last":
            is_last = torch.arange(x.shape[1], device=x.device)[:, None] == x.shape[1] - 1
            added, steered = (torch.where(is_last, one, torch.zeros_like(x[:1, :1, :1])) for one in (added, x))
        self._count(self.record.added, edit.layer, added)
        if self.count_stood:
            self._count(self.record.stood, edit.layer, steered)
        return x + added

    def _count(self, found: dict[int, Tensor], layer: int, vectors: Float[Tensor, "prompt last_pos d"]) -> None:
        """Add the squared norms of vectors at the last positions to those of a layer."""
        assert self.prompt is not None
        squares = vectors.detach().double().square().sum(-1)
        squares = nn.functional.pad(squares, (self.prompt.ids.shape[1] - squares.shape[1], 0))
        found[layer] = found[layer] + squares if layer in found else squares

    def _opened(self, prompt: Prompt) -> Float[Tensor, "prompt"]:
        """The gate's values, asked once a prompt and kept while it is answered."""
        if not prompt.opened:
            prompt.opened.append(self.steering.openness(prompt))
            self.record.gates.append(prompt.opened[0])
        return prompt.opened[0]
