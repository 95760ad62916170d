"""The least arithmetic that an exact answer needs on the grid, in seconds of dense matrix products on this machine."""

import time

import torch

from benchmarks.shapes import STEPS, Job, Shape, Workload
from companion.base.device import HOST, synchronize


def product_rate(
    shape: Shape, where: torch.device = HOST, dtype: torch.dtype = torch.float32, seconds: float = 1.0
) -> float:
    """Measured multiply-adds times two a second, for the MLP's product on two thousand rows: what this machine can do."""
    rows = torch.randn(2000, shape.d_model, device=where, dtype=dtype)
    weight = torch.randn(shape.d_mlp, shape.d_model, device=where, dtype=dtype)
    best, spent = 0.0, 0.0
    while spent < seconds:
        start = time.perf_counter()
        for _ in range(5):
            torch.nn.functional.linear(rows, weight)
        synchronize(where)
        took = time.perf_counter() - start
        best, spent = max(best, 5 * 2 * rows.shape[0] * weight.numel() / took), spent + took
    return best


def minimal_operations(shape: Shape, workload: Workload) -> float:
    """Floating-point operations of the cells that change, of what is read, and nothing else; attention scores not counted.

    What lies before a patch, such as the prefix that real pairs share, cannot change and is not counted.
    """
    rows = shape.vocabulary if workload.log_prob else 2
    if workload.name.startswith("all neurons of the last"):  # the table of neurons by rows serves every pair
        return 2.0 * shape.d_model * rows * (shape.d_mlp + shape.n_pairs)
    reads = STEPS if workload.answer else 1
    read = 2.0 * shape.d_model * rows * reads
    return shape.n_pairs * sum(_own_layer(shape, job) + _above(shape, job, reads) + read for job in workload.jobs)


def _own_layer(shape: Shape, job: Job) -> float:
    """The MLP behind an edited attention output, at the patched positions."""
    return len(job.positions) * _mlp(shape) if job.site in ("attn_out", "head") else 0.0


def _above(shape: Shape, job: Job, reads: int) -> float:
    """Full layers on all later positions; at the top all positions give keys and values, those that are read go on."""
    tokens, layers = shape.n_pos + reads - 1 - job.positions[0], shape.n_layers - 1 - job.layer
    if layers == 0:
        return 0.0
    attention = 2.0 * shape.d_model**2 * 2  # queries and output
    keys = 2.0 * shape.d_model * _key_width(shape) * 2
    whole = tokens * (attention + keys + _mlp(shape))
    return (layers - 1) * whole + tokens * keys + reads * (attention + _mlp(shape))


def _mlp(shape: Shape) -> float:
    return 2.0 * 3 * shape.d_model * shape.d_mlp


def _key_width(shape: Shape) -> int:
    return shape.d_model // shape.n_heads * shape.n_key_heads
