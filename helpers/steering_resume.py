"""Steered runs that set in where the steering does: what lies below is the plain model's, and is computed once.

The same prompts are read under many steerings. A plain pass over a batch of them is kept (`plain_run`), and a steered
run (`climb`) calls the library's own blocks from the lowest steered layer on, with the steering's hooks. What a gate or an
adaptive method reads from an unsteered pass is looked up, prompts whose gate stays shut are left to the plain run, and
edits of the last token alone are computed at the last token alone. All of it is exact. Batches whose plain run is too large
to keep, and models that cannot be replayed, are read from the bottom every time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from helpers.grid_edit import only_tokens
from helpers.grid_run import CleanRun, clean_run, first
from helpers.grid_sweep import Prefix
from helpers.steering import Prompt, Record, Steering, applied
from helpers.subject_parts import Subject

KEPT_BYTES: Final = 2**29  # of the plain runs of one model that are kept
BATCH_BYTES: Final = KEPT_BYTES // 8  # of one plain run: a larger one would push out too many others

_kept: WeakKeyDictionary[PreTrainedModel, OrderedDict[bytes, CleanRun]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Switch:
    """Switches a steering on for the calls of a model within a `with` block: `applied`, ready to be called."""

    subject: Subject
    steering: Steering

    def __call__(self) -> AbstractContextManager[Record]:
        """`applied` of this subject and steering."""
        return applied(self.subject, self.steering)


@dataclass(frozen=True)
class Part:
    """The prompts of a batch to which a steering adds something: their rows, their plain run, and what it read there."""

    rows: Int[Tensor, "row"]
    run: CleanRun
    prompt: Prompt


def plain_run(subject: Subject, ids: Int[Tensor, "prompt pos"]) -> CleanRun | None:
    """The plain model's run over these prompts, from memory if they were read lately; None where none can be kept."""
    if not subject.replayable or _size(subject, ids) > BATCH_BYTES:
        return None
    runs = _kept.setdefault(subject.model, OrderedDict())
    key = bytes(str(tuple(ids.shape)), "ascii") + ids.cpu().numpy().tobytes()
    if key not in runs:
        runs[key] = clean_run(subject, ids, keep=("resid", "cache"))
        while sum(_size(subject, run.tokens) for run in runs.values()) > KEPT_BYTES:
            runs.popitem(last=False)
    runs.move_to_end(key)
    return runs[key]


def begun(subject: Subject, steer: object, ids: Int[Tensor, "prompt pos"]) -> tuple[Steering, CleanRun] | None:
    """What a steered run over these prompts can set in from; None where it must be made from the bottom.

    That is so under any switch but a `Switch` and `nullcontext`: what another one does to the model is not known here.
    """
    steering = steer.steering if isinstance(steer, Switch) else Steering("none") if steer is nullcontext else None
    run = None if steering is None else plain_run(subject, ids)
    return None if steering is None or run is None else (steering, run)


def _size(subject: Subject, ids: Tensor) -> int:
    """Bytes of a kept run: a residual vector, a key and a value for each token and layer (grouped keys are smaller)."""
    return ids.numel() * subject.n_layers * 3 * subject.d_model * subject.dtype.itemsize


def opened(steering: Steering, run: CleanRun, changed: Mapping[str, Tensor] | None = None) -> Prompt:
    """The batch as the steering sees it: what its reads name (some of it `changed` by an intervention), and its gate."""
    n_prompts, n_pos = run.tokens.shape
    real = torch.ones_like(run.tokens, dtype=torch.bool)
    prompt = Prompt(run.tokens, real, torch.full((n_prompts,), n_pos - 1, device=run.tokens.device))
    for read in steering.reads:  # below the lowest edit the steered run's own residual stream is the plain one
        prompt.read[read.name] = run.resid_post[read.layer][:, max(n_pos - 1 - read.back, 0)]
    prompt.read.update(changed or {})
    is_open = torch.ones(n_prompts, device=run.tokens.device)
    prompt.opened.append(is_open if steering.gate is None else steering.gate(prompt))
    return prompt


def steered_part(steering: Steering, run: CleanRun) -> Part | None:
    """The rows of a batch that the steering touches, or None: no edit, no strength, or a gate shut for all of them."""
    if not steering.edits or not steering.strength:
        return None
    prompt = opened(steering, run)
    rows = prompt.opened[0].nonzero().flatten()
    if len(rows) == len(run.tokens):
        return Part(rows, run, prompt)
    if not len(rows):
        return None
    read = {name: x[rows] for name, x in prompt.read.items()}
    chosen = Prompt(prompt.ids[rows], prompt.real[rows], prompt.last[rows], read, [prompt.opened[0][rows]])
    return Part(rows, rows_of(run, rows), chosen)


def rows_of(run: CleanRun, rows: Int[Tensor, "row"]) -> CleanRun:
    """The run of some of its prompts."""
    if len(rows) == len(run.tokens):
        return run
    names = ("resid_pre", "resid_post", "keys", "values")
    kept: dict[str, Any] = {name: tuple(x[rows] for x in getattr(run, name)) for name in names}
    calls = tuple({name: _cut(value, rows, len(run.tokens)) for name, value in call.items()} for call in run.calls)
    return replace(run, tokens=run.tokens[rows], calls=calls, **kept)


def _cut(value: Any, rows: Tensor, n_rows: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_cut(part, rows, n_rows) for part in value)
    is_batch = isinstance(value, Tensor) and value.ndim > 1 and len(value) == n_rows > 1
    return value[rows] if is_batch else value


def cache_of(run: CleanRun, below: int | None = None) -> DynamicCache:
    """A cache that holds the run's keys and values (of the layers below one), for going on from it."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(run.keys[:below], run.values[:below], strict=True)):
        cache.update(keys, values, layer)
    return cache


def untouched(run: CleanRun, part: Part | None) -> Int[Tensor, "row"]:
    """The rows of a batch that a steering leaves to the plain model."""
    left = torch.ones(len(run.tokens), dtype=torch.bool, device=run.tokens.device)
    if part is not None:
        left[part.rows] = False
    return left.nonzero().flatten()


@contextmanager
def within(subject: Subject, steering: Steering, part: Part) -> Iterator[Record]:
    """The steering's hooks, for `climb` and for the answer that is generated from its cache."""
    with applied(subject, steering, _seen(steering, part)) as record:
        yield record


@torch.no_grad()
def climb(
    subject: Subject, steering: Steering, part: Part, *, cached: bool = False, top: int | None = None
) -> tuple[Float[Tensor, "row d"], DynamicCache | None]:
    """The final residual stream at the last token, with the filled cache if it is wanted.

    It stands in a block of `within`, or nothing is added. `top` stops above that layer: all
    that was added up to there is then recorded in full.
    """
    run, n_layers = part.run, subject.n_layers if top is None else top + 1
    start = min(edit.layer for edit in steering.edits)
    is_known = all(edit.part == "resid_post" for edit in steering.edits if edit.layer == start)
    cache = cache_of(run, start + is_known) if cached else None
    column = slice(-1, None) if at_last_token(steering) else slice(None)
    hidden = run.resid_pre[start][:, column]
    for layer in range(start, n_layers):
        block = subject.layers[layer].block
        if layer == start and is_known:  # only its output is edited, and that is known
            with _returning(block, run.resid_post[start][:, column]):
                hidden = first(block(hidden))
            continue
        held = cache if cached or column == slice(None) else DynamicCache()
        if held is not None and column != slice(None):
            held.update(run.keys[layer][:, :, :-1], run.values[layer][:, :, :-1], layer)
        with _top_mlp(subject, steering, layer, hidden, whole=top is not None):
            hidden = first(block(hidden, **_call(run, layer, column), past_key_values=held))
    return hidden[:, -1], cache


def replayed(
    subject: Subject, run: CleanRun, layer: int, hidden: Float[Tensor, "prompt pos d"]
) -> Float[Tensor, "prompt pos d"]:
    """A layer of the run on other inputs: at all positions, or at the last one behind the run's own tokens."""
    is_last = hidden.shape[1] < run.tokens.shape[1]
    before = Prefix(run.keys[layer][:, :, :-1], run.values[layer][:, :, :-1]) if is_last else None
    call = _call(run, layer, slice(-1, None) if is_last else slice(None))
    made: Tensor = first(subject.layers[layer].block(hidden, **call, past_key_values=before))
    return made


def at_last_token(steering: Steering) -> bool:
    """Whether the prompt's last token alone is edited, so that no other position differs from the plain run."""
    return all(edit.where == "last" for edit in steering.edits)


def _seen(steering: Steering, part: Part) -> Prompt:
    """The prompt as the hooks see it in `climb`: all of it, or its last token where nothing else is computed."""
    return last_column(part.prompt) if at_last_token(steering) else part.prompt


def last_column(prompt: Prompt) -> Prompt:
    """The prompt as hooks see it where its last token alone is computed."""
    last = torch.zeros_like(prompt.last)
    return Prompt(prompt.ids[:, -1:], prompt.real[:, -1:], last, prompt.read, prompt.opened)


def _call(run: CleanRun, layer: int, column: slice) -> dict[str, Any]:
    """The library's own arguments to a layer, for all positions or for the last."""
    call = dict(run.calls[layer])
    if column == slice(None):
        return call
    if call.get("attention_mask") is not None:
        call["attention_mask"] = call["attention_mask"][:, :, -1:]
    if call.get("position_embeddings") is not None:
        call["position_embeddings"] = tuple(part[:, -1:] for part in call["position_embeddings"])
    if call.get("position_ids") is not None:
        call["position_ids"] = call["position_ids"][:, -1:]
    return call


def _top_mlp(
    subject: Subject, steering: Steering, layer: int, hidden: Tensor, *, whole: bool
) -> AbstractContextManager[None]:
    """Above the last layer nobody looks at other tokens than the last, so its MLP computes that one alone."""
    inside = any(edit.layer == layer and edit.part == "neurons" for edit in steering.edits)
    if whole or inside or layer != subject.n_layers - 1 or hidden.shape[1] == 1:
        return nullcontext()
    last = torch.arange(hidden.shape[1], device=hidden.device) == hidden.shape[1] - 1
    return only_tokens(subject.layers[layer].mlp, last)


@contextmanager
def _returning(module: nn.Module, value: Tensor) -> Iterator[None]:
    """For a while the module returns this, and its hooks see it."""
    module.forward = lambda *_, **__: value
    try:
        yield
    finally:
        del module.forward
