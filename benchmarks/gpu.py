"""A whole mediation study at the shape of an 8B Llama, in parts that each end within minutes and can be resumed.

    python -m benchmarks.gpu                            # one GPU: 32 layers, d 4096, 128 pairs of 64 tokens python
    -m benchmarks.gpu --device cpu               # no GPU: the same proportions, small python -m benchmarks.gpu
    --parts heads --minutes 9

Weights are random bfloat16, computed in float32 without TF32 (`--dtype bfloat16` computes in bfloat16). Every part
and batch of pairs writes one file as soon as it is done, so a run that was cut off goes on where it stopped;
`--minutes` ends one run between two batches. Results: results/benchmarks/gpu/ and results/benchmarks/gpu.csv.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from benchmarks.gpu_parts import (
    PARTS,
    Batch,
    Measured,
    make_batch,
    measured,
    n_interventions,
    run_part,
    seconds_of_one_forward,
)
from benchmarks.shapes import LLAMA_8B, SMALL_8B, Shape, machine, random_llama
from companion.base import files
from companion.base.errors import InputError
from companion.base.paths import results_dir
from companion.model.architecture import find_parts


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is not done yet, and sums up."""
    options = _options(arguments)
    device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    shape = LLAMA_8B if device != "cpu" else SMALL_8B
    folder = results_dir("benchmarks") / "gpu" / f"{device.split(':')[0]}-{options.dtype}"
    deadline = time.monotonic() + 60 * options.minutes
    waiting = [
        (first_pair, part)
        for first_pair in range(0, shape.n_pairs, options.batch)
        for part in options.parts.split(",")
        if not (folder / f"{part}-{first_pair}.json").is_file()
    ]
    if waiting:
        _run(waiting, shape, device, options, folder, deadline)
    _sum_up(folder)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description="A mediation study at the shape of an 8B model."
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--batch", type=int, default=32, help="pairs at a time (default 32)")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no new batch after this")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return options


def _run(
    waiting: list[tuple[int, str]],
    shape: Shape,
    device: str,
    options: argparse.Namespace,
    folder: Path,
    deadline: float,
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = random_llama(shape, torch.bfloat16, device).to(getattr(torch, options.dtype))
    subject = find_parts(model, None, "8B shape", sha256="random")
    for first_pair, group in itertools.groupby(waiting, key=lambda item: item[0]):
        n_pairs = min(options.batch, shape.n_pairs - first_pair)
        batch, clean = measured(subject, partial(make_batch, subject, shape, first_pair, n_pairs))
        _write(folder, "clean", first_pair, n_pairs, 0, clean, 0.0, [])
        each = seconds_of_one_forward(batch)
        for _, part in group:
            if time.monotonic() > deadline:
                print("time is up; run the same command again to go on", flush=True)
                sys.exit(3)
            _run_part(folder, batch, part, first_pair, each)


def _run_part(folder: Path, batch: Batch, part: str, first_pair: int, seconds_each: float) -> None:
    screen = folder / f"screen-{first_pair}.json"
    if part == "recheck" and not screen.is_file():
        raise InputError("the part recheck needs the part screen before it; add it to --parts")
    screened = [(layer, neuron) for layer, neuron in files.read_json(screen)["found"]] if part == "recheck" else []
    found, result = measured(batch.subject, partial(run_part, batch, part, screened))
    n = n_interventions(batch, part, screened)
    # Nobody would screen by one forward pass a neuron, so the gradient screen is not compared.
    hooks = 0.0 if part == "screen" else n * seconds_each
    _write(folder, part, first_pair, len(batch.base.tokens), n, result, hooks, found)


def _write(
    folder: Path,
    part: str,
    first_pair: int,
    pairs: int,
    interventions: int,
    result: Measured,
    hooks_seconds: float,
    found: list[tuple[int, int]],
) -> None:
    row = {
        "part": part, "pairs": pairs, "interventions": interventions, "seconds": result.seconds,
        "peak_gib": result.peak_gib, "hooks_seconds": hooks_seconds, "found": found, **machine(),
    }  # fmt: skip
    files.write_json(row, folder / f"{part}-{first_pair}.json")
    print(f"{part} {first_pair}: {result.seconds:.2f} s, peak {result.peak_gib:.1f} GiB above the model", flush=True)


def _sum_up(folder: Path) -> None:
    rows = pd.DataFrame([files.read_json(file) for file in sorted(folder.glob("*-*.json"))])
    keys = ["gpu", "processor", "threads", "torch", "transformers"]
    table = rows.groupby(["part", *keys], sort=False).agg(
        pairs=("pairs", "sum"), interventions=("interventions", "max"), seconds=("seconds", "sum"),
        peak_gib=("peak_gib", "max"), hooks_seconds=("hooks_seconds", "sum"),
    ).reset_index()  # fmt: skip
    table["times_hooks"] = table.hooks_seconds / table.seconds
    files.write_table(table, results_dir("benchmarks") / f"gpu_{folder.name}.csv")
    print(
        table[["part", "pairs", "interventions", "seconds", "peak_gib", "hooks_seconds", "times_hooks"]].to_string(
            index=False
        )
    )
    ratio = table.hooks_seconds.sum() / table.seconds[table.part != "screen"].sum()
    print(
        f"all parts: {table.seconds.sum():.1f} s for {table.pairs.max()} pairs; plain hooks {ratio:.0f} times as long"
    )


if __name__ == "__main__":
    main()
