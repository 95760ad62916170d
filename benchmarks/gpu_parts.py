"""The parts of the study of `benchmarks.gpu`, for one batch of pairs."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from benchmarks.shapes import Shape, prompts
from companion.model import activations, readout, reference, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.neurons import closed_form
from companion.neurons.screening import attribution

PARTS = ("layers-and-modules", "heads", "position-groups", "last-layer-neurons", "screen", "recheck")
SITES = ("resid_post", "attn_out", "mlp_out")
RECHECKED = 500
GIB = 2**30

Neurons = list[tuple[int, int]]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some pairs with both clean runs, and the two vocabulary rows whose logits are compared."""

    subject: Subject
    base: CleanRun
    source: CleanRun
    rows: Int[Tensor, "row"]


@dataclass(frozen=True)
class Measured:
    """Seconds, and GiB at the peak above the model's weights, clean runs included (0 without a GPU)."""

    seconds: float
    peak_gib: float


def make_batch(subject: Subject, shape: Shape, first_pair: int, n_pairs: int) -> Batch:
    """Both clean runs; the first eighth of the two prompts, a system prompt, is the same."""
    control, treated = prompts(shape, "random")
    treated[:, : shape.n_pos // 8] = control[:, : shape.n_pos // 8]
    chosen = slice(first_pair, first_pair + n_pairs)
    base, source = (activations.clean_run(subject, tokens[chosen].to(subject.device)) for tokens in (control, treated))
    return Batch(subject, base, source, torch.tensor([0, 1], device=subject.device))


def run_part(batch: Batch, part: str, screened: Neurons) -> Neurons:
    """Computes one part; the screen returns the neurons that `recheck` is to be given."""
    if part == "last-layer-neurons":
        closed_form.last_layer_log_probs(batch.subject, batch.base, batch.source, batch.rows)
    elif part == "screen":
        return _screen(batch)
    else:
        _interchange(batch, patches(batch, part, screened))
    return []


def n_interventions(batch: Batch, part: str, screened: Neurons) -> int:
    """How many interventions a part stands for."""
    subject = batch.subject
    counted = {"last-layer-neurons": subject.d_mlp, "screen": subject.n_layers * subject.d_mlp}
    return counted[part] if part in counted else len(patches(batch, part, screened))


def patches(batch: Batch, part: str, screened: Neurons) -> list[Patch]:
    """The interventions of a part that runs on the grid."""
    layers, last = range(batch.subject.n_layers), _last(batch)
    if part == "heads":
        return [Patch("head", layer, last, head) for layer in layers for head in range(batch.subject.n_heads)]
    if part == "recheck":
        return [Patch("neuron", layer, last, neuron) for layer, neuron in screened]
    masks = [last] if part == "layers-and-modules" else _groups(batch)
    return [Patch(site, layer, mask) for mask in masks for layer in layers for site in SITES]


def seconds_of_one_forward(batch: Batch) -> float:
    """One intervention by hooks: a full forward pass over this batch, the median of three."""
    patch = Patch("mlp_out", batch.subject.n_layers // 2, _last(batch))

    def forward() -> None:
        _log_odds(batch, reference.interchange_full_forward(batch.subject, batch.base, batch.source, [patch]))

    return sorted(measured(batch.subject, forward)[1].seconds for _ in range(3))[1]


def measured(subject: Subject, run: Callable[[], T]) -> tuple[T, Measured]:
    """Runs it once, the device idle before and after; its result comes with the measurement."""
    is_gpu = subject.device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = _now(is_gpu)
    result = run()
    seconds = _now(is_gpu) - start
    weights = sum(p.numel() * p.itemsize for p in subject.model.parameters())
    return result, Measured(seconds, (torch.cuda.max_memory_allocated() - weights) / GIB if is_gpu else 0.0)


def _interchange(batch: Batch, chosen: Sequence[Patch]) -> Float[Tensor, "pair patch read"]:
    return replay.interchange(
        batch.subject, batch.base, batch.source, chosen, readout=lambda resid: _log_odds(batch, resid)
    )


def _screen(batch: Batch) -> Neurons:
    """Layer and index of the neurons with the largest gradient estimate, summed over the batch."""
    weight = batch.subject.unembedding[0][batch.rows]

    def contrast(resid: Tensor) -> Tensor:
        logits = batch.subject.final_norm(resid) @ weight.T
        return logits[:, 0] - logits[:, 1]

    estimate = attribution(batch.subject, batch.base, batch.source, contrast).sum(0).abs().flatten()
    best = estimate.topk(min(RECHECKED, len(estimate))).indices.tolist()
    return [divmod(i, batch.subject.d_mlp) for i in best]


def _log_odds(batch: Batch, resid: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    logits = readout.logits(batch.subject, resid, batch.rows)
    return logits[..., 0] - logits[..., 1]


def _last(batch: Batch) -> Bool[Tensor, "pair pos"]:
    n_pos = batch.base.tokens.shape[1]
    return _between(batch, n_pos - 1, n_pos)


def _groups(batch: Batch) -> list[Bool[Tensor, "pair pos"]]:
    """System prompt, wrapper, request, template behind it."""
    n = batch.base.tokens.shape[1]
    return [_between(batch, start, end) for start, end in itertools.pairwise((0, n // 8, n // 2, 7 * n // 8, n - 1))]


def _between(batch: Batch, start: int, end: int) -> Bool[Tensor, "pair pos"]:
    mask = torch.zeros_like(batch.base.tokens, dtype=torch.bool)
    mask[:, start:end] = True
    return mask


def _now(is_gpu: bool) -> float:
    if is_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()
