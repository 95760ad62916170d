"""The parts of the study of `benchmarks.gpu`: each is compared once with plain forward passes, and timed batch by batch."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.shapes import SITES, Shape, prompts
from companion.base import device, files
from companion.base.errors import InputError
from companion.model import activations, readout, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.model.verify import TOLERANCE
from companion.neurons import closed_form
from companion.neurons.screening import attribution

PARTS = ("clean-runs", "layers-and-modules", "heads", "position-groups", "last-layer-neurons", "screen", "recheck")
ESTIMATED = ("clean-runs", "screen")  # they make no exact intervention that a forward pass could be compared with
RECHECKED, HANDFUL, WARM_PAIRS = 500, 5, 2

Neurons = Sequence[tuple[int, int]]  # layer and index
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some pairs with both clean runs; the logits of the first two vocabulary rows are compared."""

    subject: Subject
    base: CleanRun
    source: CleanRun

    @property
    def rows(self) -> Tensor:
        """The two vocabulary rows."""
        return torch.arange(2, device=self.base.tokens.device)

    def between(self, start: int, end: int) -> Tensor:
        """These positions, as a mask of all tokens."""
        mask = torch.zeros_like(self.base.tokens, dtype=torch.bool)
        mask[:, start:end] = True
        return mask


def make_batch(subject: Subject, shape: Shape, first: int, n_pairs: int) -> Batch:
    """Both clean runs; the first eighth of the two prompts, a system prompt, is the same."""
    control, treated = prompts(shape, "random")
    treated[:, : shape.n_pos // 8] = control[:, : shape.n_pos // 8]
    both = (tokens[first : first + n_pairs].to(subject.device) for tokens in (control, treated))
    return Batch(subject, *(activations.clean_run(subject, tokens) for tokens in both))


def patches(batch: Batch, part: str, screened: Neurons) -> list[Patch]:
    """The interventions that a part stands for; those of a screen or of clean runs are none."""
    subject, n = batch.subject, batch.base.tokens.shape[1]
    layers, last, masks = range(subject.n_layers), batch.between(n - 1, n), list[Tensor]()
    if part == "heads":
        return [Patch("head", layer, last, head) for layer in layers for head in range(subject.n_heads)]
    if part == "last-layer-neurons":
        screened = [(layers[-1], neuron) for neuron in range(subject.d_mlp)]
    if part in ("last-layer-neurons", "recheck"):
        return [Patch("neuron", layer, last, neuron) for layer, neuron in screened]
    if part == "layers-and-modules":
        masks = [last]
    if part == "position-groups":  # system prompt, wrapper, request, the template behind it
        ends = itertools.pairwise((0, n // 8, n // 2, 7 * n // 8, n - 1))
        masks = [batch.between(start, end) for start, end in ends if start < end]
    return [Patch(site, layer, mask) for mask in masks for layer in layers for site in SITES]


def run_part(batch: Batch, part: str, chosen: Sequence[Patch]) -> Neurons:
    """Compute one part; the screen returns the neurons that `recheck` is to be given."""
    runs = batch.subject, batch.base, batch.source
    if part == "last-layer-neurons":
        closed_form.last_layer_neurons(*runs, batch.rows)
    elif part == "screen":
        best = attribution(*runs, partial(_contrast, batch)).sum(0).abs().flatten()
        return [divmod(i, batch.subject.d_mlp) for i in best.topk(min(RECHECKED, len(best))).indices.tolist()]
    else:
        replay.interchange(*runs, chosen, readout=lambda resid: readout.logits(batch.subject, resid, batch.rows))
    return []


def _contrast(batch: Batch, resid: Float[Tensor, "pair d"]) -> Float[Tensor, "pair"]:
    logits = batch.subject.final_norm(resid) @ batch.subject.unembedding[0][batch.rows].T
    return logits[:, 0] - logits[:, 1]


def warm_up(subject: Subject, shape: Shape, part: str) -> Row:
    """Run a part on two pairs, and hold a handful of its interventions equal to one full forward pass each.

    Returns the largest difference, and the largest change by an intervention, as shares of the largest value. Raises
    InputError for a difference beyond the tolerance that every model is checked with.
    """
    batch = make_batch(subject, shape, 0, min(WARM_PAIRS, shape.n_pairs))
    found = patches(batch, part, [(layer, layer % subject.d_mlp) for layer in range(subject.n_layers)])
    chosen = random.Random(0).sample(found, min(HANDFUL, len(found)))
    if part != "clean-runs":
        run_part(batch, part, chosen)
    if part in ESTIMATED:
        return {"off_by": None, "changed_by": None}
    runs = subject, batch.base, batch.source
    plain = replay.interchange_full_forward(*runs, chosen)
    clean = batch.base.resid_post[-1][:, None, -1:]
    if part == "last-layer-neurons":
        got = closed_form.last_layer_neurons(*runs, batch.rows)[:, [patch.index for patch in chosen], None]
        plain, clean = (readout.logits(subject, resid, batch.rows) for resid in (plain, clean))
    else:
        got = replay.interchange(*runs, chosen)
    largest, allowed = float(plain.abs().max()), TOLERANCE[subject.dtype]
    off, change = (float((other - plain).abs().max()) / largest for other in (got, clean))
    if not off <= allowed:
        raise InputError(
            f"{part} on {subject.device}: interventions are off by {off:.1e} of the largest value from one full forward "
            f"pass each, and {allowed:.0e} is allowed; nothing was timed"
        )
    return {"off_by": off, "changed_by": change}


def peak_bytes(where: torch.device, *, reset: bool = False) -> int:
    """The most bytes that tensors took on a GPU since the last reset; 0 on the processor, where nobody counts."""
    if where.type == "cpu":
        return 0
    module = torch.get_device_module(where)
    found = int(module.max_memory_allocated(where))
    if reset:
        module.reset_peak_memory_stats(where)
    return found


def measured(where: torch.device, run: Callable[[], T]) -> tuple[T, Row]:
    """The result, with the seconds from idle to idle and the most bytes that the device held meanwhile."""
    device.synchronize(where)
    peak_bytes(where, reset=True)
    start = time.perf_counter()
    result = run()
    device.synchronize(where)
    return result, {"seconds": time.perf_counter() - start, "peak": peak_bytes(where)}


def measure_batch(
    subject: Subject, shape: Shape, first: int, n_pairs: int, parts: Sequence[str], screen: Path
) -> Iterator[Row]:
    """A row for each of these parts, of which recheck reads the screen's file; the batch is given up at the end."""
    where = subject.device
    batch, made = measured(where, partial(make_batch, subject, shape, first, n_pairs))
    common: Row = {"first_pair": first, "pairs": n_pairs, "found": []}
    if "clean-runs" in parts:
        yield {**common, "part": "clean-runs", "interventions": 0, "hooks_seconds": 0.0, **made}
    one = patches(batch, "layers-and-modules", [])[len(SITES) * (subject.n_layers // 2) + SITES.index("mlp_out")]
    plain = partial(replay.interchange_full_forward, subject, batch.base, batch.source, [one])
    each = statistics.median(measured(where, plain)[1]["seconds"] for _ in range(3))
    for part in parts:
        if part == "clean-runs":
            continue
        chosen = patches(batch, part, files.read_json(screen)["found"] if part == "recheck" else [])
        found, numbers = measured(where, partial(run_part, batch, part, chosen))
        n = subject.n_layers * subject.d_mlp if part == "screen" else len(chosen)
        yield {
            **common, "part": part, "interventions": n, "hooks_seconds": len(chosen) * each, "found": found, **numbers
        }  # fmt: skip
