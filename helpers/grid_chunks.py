"""How much is computed at once: a pure function of shapes, so that a rerun gives the same bytes.

Peak memory of a sweep above the model and the two clean runs is kept below half of one clean run with all sites.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.errors import InputError
from helpers.grid_patch import head_width
from helpers.grid_sweep import Stretch
from helpers.progress import progress
from helpers.subject_parts import Subject

WORKING_SHARE = 0.4
MASK_SHARE = 0.1
_events: list[str] = []


@dataclass(frozen=True)
class Need:
    """Bytes above the loaded model: one clean run with all sites, and the working memory of a sweep."""

    clean_run: int
    sweep: int


def memory_need(subject: Subject, n_pairs: int, n_pos: int) -> Need:
    """What `interchange` will need, estimated from shapes before anything runs."""
    tokens = token_budget(subject, n_pos)
    size = n_pairs * subject.dtype.itemsize
    return Need(size * n_pos * _kept_per_token(subject), size * tokens * _working_per_token(subject, n_pos))


def token_budget(subject: Subject, n_pos: int) -> int:
    """Tokens a pair that run side by side in one sweep: bounded by memory and by the waste of the block-diagonal
    mask.

    Depends on the model's shape and the sequence length only.
    """
    by_memory = WORKING_SHARE * n_pos * _kept_per_token(subject) / _working_per_token(subject, n_pos)
    weights = sum(p.numel() for p in subject.layers[0].block.parameters())
    by_mask = MASK_SHARE * weights / (2 * subject.n_heads * head_width(subject, 0))
    return int(max(n_pos, 16, min(by_memory, by_mask)))


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
        is_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not is_memory:
            raise
        if len(chunk) == 1:
            raise InputError("one intervention does not fit into memory; use fewer pairs at a time") from error
        event = f"out of memory with {len(chunk)} interventions at once; went on with half as many"
    _events.append(event)
    warnings.warn(event, stacklevel=2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _kept_per_token(subject: Subject) -> int:
    """Numbers that a clean run with all sites keeps for one token."""
    heads = subject.n_heads * head_width(subject, 0)
    return subject.n_layers * (3 * subject.d_model + heads + subject.d_mlp + 2 * _key_width(subject))


def _working_per_token(subject: Subject, n_pos: int) -> int:
    """Numbers that are alive for one running token while a layer is computed, at the most."""
    is_eager = subject.model.config._attn_implementation == "eager"
    scores = 2 * subject.n_heads * 3 * n_pos if is_eager else 0
    return 6 * subject.d_model + 2 * subject.n_heads * head_width(subject, 0) + 3 * subject.d_mlp + scores


def _key_width(subject: Subject) -> int:
    n_key_heads = getattr(subject.model.config, "num_key_value_heads", None) or subject.n_heads
    return int(n_key_heads) * head_width(subject, 0)
