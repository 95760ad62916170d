"""Prompts of one length read together, plain or steered, without computing again what the plain model knows.

A plain pass over a batch is kept (`plain_run`), and a steered run (`forward_from_layer`) calls the library's own blocks from the
lowest steered layer on. What gates and adaptive methods read is looked up, prompts whose gate stays shut are left to the plain
run, and edits of the last token alone, and the last layer, are computed at the last token alone. Steerings of the same sites
share a batch. All of it is exact. Batches whose plain run is too large to keep are read from the bottom.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import groupby, pairwise
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from companion.base.device import to_host
from companion.generation.hooks import Delta, Edit, Prompt, Steering, applied, some
from companion.model.activations import CleanRun, at_positions, clean_run, first, prefix_once, shared_prefix
from companion.model.architecture import Subject
from companion.model.interventions import returning
from companion.model.memory import resumable_per_token
from companion.model.readout import logits
from companion.model.replay import Prefix
from companion.prompts import tokens

KEPT_BYTES: Final = 2**29  # of the plain runs that are kept
BATCH_BYTES: Final = KEPT_BYTES // 4  # of one plain run: a larger one would push out too many others
BATCH = 128  # prompts
FEWEST = 4  # prompts of a batch, below which reading them from the bottom costs less than many calls
ROWS = 384  # of a batch, up to which steerings are put together
ALL, LAST = slice(None), slice(-1, None)  # positions
# What is made of a group of prompts: their rows in the batch, the first token's logits, and the cache that was filled.
Use = Callable[[Int[Tensor, "row"], Float[Tensor, "row vocab"], Any], Tensor]
_kept: WeakKeyDictionary[PreTrainedModel, OrderedDict[bytes, CleanRun]] = WeakKeyDictionary()


@dataclass(frozen=True)
class BatchRows:
    """Prompts of a batch: their rows in its plain run, one or several times, and what the steering read of them."""

    rows: Int[Tensor, "row"]
    run: CleanRun
    prompt: Prompt

    @cached_property
    def is_whole(self) -> bool:
        """Whether they are all prompts of the batch, once and in their order."""
        return torch.equal(self.rows, torch.arange(len(self.run.tokens), device=self.rows.device))

    def of(self, x: Tensor) -> Tensor:
        """These rows of one of the run's tensors."""
        return x if self.is_whole else x[self.rows]

    def cut(self, x: Any) -> Any:
        """These rows of an argument of a layer; what is one for all prompts stays as it is."""
        if isinstance(x, tuple):
            return tuple(map(self.cut, x))
        is_batch = isinstance(x, Tensor) and x.ndim > 1 and len(x) == len(self.run.tokens) > 1
        return self.of(x) if is_batch else x


def plain_run(subject: Subject, ids: Int[Tensor, "prompt pos"]) -> CleanRun | None:
    """The plain model's run over these prompts, from memory if they were read lately; None where none can be kept."""
    if _size(subject, ids.numel()) > BATCH_BYTES:
        return None
    runs = _kept.setdefault(subject.model, OrderedDict())
    key = bytes(str(tuple(ids.shape)), "ascii") + to_host(ids).tobytes()
    if key not in runs:
        runs[key] = clean_run(subject, ids, keep=("resid", "cache"))
        others_first = sorted(_kept.values(), key=lambda held: held is runs)
        while sum(_size(subject, run.tokens.numel()) for held in others_first for run in held.values()) > KEPT_BYTES:
            next(filter(None, others_first)).popitem(last=False)
    runs.move_to_end(key)
    return runs[key]


def _size(subject: Subject, n_tokens: int) -> int:
    """Bytes of a kept run: residual streams, keys and values of every token and layer."""
    return n_tokens * resumable_per_token(subject) * subject.dtype.itemsize


def opened(steering: Steering, run: CleanRun, changed: Mapping[str, Tensor] | None = None) -> Prompt:
    """The batch as the steering sees it: what its reads name (some of it `changed` by an intervention), and its gate."""
    read = {read.name: read.of(run.resid_post[read.layer]) for read in steering.reads}
    prompt = Prompt(run.tokens, {**read, **(changed or {})})
    prompt.opened.append(steering.openness(prompt))
    return prompt


def steered_parts(steerings: Sequence[Steering], run: CleanRun) -> dict[int, BatchRows]:
    """The rows of a batch that each steering touches, by its place; not of one without edits, strength or an open gate."""
    found = {}
    for place, steering in enumerate(steerings):
        if steering.edits and steering.strength:
            prompt = opened(steering, run)
            rows = prompt.opened[0].nonzero().flatten()
            if len(rows):
                found[place] = BatchRows(rows, run, some(prompt, rows))
    return found


def _cache_of(part: BatchRows, below: int | None = None) -> DynamicCache:
    """The plain run's keys and values (of the layers below one), for going on from it."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(part.run.keys[:below], part.run.values[:below], strict=True)):
        cache.update(part.of(keys), part.of(values), layer)
    return cache


@torch.no_grad()
def forward_from_layer(
    subject: Subject, steering: Steering, part: BatchRows, *, cached: bool = False, top: int | None = None
) -> tuple[Float[Tensor, "row d"], DynamicCache | None]:
    """The final residual stream at the last token, with the filled cache if it is wanted; `top` stops above that layer.

    To be called in a block of `applied` to the part's prompt, or nothing is added.
    """
    run, end = part.run, subject.n_layers if top is None else top + 1
    start = min(edit.layer for edit in steering.edits)
    is_known = all(edit.part == "resid_post" for edit in steering.edits if edit.layer == start)
    cache = _cache_of(part, start + is_known) if cached else None
    column = LAST if at_last_token(steering) else ALL
    hidden = part.of(run.resid_pre[start][:, column])
    for layer in range(start, end):
        block = subject.layers[layer].block
        if layer == start and is_known:  # only its output is edited, and that is known
            with returning(block, part.of(run.resid_post[start][:, column])):
                hidden = first(block(hidden))
            continue
        held: Any = cache
        if column == LAST or layer == subject.n_layers - 1:  # nobody looks at other tokens above it
            if column == LAST or layer == start:  # earlier tokens are the plain ones up to here
                keys, values = part.of(run.keys[layer]), part.of(run.values[layer])
            else:
                keys, values = _heard(subject, part, layer, hidden)
            hidden, column = hidden[:, LAST], LAST
            if cache is None:
                held = Prefix(keys[:, :, :-1], values[:, :, :-1])
            else:
                cache.update(keys[:, :, :-1], values[:, :, :-1], layer)
        hidden = first(block(hidden, **_call(run, layer, column, part), past_key_values=held))
    return hidden[:, -1], cache


class _Heard(Exception):
    """A cache that raises the keys and values which a layer hands to it."""

    @classmethod
    def update(cls, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> None:
        raise cls(keys, values)


def _heard(subject: Subject, part: BatchRows, layer: int, hidden: Float[Tensor, "row pos d"]) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer, which is left as soon as the library hands them to its cache."""
    try:
        subject.layers[layer].block(hidden, **_call(part.run, layer, ALL, part), past_key_values=_Heard)
    except _Heard as heard:
        return heard.args
    raise AssertionError("the layer asked for no cache")


def replayed(subject: Subject, run: CleanRun, layer: int, hidden: Float[Tensor, "prompt pos d"]) -> Tensor:
    """A layer of the run on other inputs: at all positions, or at the last one behind the run's own tokens."""
    is_last = hidden.shape[1] < run.tokens.shape[1]
    before = Prefix(run.keys[layer][:, :, :-1], run.values[layer][:, :, :-1]) if is_last else None
    call = _call(run, layer, LAST if is_last else ALL)
    return first(subject.layers[layer].block(hidden, **call, past_key_values=before))


def at_last_token(steering: Steering) -> bool:
    """Whether the prompt's last token alone is edited, so that no other position differs from the plain run."""
    return all(edit.where == "last" for edit in steering.edits)


def _call(run: CleanRun, layer: int, column: slice, part: BatchRows | None = None) -> dict[str, Any]:
    """The library's own arguments to a layer, for all positions or the last, of all prompts or a part's."""
    call = {name: at_positions(name, value, column) for name, value in run.calls[layer].items()}
    if call.get("attention_mask") is not None:
        call["attention_mask"] = call["attention_mask"][:, :, column]
    return call if part is None else {name: part.cut(value) for name, value in call.items()}


def fitting(steerings: Sequence[Steering], n_prompts: int, rows: int = ROWS) -> list[list[Steering]]:
    """The steerings in their order, in groups that may share a batch of this many prompts."""
    size = max(1, rows // max(1, n_prompts))

    def sites(steering: Steering) -> tuple[object, ...]:
        edits = tuple((edit.layer, edit.part, edit.where) for edit in steering.edits)
        return edits, tuple(sorted(read.name for read in steering.reads))

    alike = [list(group) for _, group in groupby(steerings, sites)]
    return [group[at : at + size] for group in alike for at in range(0, len(group), size)]


def stacked(steerings: Sequence[Steering], parts: Sequence[BatchRows]) -> tuple[Steering, BatchRows, list[slice]]:
    """One steering that does to each part what its own does, on all parts together; and where each of them lies."""
    ends = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
    places = [slice(*ends) for ends in pairwise(ends)]
    if len(parts) == 1:
        return steerings[0], parts[0], places
    # The strength, which differs between steerings, goes into the gate; a name may be read at another layer in each.
    opened = torch.cat([one.strength * part.prompt.opened[0] for one, part in zip(steerings, parts, strict=True)])
    read = {name: torch.cat([part.prompt.read[name] for part in parts]) for name in parts[0].prompt.read}
    prompt = Prompt(torch.cat([part.prompt.ids for part in parts]), read, [opened])
    whole = BatchRows(torch.cat([part.rows for part in parts]), parts[0].run, prompt)

    def each(deltas: Sequence[Delta], x: Float[Tensor, "row pos width"], prompt: Prompt) -> Tensor:
        made = [delta(x[at], some(prompt, at)).to(x) for delta, at in zip(deltas, places, strict=True)]
        width = max(one.shape[1] for one in made)
        return torch.cat([one.expand(at.stop - at.start, width, -1) for one, at in zip(made, places, strict=True)])

    edits = tuple(
        Edit(sites[0].layer, sites[0].part, partial(each, [edit.delta for edit in sites]), sites[0].where)
        for sites in zip(*(one.edits for one in steerings), strict=True)
    )
    return Steering(" | ".join(one.name for one in steerings), edits), whole, places


def buckets(
    subject: Subject, texts: Sequence[str], size: int = BATCH, *, system: str = ""
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Prompts of one token length together: their places in the list, and their ids [prompt, pos]."""
    for places, (ids,) in buckets_each(subject, texts, [system], size):
        yield places, ids


def buckets_each(
    subject: Subject, texts: Sequence[str], systems: Sequence[str], size: int
) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
    """`buckets` of prompts that have one length behind each of these system turns, and their ids [prompt, pos] behind each.

    One length alone is not one behind a sentence: its last space may melt into the first word.
    """
    encoded = [[encode(subject, text, system) for system in systems] for text in texts]
    lengths = np.array([[len(ids) for ids in row] for row in encoded]).reshape(len(texts), len(systems))
    for wanted in np.unique(lengths, axis=0):
        places = np.flatnonzero((lengths == wanted).all(1))
        fit = BATCH_BYTES // _size(subject, int(wanted.max()))
        step = min(size, fit) if fit >= FEWEST else size  # so that their plain run can be kept
        for start in range(0, len(places), step):
            chosen = places[start : start + step]
            rows = zip(*(encoded[i] for i in chosen), strict=True)
            yield chosen, [subject.tensor(np.stack(ids)) for ids in rows]


def encode(subject: Subject, text: str, system: str = "") -> Int[np.ndarray, "pos"]:
    """Token ids of a user turn in the chat template, behind a sentence if one is given (`tokens.encode_behind`)."""
    assert subject.tokenizer is not None
    return _encoded(subject.tokenizer, text, system)


@lru_cache(maxsize=1 << 15)  # the same few thousand prompts are read under every arm
def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, system: str) -> Int[np.ndarray, "pos"]:
    return tokens.encode_behind(tokenizer, system, text) if system else tokens.encode(tokenizer, text)[0]


def read_prompts(
    subject: Subject, ids: Int[Tensor, "prompt pos"], steerings: Sequence[Steering], use: Use, *,
    cached: bool = True, plain: Tensor | None = None, rows: int = ROWS,
) -> Tensor:  # fmt: skip
    """What `use` makes of the batch under each steering, called while it is switched on: [steering, prompt, ...].

    Steerings of the same sites share the model's calls, in batches of `rows`. Prompts that a steering does not touch (its gate
    stays shut) are a group of their own, taken from `plain` where that is known. Answers can go on from a `cached` run.
    """
    run = plain_run(subject, ids)
    if run is not None:
        groups = fitting(steerings, len(ids), rows)
        return torch.cat([_resumed(subject, group, run, use, cached, plain) for group in groups])
    found = []
    for steering in steerings:
        prompt_alone = plain_layers_once(subject, steering, ids)
        with applied(subject, steering):
            with prompt_alone:
                out = subject.model(ids, use_cache=cached, logits_to_keep=1)
            found.append(use(torch.arange(len(ids), device=ids.device), out.logits[:, -1], out.past_key_values))
    return torch.stack(found)


def plain_layers_once(
    subject: Subject, steering: Steering, ids: Int[Tensor, "prompt pos"]
) -> AbstractContextManager[None]:
    """Layers below the lowest edit compute a shared prefix once; to be called before the steering sets its hooks."""
    top = min((edit.layer for edit in steering.edits), default=subject.n_layers)
    return prefix_once(subject, shared_prefix(subject, ids), top)


def first_logits(subject: Subject, ids: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt vocab"]:
    """The plain model's logits of each answer's first token."""
    with torch.no_grad(), prefix_once(subject, shared_prefix(subject, ids)):
        return torch.as_tensor(subject.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1])


def _resumed(
    subject: Subject, steerings: Sequence[Steering], run: CleanRun, use: Use, cached: bool, plain: Tensor | None
) -> Tensor:
    """Steerings of the same sites in one run. What none of them touches in a prompt is the plain model's."""
    parts = steered_parts(steerings, run)
    touched = torch.zeros(len(steerings), len(run.tokens), dtype=torch.bool, device=run.tokens.device)
    for i, part in parts.items():
        touched[i, part.rows] = True
    left = (~touched).any(0).nonzero().flatten()
    if len(left) and plain is None:
        cache = _cache_of(BatchRows(left, run, Prompt(run.tokens[left]))) if cached else None
        made = use(left, logits(subject, run.resid_post[-1][left, -1]), cache)
        plain = made.new_empty(len(run.tokens), *made.shape[1:])
        plain[left] = made
    if not parts:
        assert plain is not None  # nothing is touched, so all of it was left
        return plain.expand(len(steerings), *plain.shape)
    steering, whole, places = stacked([steerings[i] for i in parts], list(parts.values()))
    with applied(subject, steering, whole.prompt):
        last, cache = forward_from_layer(subject, steering, whole, cached=cached)
        made = use(whole.rows, logits(subject, last), cache)
    found = made.new_empty(*touched.shape, *made.shape[1:])
    if plain is not None:
        found[:] = plain
    for (i, part), at in zip(parts.items(), places, strict=True):
        found[i, part.rows] = made[at]
    return found
