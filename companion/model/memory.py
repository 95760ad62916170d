"""How much memory a model needs, known before its weights are read, where its layers can lie, and how much runs at once.

Sizes come from shapes on torch's meta device, and so does what runs at once: a rerun gives the same bytes. A sweep stays, above
the model and two clean runs, below half a clean run with all sites.
"""

from __future__ import annotations

import timeit
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from companion.base import gguf, hub
from companion.base.device import HOST, count, free_memory
from companion.base.display import progress
from companion.base.errors import InputError, explained
from companion.model.architecture import Subject, find_parts
from companion.model.interventions import Stretch, head_width

BATCH = 64  # pairs that run together, at the most
CLEAN_RUN_BYTES = 2**30  # that they keep, at the most
ANSWER = 24  # tokens of an answer that are scored together
READOUT_BYTES = 2**29  # of logits over the whole vocabulary, with what is computed of them, at the most
_VOCABULARY_BYTES = 28  # of one logit: in float32, and three times in float64
WORKING_SHARE = 0.4  # of a clean run: the working memory of a sweep
MASK_SHARE = 0.1  # of a layer's products: those that the block-diagonal mask wastes
ON_A_PROCESSOR = 96  # tokens a pair: more leave its caches, and attention among them costs it most
# What all notebooks cost beside the sweep of heads, in sweeps of one site: `smollm2-refuser`, of 9 heads, took 60 core-minutes.
RUN_COST = 159.0
LONGEST = 256  # tokens of a prompt, where none has been read yet
COPIES = {torch.bfloat16: 3.0}  # a screening run is compared with itself in float32; others with an untrained twin
USABLE = 0.92  # of the free memory: what fragments and the libraries' own buffers leave
events: list[str] = []  # what did not go as planned since the process began: chunks that were halved for want of memory


def operations(subject: Subject) -> float:
    """What one pair's interventions at the last token cost: every layer, module and head, both directions, in dense products.

    An intervention costs the layers above it at one token; products with the vocabulary, clean runs and attention are left out.
    """
    return (3 + subject.n_heads) * _operations_of_one_site(subject)


def _operations_of_one_site(subject: Subject) -> float:
    return 4 * sum(float(_numbers(parts.block)) * place for place, parts in enumerate(subject.layers))


def minutes(subject: Subject, n_pairs: int) -> float:
    """How long all notebooks will take here, roughly: products counted, times the speed of one of the model's size.

    That is timed on one core: two wait for each other where something else runs.
    """
    threads, weight = torch.get_num_threads(), torch.ones(subject.d_model, subject.d_mlp)
    tokens = torch.ones(ON_A_PROCESSOR, subject.d_model)
    torch.set_num_threads(1)
    seconds = min(timeit.repeat(lambda: torch.mm(tokens, weight), number=1, repeat=50))
    torch.set_num_threads(threads)
    products = n_pairs * (RUN_COST + subject.n_heads) * _operations_of_one_site(subject)
    return products * seconds / (2 * ON_A_PROCESSOR * weight.numel()) / 60


@dataclass(frozen=True)
class SweepMemory:
    """Bytes above the loaded model: a clean run with all sites; what a sweep, a gradient screen, a read-out work with."""

    clean_run: int
    sweep: int
    screen: int
    readout: int

    @property
    def total(self) -> int:
        """Both clean runs with the larger of what is computed from them, and a read-out."""
        return 2 * self.clean_run + max(self.sweep, self.screen) + self.readout


def sweep_memory(subject: Subject, n_pairs: int, n_pos: int) -> SweepMemory:
    """What `interchange` and `attribution` will need, estimated from shapes before anything runs."""
    size = n_pairs * subject.dtype.itemsize
    return SweepMemory(
        clean_run=size * n_pos * _kept_per_token(subject),
        sweep=size * token_budget(subject, n_pos) * _working_per_token(subject, n_pos),
        screen=size * n_pos * _graph_per_token(subject, n_pos),
        readout=min(READOUT_BYTES, _VOCABULARY_BYTES * n_pairs * ANSWER * len(subject.unembedding[0])),
    )


def token_budget(subject: Subject, n_pos: int) -> int:
    """Tokens a pair that run side by side in one sweep: bounded by memory and by the waste of the block-diagonal mask."""
    by_memory = WORKING_SHARE * n_pos * _kept_per_token(subject) / _working_per_token(subject, n_pos)
    by_mask = MASK_SHARE * _numbers(subject.layers[0].block) / (2 * _across_heads(subject))
    by_device = ON_A_PROCESSOR if subject.device.type == "cpu" else by_mask
    return int(max(n_pos, 16, min(by_memory, by_mask, by_device)))


def pairs_at_once(subject: Subject, n_pos: int) -> int:
    """How many pairs of this length run together: at most 64, fewer where a clean run would exceed 1 GiB."""
    parts = 4 if subject.device.type == "cpu" else 1  # a quarter on a processor, where two notebooks share the memory
    return max(1, min(BATCH, CLEAN_RUN_BYTES // (parts * sweep_memory(subject, 1, n_pos).clean_run)))


def vocabulary_blocks(subject: Subject, n: int, each: int) -> list[slice]:
    """Cuts `n` rows, of which each has the logits of `each` tokens, so that whole vocabularies stay below `READOUT_BYTES`."""
    step = max(1, READOUT_BYTES // (_VOCABULARY_BYTES * each * len(subject.unembedding[0])))
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


def fill_in_chunks(
    found: Tensor, stretches: Sequence[Stretch], end: int, budget: int, run: Callable[[Sequence[Stretch]], Tensor]
) -> None:
    """Writes what `run` makes of a chunk of stretches into their slots of `found` (pair, slot, ...), for all of them.

    A chunk that does not fit into memory is cut in halves, and that is recorded.
    """
    waiting = _cut(stretches, end, budget)[::-1]
    bar = progress(range(len(stretches)), desc="interventions")
    while waiting:
        chunk = waiting.pop()
        try:
            made = run(chunk)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            if len(chunk) == 1:
                raise InputError("one intervention does not fit into memory; use fewer pairs at a time") from error
            events.append(f"out of memory with {len(chunk)} interventions at once; went on with half as many")
            warnings.warn(events[-1], stacklevel=2)
            half = (len(chunk) + 1) // 2
            waiting += [chunk[half:], chunk[:half]]
            continue
        found[:, [stretch.slot for stretch in chunk]] = made
        for _ in chunk:
            next(bar)
    next(bar, None)


def _cut(stretches: Sequence[Stretch], end: int, budget: int) -> list[Sequence[Stretch]]:
    """Stretches with near starts together, at most `budget` tokens a chunk, each chunk ordered by entry layer."""
    chunks, used = list[list[Stretch]](), budget
    for stretch in sorted(stretches, key=lambda s: (s.start, s.entry, s.slot)):
        used += end - stretch.start
        if used > budget:
            chunks.append([])
            used = end - stretch.start
        chunks[-1].append(stretch)
    return [sorted(chunk, key=lambda s: (s.entry, s.slot)) for chunk in chunks]


def _kept_per_token(subject: Subject) -> int:
    """Numbers that a clean run with all sites keeps for one token."""
    in_a_layer = 2 * subject.d_model + _across_heads(subject) + subject.d_mlp
    return resumable_per_token(subject) + subject.n_layers * in_a_layer


def resumable_per_token(subject: Subject) -> int:
    """Numbers that a clean run keeps for one token if it holds the residual stream, keys and values alone."""
    n_key_heads = getattr(subject.model.config, "num_key_value_heads", None) or subject.n_heads
    return subject.n_layers * (subject.d_model + 2 * int(n_key_heads) * head_width(subject, 0))


def _working_per_token(subject: Subject, n_pos: int) -> int:
    """Numbers that are alive for one running token while a layer is computed, at the most."""
    is_eager = subject.model.config._attn_implementation == "eager"
    scores = 2 * subject.n_heads * 3 * n_pos if is_eager else 0
    return 6 * subject.d_model + 2 * _across_heads(subject) + 3 * subject.d_mlp + scores


def _graph_per_token(subject: Subject, n_pos: int) -> int:
    """Numbers that a backward pass needs of one token's forward pass, and the neurons' gradients."""
    is_capped = getattr(subject.model.config, "attn_logit_softcapping", None)
    scores, norms = subject.n_heads * n_pos * (2 if is_capped else 1), 6 if subject.post_norm else 3
    return subject.n_layers * (norms * subject.d_model + 5 * _across_heads(subject) + scores + 6 * subject.d_mlp)


def _across_heads(subject: Subject) -> int:
    return subject.n_heads * head_width(subject, 0)


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class RunMemory:
    """Bytes: of the weights once, of all copies that are alive together, and of a sweep with its read-out above them."""

    weights: int
    copies: int
    sweep: int

    @property
    def total(self) -> int:
        """Everything together."""
        return self.copies + self.sweep


def on_meta(folder: Path, dtype: torch.dtype) -> Subject:
    """The model's shapes, from its config alone. Raises InputError for an architecture that is not known."""
    with explained(f"{hub.name_of(folder)} could not be loaded", "is its config complete, and its architecture known?"):
        if gguf.is_gguf(folder):
            config = gguf.read_config(folder)
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=hub.trusts_code())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=hub.trusts_code())
    return find_parts(model.requires_grad_(False), None, hub.name_of(folder), "no weights yet")


def run_memory(shapes: Subject, copies: float | None = None) -> RunMemory:
    """What a run of all notebooks keeps alive at once, for prompts of at most `LONGEST` tokens.

    Beside the model lies its untrained twin; in bfloat16 a float32 copy, from which the noise floor is read. `copies` counts
    its weights otherwise: 1 for a model that nothing is compared with.
    """
    weights, alive = _weights(shapes.model), COPIES.get(shapes.dtype, 2.0) if copies is None else copies
    sweep = sweep_memory(shapes, pairs_at_once(shapes, LONGEST), LONGEST).total
    return RunMemory(weights, round(alive * weights), sweep)


def check_size(folder: Path, device: str, dtype: str, copies: float | None = None) -> str:
    """One line on the size of a folder's model and on what does not fit onto its GPU; the weights stay unread.

    Raises `InputError` as `on_meta` and `placement` do.
    """
    shapes = on_meta(folder, getattr(torch, dtype))
    places = Counter((placement(shapes, torch.device(device), copies) or {}).values())
    main, size = next(iter(places), ""), _numbers(shapes.model) / 1e9  # the first is the embedding's
    notes = [f"{size:.2f} billion parameters", f"memory needed at most: {_gb(run_memory(shapes, copies).total)}"]
    if spread := sum(n for place, n in places.items() if place not in ("cpu", main)):
        notes.append(f"{spread} of {shapes.n_layers} layers lie on other GPUs")
    if n := places["cpu"]:
        notes.append(f"{n} of {shapes.n_layers} layers wait in the processor's memory, which is many times slower")
    return "; ".join(notes)


def placement(shapes: Subject, device: torch.device, copies: float | None = None) -> dict[str, str] | None:
    """Where each part lies: None for all of it on `device`, else names of modules with a GPU or "cpu".

    The earliest layers go first: to the other GPUs, where `device` is "cuda" without a number, then to the processor's
    memory (see `companion.model.architecture`). `copies` is that of `run_memory`. Raises InputError where even that does not fit.
    """
    asked, free = run_memory(shapes, copies), int(USABLE * free_memory(device))
    missing, places, rooms = asked.total - free, list[str](), dict[str, int]()
    if missing <= 0:
        return None
    if device.type != "cpu":  # what is computed on another GPU needs room too
        others = (f"{device.type}:{i}" for i in range(1, count(device) if device.index is None else 1))
        rooms = {name: int(USABLE * free_memory(torch.device(name))) - asked.sweep for name in others}
        # An untrained twin that has such layers is drawn in the processor's memory, before they are sent to their places.
        rooms["cpu"] = int(USABLE * free_memory(HOST)) - asked.weights
    elsewhere = "".join(f" and {_gb(max(0, room))} of {name}" for name, room in rooms.items())
    for parts in shapes.layers[:-1]:  # the last layer stays: its neurons are read in closed form
        size = int(asked.copies / asked.weights * _weights(parts.block))
        place = next((name for name, room in rooms.items() if room >= size), None)
        if missing <= 0 or place is None:
            break
        rooms[place] -= size
        missing -= size
        places.append(place)
    if missing <= 0:
        return name_places(shapes, places, str(device))
    copy = f", with the copy that it is compared with {_gb(asked.copies)}" if asked.copies > asked.weights else ""
    half = "" if shapes.dtype == torch.bfloat16 else ", --dtype bfloat16 (needs less, for screening only)"
    raise InputError(
        f"{shapes.name} is too large for {device}: weights {_gb(asked.weights)}{copy}, and a sweep {_gb(asked.sweep)}, but "
        f"{_gb(free)} of its memory{elsewhere} can be used; use a machine with more memory{half} or a smaller model"
    )


def name_places(shapes: Subject, places: Sequence[str], device: str) -> dict[str, str]:
    """Modules by name, each with its place: the first layers lie at `places`, all else on `device`."""
    own = dict(zip_longest((parts.block for parts in shapes.layers), places, fillvalue=device))
    found: dict[str, str] = {}
    for name, module in shapes.model.named_modules():
        is_inside = name.startswith(tuple(f"{above}." for above in found))
        if module in own or not (is_inside or any(module.children())):
            found[name] = own.get(module, device)
    return found


def _weights(module: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in module.parameters())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
