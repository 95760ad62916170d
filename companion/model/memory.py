"""How much memory a model needs, known before its weights are read, where its layers can lie, and how much runs at once.

Sizes come from the model on torch's meta device: all shapes, no numbers. What runs at once is a pure function of shapes, so
that a rerun gives the same bytes; a sweep stays, above the model and two clean runs, below half a clean run with all sites.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
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
RUN_COST = 11.0  # of all notebooks, two at once, over `operations` of every pair: a run on `smollm2-refuser` took 47 core-minutes
TIMED = 50  # products
LONGEST = 256  # tokens of a prompt, where none has been read yet
COPIES = {torch.bfloat16: 3.0}  # a screening run is compared with itself in float32; others with an untrained twin
USABLE = 0.92  # of the free memory: what fragments and the libraries' own buffers leave
_events: list[str] = []


def operations(subject: Subject) -> float:
    """What one pair's interventions at the last token cost: every layer, module and head, both directions, in dense products.

    An intervention costs the layers above it at one token; products with the vocabulary, clean runs and attention are left out.
    """
    layers = [float(sum(p.numel() for p in parts.block.parameters())) for parts in subject.layers]
    above = sum(2 * size * place for place, size in enumerate(layers))
    return 2 * (3 + subject.n_heads) * above


def minutes(subject: Subject, n_pairs: int) -> float:
    """How long all notebooks will take here, roughly: from `operations` and the speed of one product of the model's size.

    The product is timed on one core: two wait for each other where something else runs.
    """
    shape, threads = (subject.d_model, subject.d_mlp), torch.get_num_threads()
    tokens, weight = torch.ones(ON_A_PROCESSOR, shape[0]), torch.ones(shape)
    seconds = math.inf
    torch.set_num_threads(1)
    for _ in range(TIMED):
        start = time.perf_counter()
        torch.mm(tokens, weight)
        seconds = min(seconds, time.perf_counter() - start)
    torch.set_num_threads(threads)
    return RUN_COST * operations(subject) * n_pairs * seconds / (2 * ON_A_PROCESSOR * math.prod(shape)) / 60


@dataclass(frozen=True)
class SweepMemory:
    """Bytes above the loaded model: one clean run with all sites; the working memory of a sweep, of a gradient screen, and
    of read-outs over the whole vocabulary.
    """

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
    """Tokens a pair that run side by side in one sweep: bounded by memory and by the waste of the block-diagonal mask.

    Depends on the model's shape, the sequence length and the kind of device only.
    """
    by_memory = WORKING_SHARE * n_pos * _kept_per_token(subject) / _working_per_token(subject, n_pos)
    weights = sum(p.numel() for p in subject.layers[0].block.parameters())
    by_mask = MASK_SHARE * weights / (2 * subject.n_heads * head_width(subject, 0))
    by_device = ON_A_PROCESSOR if subject.device.type == "cpu" else by_mask
    return int(max(n_pos, 16, min(by_memory, by_mask, by_device)))


def pairs_at_once(subject: Subject, n_pos: int) -> int:
    """How many pairs of this length run together: at most 64, fewer where a clean run would exceed 1 GiB.

    Half of that on a processor, where two notebooks at once share the memory. A pure function of shapes and the kind of
    device, as everything that decides which pairs share a batch.
    """
    one = sweep_memory(subject, 1, n_pos).clean_run
    return max(1, min(BATCH, CLEAN_RUN_BYTES // ((2 if subject.device.type == "cpu" else 1) * one)))


def vocabulary_blocks(subject: Subject, n: int, each: int) -> list[slice]:
    """Cuts `n` rows, of which each has the logits of `each` tokens, so that whole vocabularies stay below `READOUT_BYTES`."""
    step = max(1, READOUT_BYTES // (_VOCABULARY_BYTES * each * len(subject.unembedding[0])))
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


def in_chunks(
    stretches: Sequence[Stretch], end: int, budget: int, run: Callable[[Sequence[Stretch]], Tensor]
) -> Iterator[tuple[Sequence[Stretch], Tensor]]:
    """Runs all stretches, chunk by chunk; a chunk that does not fit into memory is cut in halves, and that is recorded."""
    waiting = _cut(stretches, end, budget)[::-1]
    bar = progress(range(len(stretches)), desc="interventions", total=len(stretches))
    while waiting:
        chunk = waiting.pop()
        result = _try(run, chunk)
        if result is None:
            half = (len(chunk) + 1) // 2
            waiting += [chunk[half:], chunk[:half]]
            continue
        yield chunk, result
        for _ in chunk:
            next(bar)
    next(bar, None)


def chunk_events() -> tuple[str, ...]:
    """What did not go as planned since the process started: chunks that were halved for want of memory."""
    return tuple(_events)


def note_events(events: Iterable[str]) -> None:
    """Add events of another process, whose results are used in this one."""
    _events.extend(events)


def _cut(stretches: Sequence[Stretch], end: int, budget: int) -> list[Sequence[Stretch]]:
    """Stretches with near starts together, at most `budget` tokens a chunk, each chunk ordered by entry layer."""
    ordered = sorted(stretches, key=lambda s: (s.start, s.entry, s.slot))
    chunks: list[list[Stretch]] = []
    used = budget
    for stretch in ordered:
        length = end - stretch.start
        if used + length > budget:
            chunks.append([])
            used = 0
        chunks[-1].append(stretch)
        used += length
    return [sorted(chunk, key=lambda s: (s.entry, s.slot)) for chunk in chunks]


def _try(run: Callable[[Sequence[Stretch]], Tensor], chunk: Sequence[Stretch]) -> Tensor | None:
    try:
        return run(chunk)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        if len(chunk) == 1:
            raise InputError("one intervention does not fit into memory; use fewer pairs at a time") from error
        event = f"out of memory with {len(chunk)} interventions at once; went on with half as many"
    _events.append(event)
    warnings.warn(event, stacklevel=2)
    return None


def _kept_per_token(subject: Subject) -> int:
    """Numbers that a clean run with all sites keeps for one token."""
    heads = subject.n_heads * head_width(subject, 0)
    return resumable_per_token(subject) + subject.n_layers * (2 * subject.d_model + heads + subject.d_mlp)


def resumable_per_token(subject: Subject) -> int:
    """Numbers that a clean run keeps for one token if it holds the residual stream, keys and values alone."""
    n_key_heads = getattr(subject.model.config, "num_key_value_heads", None) or subject.n_heads
    return subject.n_layers * (subject.d_model + 2 * int(n_key_heads) * head_width(subject, 0))


def _working_per_token(subject: Subject, n_pos: int) -> int:
    """Numbers that are alive for one running token while a layer is computed, at the most."""
    is_eager = subject.model.config._attn_implementation == "eager"
    scores = 2 * subject.n_heads * 3 * n_pos if is_eager else 0
    return 6 * subject.d_model + 2 * subject.n_heads * head_width(subject, 0) + 3 * subject.d_mlp + scores


def _graph_per_token(subject: Subject, n_pos: int) -> int:
    """Numbers that a backward pass needs of one token's forward pass, and the neurons' gradients."""
    heads, scores = subject.n_heads * head_width(subject, 0), subject.n_heads * n_pos
    if getattr(subject.model.config, "attn_logit_softcapping", None):
        scores *= 2
    norms = 6 if subject.post_norm else 3
    return subject.n_layers * (norms * subject.d_model + 5 * heads + scores + 6 * subject.d_mlp)


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
    what = f"{hub.name_of(folder)} could not be loaded"
    with explained(what, "is its config complete, and its architecture known?"):
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
    weights = sum(p.numel() * p.itemsize for p in shapes.model.parameters())
    sweep = sweep_memory(shapes, pairs_at_once(shapes, LONGEST), LONGEST).total
    alive = COPIES.get(shapes.dtype, 2.0) if copies is None else copies
    return RunMemory(weights, round(alive * weights), sweep)


def check_size(folder: Path, device: str, dtype: str, *, copies: float | None = None, beside: int = 0) -> str:
    """One line on the size of a folder's model and on what does not fit onto its GPU; the weights stay unread.

    Raises `InputError` as `on_meta` and `placement` do.
    """
    shapes = on_meta(folder, getattr(torch, dtype))
    where = placement(shapes, torch.device(device), copies=copies, beside=beside) or {}
    places = Counter(where.values())
    main = next(iter(where.values()), "")  # the embedding's
    spread = sum(n for place, n in places.items() if place not in ("cpu", main))
    size = sum(p.numel() for p in shapes.model.parameters()) / 1e9
    notes = [f"{size:.2f} billion parameters", f"memory needed at most: {_gb(run_memory(shapes, copies).total)}"]
    notes += [f"{spread} of {shapes.n_layers} layers lie on other GPUs"] if spread else []
    slow = "layers wait in the processor's memory, which is many times slower"
    notes += [f"{places['cpu']} of {shapes.n_layers} {slow}"] if places["cpu"] else []
    return "; ".join(notes)


def reserved_bytes(folder: Path, device: str, dtype: str) -> int:
    """Bytes of `device` that a folder's model leaves to no other; `InputError` as `check_size` raises it.

    0 where a part of it must lie elsewhere: how much is then left is only known when it has been loaded.
    """
    shapes = on_meta(folder, getattr(torch, dtype))
    return run_memory(shapes).total if placement(shapes, torch.device(device)) is None else 0


def placement(
    shapes: Subject, device: torch.device, *, copies: float | None = None, beside: int = 0
) -> dict[str, str] | None:
    """Where each part lies: None for all of it on `device`, else names of modules with a GPU or "cpu".

    The earliest layers go first: to the other GPUs, where `device` is "cuda" without a number, then to the processor's
    memory, from where they come to the GPU for each call (many times slower). The `accelerate` library moves both; see
    `companion.model.architecture`. `copies` is that of `run_memory`; `beside` are bytes of `device` that are free
    now and will not be. Raises InputError where even that does not fit.
    """
    asked, free = run_memory(shapes, copies), max(0, int(USABLE * free_memory(device)) - beside)
    if asked.total <= free:
        return None
    rooms = _rooms(device, asked.sweep, asked.weights)
    factor = asked.copies / asked.weights
    layers = [int(factor * sum(p.numel() * p.itemsize for p in parts.block.parameters())) for parts in shapes.layers]
    left, missing, places = dict(rooms), asked.total - free, list[str]()
    for size in layers[:-1]:  # the last layer stays: its neurons are read in closed form
        place = next((name for name, room in left.items() if room >= size), None)
        if missing <= 0 or place is None:
            break
        left[place] -= size
        missing -= size
        places.append(place)
    if missing > 0:
        raise _too_large(shapes, asked, device, free, rooms, beside)
    return name_places(shapes, places, str(device))


def _rooms(device: torch.device, sweep: int, weights: int) -> dict[str, int]:
    """Bytes for layers on each other GPU that may be used (what is computed there needs room too), then in the processor's."""
    if device.type == "cpu":
        return {}
    others = range(1, count(device) if device.index is None else 1)
    rooms = {f"{device.type}:{i}": int(USABLE * free_memory(torch.device(device.type, i))) - sweep for i in others}
    # An untrained twin that has such layers is drawn in the processor's memory, before they are sent to their places.
    return rooms | {"cpu": int(USABLE * free_memory(HOST)) - weights}


def _too_large(
    shapes: Subject, asked: RunMemory, device: torch.device, free: int, rooms: Mapping[str, int], beside: int = 0
) -> InputError:
    """The error that says what is needed, what there is, and what else can be done."""
    named = {"the processor's" if name == "cpu" else name: max(0, room) for name, room in rooms.items()}
    other = "".join(f" and {_gb(room)} of {name}" for name, room in named.items())
    half = "" if shapes.dtype == torch.bfloat16 else ", --dtype bfloat16 (needs less, for screening only)"
    next_to = " beside the model under study" if beside else ""
    copy = f", with the copy that it is compared with {_gb(asked.copies)}" if asked.copies > asked.weights else ""
    return InputError(
        f"{shapes.name} is too large for {device}: weights {_gb(asked.weights)}{copy}, and a sweep {_gb(asked.sweep)}, but "
        f"{_gb(free)} of its memory{other} can be used{next_to}; use a machine with more "
        f"memory{half} or a smaller model"
    )


def name_places(shapes: Subject, places: Sequence[str], device: str) -> dict[str, str]:
    """Modules by name, each with its place: the first layers lie at `places`, all else on `device`."""
    layers = [id(parts.block) for parts in shapes.layers]
    found: dict[str, str] = {}
    for name, module in shapes.model.named_modules():
        if id(module) in layers:
            found[name] = (*places, *[device] * len(layers))[layers.index(id(module))]
        elif not any(name.startswith(f"{above}.") for above in found) and not any(
            id(child) in layers for child in module.modules()
        ):
            found[name] = device
    return found


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
