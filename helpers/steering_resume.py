"""Steered runs that set in where the steering does: what lies below is the plain model's, and is computed once.

The same prompts are read under many steerings. A plain pass over a batch of them is kept (`plain_run`), and a steered
run (`climb`) calls the library's own blocks from the lowest steered layer on, with the steering's hooks. What a gate or an
adaptive method reads from an unsteered pass is looked up, prompts whose gate stays shut are left to the plain run, and
edits of the last token alone are computed at the last token alone; so is the last layer, of whose other tokens the keys
and values alone are wanted. All of it is exact. Batches whose plain run is too large
to keep, and models that cannot be replayed, are read from the bottom every time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from helpers.grid_run import CleanRun, clean_run, first
from helpers.grid_sweep import Prefix
from helpers.steering import Record, Steering, applied
from helpers.steering_prompt import Prompt, some
from helpers.subject_parts import Subject

KEPT_BYTES: Final = 2**29  # of the plain runs of one model that are kept
BATCH_BYTES: Final = KEPT_BYTES // 8  # of one plain run: a larger one would push out too many others
ALL, LAST = slice(None), slice(-1, None)  # positions

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
    """The prompts of a batch to which steering adds something: their rows in its plain run, and what was read there.

    A row may occur more than once (`helpers.steering_stack`).
    """

    rows: Int[Tensor, "row"]
    run: CleanRun
    prompt: Prompt

    @cached_property
    def _is_whole(self) -> bool:
        return torch.equal(self.rows, torch.arange(len(self.run.tokens), device=self.rows.device))

    def of(self, x: Tensor) -> Tensor:
        """These rows of one of the run's tensors."""
        return x if self._is_whole else x[self.rows]


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
    return Part(rows, run, some(prompt, rows)) if len(rows) else None


def untouched(run: CleanRun, rows: Int[Tensor, "row"]) -> Part:
    """Some prompts of a batch to which nothing is added."""
    return Part(rows, run, some(opened(Steering("none"), run), rows))


def _cut(value: Any, part: Part) -> Any:
    if isinstance(value, tuple):
        return tuple(_cut(one, part) for one in value)
    is_batch = isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(part.run.tokens) > 1
    return part.of(value) if is_batch else value


def cache_of(part: Part, below: int | None = None) -> DynamicCache:
    """A cache that holds the plain run's keys and values (of the layers below one), for going on from it."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(part.run.keys[:below], part.run.values[:below], strict=True)):
        cache.update(part.of(keys), part.of(values), layer)
    return cache


@torch.no_grad()
def climb(
    subject: Subject, steering: Steering, part: Part, *, cached: bool = False, top: int | None = None
) -> tuple[Float[Tensor, "row d"], DynamicCache | None]:
    """The final residual stream at the last token, with the filled cache if it is wanted.

    It stands in a block of `applied` to the part's prompt, or nothing is added. `top` stops above that layer: all
    that was added up to there is then recorded in full.
    """
    run, end = part.run, subject.n_layers if top is None else top + 1
    start = min(edit.layer for edit in steering.edits)
    is_known = all(edit.part == "resid_post" for edit in steering.edits if edit.layer == start)
    cache = cache_of(part, start + is_known) if cached else None
    column = LAST if at_last_token(steering) else ALL
    hidden = part.of(run.resid_pre[start][:, column])
    for layer in range(start, end):
        block = subject.layers[layer].block
        if layer == start and is_known:  # only its output is edited, and that is known
            with _returning(block, part.of(run.resid_post[start][:, column])):
                hidden = first(block(hidden))
            continue
        held: Any = cache
        if column == LAST or (layer == subject.n_layers - 1 and top is None):  # nobody looks at other tokens above it
            is_own = column == LAST or layer == start  # of a run whose earlier tokens are the plain ones up to here
            keys, values = _own(part, layer) if is_own else _heard(subject, part, layer, hidden)
            held, hidden, column = _behind(cache, layer, keys, values), hidden[:, LAST], LAST
        hidden = first(block(hidden, **_call(run, layer, column, part), past_key_values=held))
    return hidden[:, -1], cache


def _own(part: Part, layer: int) -> tuple[Tensor, Tensor]:
    return part.of(part.run.keys[layer]), part.of(part.run.values[layer])


def _behind(cache: DynamicCache | None, layer: int, keys: Tensor, values: Tensor) -> DynamicCache | Prefix:
    """What the last token alone is computed behind: the keys and values of all tokens before it."""
    if cache is None:
        return Prefix(keys[:, :, :-1], values[:, :, :-1])
    cache.update(keys[:, :, :-1], values[:, :, :-1], layer)
    return cache


class _Heard(Exception):
    """Keys and values that a layer has made; nothing else of it is wanted."""


class _Ear:
    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise _Heard(keys, values)


def _heard(subject: Subject, part: Part, layer: int, hidden: Float[Tensor, "row pos d"]) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer, which is left as soon as the library hands them to its cache."""
    try:
        subject.layers[layer].block(hidden, **_call(part.run, layer, ALL, part), past_key_values=_Ear())
    except _Heard as heard:
        return heard.args
    raise AssertionError("the layer asked for no cache")


def replayed(
    subject: Subject, run: CleanRun, layer: int, hidden: Float[Tensor, "prompt pos d"]
) -> Float[Tensor, "prompt pos d"]:
    """A layer of the run on other inputs: at all positions, or at the last one behind the run's own tokens."""
    is_last = hidden.shape[1] < run.tokens.shape[1]
    before = Prefix(run.keys[layer][:, :, :-1], run.values[layer][:, :, :-1]) if is_last else None
    call = _call(run, layer, LAST if is_last else ALL)
    made: Tensor = first(subject.layers[layer].block(hidden, **call, past_key_values=before))
    return made


def at_last_token(steering: Steering) -> bool:
    """Whether the prompt's last token alone is edited, so that no other position differs from the plain run."""
    return all(edit.where == "last" for edit in steering.edits)


def _call(run: CleanRun, layer: int, column: slice, part: Part | None = None) -> dict[str, Any]:
    """The library's own arguments to a layer, for all positions or for the last, of all prompts or of a part's."""
    call = dict(run.calls[layer])
    if column == LAST:
        if call.get("attention_mask") is not None:
            call["attention_mask"] = call["attention_mask"][:, :, LAST]
        if call.get("position_embeddings") is not None:
            call["position_embeddings"] = tuple(one[:, LAST] for one in call["position_embeddings"])
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"][:, LAST]
    return call if part is None else {name: _cut(value, part) for name, value in call.items()}


@contextmanager
def _returning(module: nn.Module, value: Tensor) -> Iterator[None]:
    """For a while the module returns this, and its hooks see it."""
    module.forward = lambda *_, **__: value
    try:
        yield
    finally:
        del module.forward
