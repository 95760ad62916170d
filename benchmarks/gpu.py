"""Time and memory of a whole mediation study on one device, part by part.

    python -m benchmarks.gpu                          # the first GPU at the shape of an 8B Llama; without one, small
    python -m benchmarks.gpu --device cuda:1 --parts heads screen
    python -m benchmarks.gpu --device cpu --shape smoke

Weights are random, and products are made without TF32. Before anything is timed, every part runs once on two pairs. That
warms the device up, and a handful of the part's interventions must equal one full forward pass each (`off_by`, beside how
much they change, `changed_by`); the gradient screen is an estimate and is warmed up only. Then each part of each batch of
pairs is timed with the device idle before and after, and its peak of memory above the model is written beside what
`companion.model.memory` plans: both clean runs, a sweep or a screen, and a read-out. On the processor nobody counts the peak.

results/benchmarks/gpu.csv is written after every batch of pairs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.shapes import LLAMA_8B, SITES, SMALL_8B, SMOKE, Shape, machine, prompts, random_llama
from companion.base import device, files
from companion.base.errors import InputError
from companion.base.paths import results_dir
from companion.model import activations, memory, readout, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject, find_parts
from companion.model.interventions import Patch
from companion.model.verify import TOLERANCE
from companion.neurons import closed_form
from companion.neurons.screening import attribution
from companion.run.cli import run_with_flags

SHAPES = {"smoke": SMOKE, "small": SMALL_8B, "8b": LLAMA_8B}
PARTS = ("clean-runs", "layers-and-modules", "heads", "last-layer-neurons", "screen")
ESTIMATED = ("clean-runs", "screen")  # they make no exact intervention that a forward pass could be compared with
HANDFUL, WARM_PAIRS = 5, 2
MIB, GIB = 2**20, 2**30

Row = dict[str, Any]
Runs = tuple[Subject, CleanRun, CleanRun]
T = TypeVar("T")


def main(arguments: Sequence[str]) -> int:
    """Warm up and compare, measure batch by batch, and write and print the table."""
    options = _options(arguments)
    where = device.resolve(options.device)
    name = options.shape or ("small" if where.type == "cpu" else "8b")
    shape, dtype = SHAPES[name], getattr(torch, options.dtype)
    subject = _subject(shape, dtype, torch.device("meta"))
    at_once = min(shape.n_pairs, options.batch or memory.pairs_at_once(subject, shape.n_pos))
    size = f"shape {name}, {options.dtype}, {at_once} of {shape.n_pairs} pairs at a time"
    print(f"--device {options.device} is {where} ({device.facts(where)['name']}); {size}", flush=True)
    plan, weights = (
        memory.sweep_memory(subject, at_once, shape.n_pos).total,
        memory.run_memory(subject, copies=1).weights,
    )
    free = memory.USABLE * device.free_memory(where)
    if weights + plan > free:
        need = f"{weights / GIB:.1f} GiB for the weights and {plan / GIB:.1f} GiB for the work"
        remedy = "take another --shape or --dtype or a smaller --batch"
        raise InputError(f"{where} can give {free / GIB:.1f} GiB, but this needs {need}; {remedy}")
    device.make_exact(where)
    try:
        subject = _subject(shape, dtype, where)
        gaps = {part: warm_up(subject, shape, part) for part in options.parts}
        peak_bytes(where, reset=True)
        held, rows = peak_bytes(where), []  # the model, and the buffers that the libraries keep
        for first in range(0, shape.n_pairs, at_once):
            for row in measure_batch(subject, shape, first, min(at_once, shape.n_pairs - first), options.parts):
                row["peak_mib"] = None if where.type == "cpu" else (row["peak"] - held) / MIB
                rows.append(row | gaps[row["part"]] | {"plan_mib": plan / MIB})
                print(f"{row['part']} of the pairs from {first} on: {row['seconds']:.2f} s", flush=True)
            table = _table(rows)
            facts = {"shape": name, "dtype": options.dtype, "at_once": at_once, **machine(where)}
            files.write_table(table.assign(**facts), results_dir("benchmarks") / "gpu.csv")
    except torch.OutOfMemoryError as error:
        raise InputError(f"{where} ran out of memory beyond the plan; use a smaller --batch or --shape") from error
    print(table.to_string(index=False, na_rep="-"))
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Time and memory of a mediation study.")
    parser.add_argument("--device", default="auto", help="auto (the first GPU, else the processor), cpu, cuda, cuda:N")
    parser.add_argument("--shape", choices=SHAPES, help="default: 8b on a GPU, small on the processor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batch", type=int, default=0, help="pairs at a time; default: what a study runs at once")
    options = parser.parse_args(arguments)
    options.parts = [part for part in PARTS if part in options.parts]
    return options


def _subject(shape: Shape, dtype: torch.dtype, where: torch.device) -> Subject:
    return find_parts(random_llama(shape, dtype, where), None, "random Llama", sha256="random")


def _table(rows: Sequence[Row]) -> pd.DataFrame:
    """One row for each part: pairs and seconds of all its batches, and the worst of all else."""
    summed = dict.fromkeys(("pairs", "seconds", "hooks_seconds"), "sum")
    worst = dict.fromkeys(("interventions", "off_by", "changed_by", "peak_mib", "plan_mib"), "max")
    table = pd.DataFrame(rows).astype({"peak_mib": float})
    table = table.groupby("part", sort=False).agg(summed | worst).reset_index()
    return table.assign(times_hooks=table.hooks_seconds / table.seconds)


# ---- parts ----


def make_batch(subject: Subject, shape: Shape, first: int, n_pairs: int) -> Runs:
    """A model and both clean runs; the first eighth of the two prompts, a system prompt, is the same."""
    control, treated = prompts(shape, "random")
    treated[:, : shape.n_pos // 8] = control[:, : shape.n_pos // 8]
    both = [tokens[first : first + n_pairs].to(subject.device) for tokens in (control, treated)]
    return subject, activations.clean_run(subject, both[0]), activations.clean_run(subject, both[1])


def patches(runs: Runs, part: str) -> list[Patch]:
    """The interventions that a part stands for, all at the last token; those of a screen or of clean runs are none."""
    subject, base, _ = runs
    layers, last = range(subject.n_layers), torch.zeros_like(base.tokens, dtype=torch.bool)
    last[:, -1] = True
    if part == "layers-and-modules":
        return [Patch(site, layer, last) for layer in layers for site in SITES]
    if part == "heads":
        return [Patch("head", layer, last, head) for layer in layers for head in range(subject.n_heads)]
    if part == "last-layer-neurons":
        return [Patch("neuron", layers[-1], last, neuron) for neuron in range(subject.d_mlp)]
    return []


def run_part(runs: Runs, part: str, chosen: Sequence[Patch]) -> Tensor:
    """Compute one part: what was patched (or all neurons), read as the logits of the first two vocabulary rows."""
    subject, rows = runs[0], torch.arange(2, device=runs[0].device)

    def contrast(resid: Float[Tensor, "pair d"]) -> Float[Tensor, "pair"]:
        logits = subject.final_norm(resid) @ subject.unembedding[0][rows].T
        return logits[:, 0] - logits[:, 1]

    if part == "screen":
        return attribution(*runs, contrast)
    if part == "last-layer-neurons":
        return closed_form.last_layer_neurons(*runs, rows)[:, [patch.index for patch in chosen], None]
    return replay.interchange(*runs, chosen, readout=lambda resid: readout.logits(subject, resid, rows))


def warm_up(subject: Subject, shape: Shape, part: str) -> Row:
    """Run a part on two pairs, and hold a handful of its interventions equal to one full forward pass each.

    Returns the largest difference, and the largest change by an intervention, as shares of the largest value. Raises
    InputError for a difference beyond the tolerance that every model is checked with.
    """
    runs = make_batch(subject, shape, 0, min(WARM_PAIRS, shape.n_pairs))
    found = patches(runs, part)
    chosen = random.Random(0).sample(found, min(HANDFUL, len(found)))
    got = run_part(runs, part, chosen) if part != "clean-runs" else None
    if part in ESTIMATED or got is None:
        return {"off_by": None, "changed_by": None}
    both = (replay.interchange_full_forward(*runs, chosen), runs[1].resid_post[-1][:, None, -1:])
    rows = torch.arange(2, device=subject.device)
    plain, clean = (readout.logits(subject, resid, rows) for resid in both)
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


def measure_batch(subject: Subject, shape: Shape, first: int, n_pairs: int, parts: Sequence[str]) -> Iterator[Row]:
    """A row for each of these parts; `hooks_seconds` is what as many full forward passes would take."""
    runs, made = measured(subject.device, partial(make_batch, subject, shape, first, n_pairs))
    one = patches(runs, "layers-and-modules")[len(SITES) * (subject.n_layers // 2) + SITES.index("mlp_out")]
    plain = partial(replay.interchange_full_forward, *runs, [one])
    each = statistics.median(measured(subject.device, plain)[1]["seconds"] for _ in range(3))
    for part in parts:
        chosen = patches(runs, part)
        if part != "clean-runs":
            _, made = measured(subject.device, partial(run_part, runs, part, chosen))
        n = subject.n_layers * subject.d_mlp if part == "screen" else len(chosen)
        yield {"part": part, "pairs": n_pairs, "interventions": n, "hooks_seconds": len(chosen) * each, **made}


if __name__ == "__main__":
    sys.exit(run_with_flags("benchmarks.gpu", main, sys.argv[1:]))
