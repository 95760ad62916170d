"""Time and memory of a whole mediation study on one device, in parts that end within minutes and can be resumed.

    python -m benchmarks.gpu                          # the first GPU at the shape of an 8B Llama; without one, small
    python -m benchmarks.gpu --device cuda:1          # that GPU
    python -m benchmarks.gpu --parts heads --minutes 9
    python -m benchmarks.gpu --device cpu --shape smoke

Weights are random, and products are made without TF32. Before anything is timed, every part runs once on two pairs. That
warms the device up, and a handful of the part's interventions must equal one full forward pass each (`off_by`, beside how
much they change, `changed_by`); the gradient screen is an estimate and is warmed up only. Then each part of each batch of
pairs is timed with the device idle before and after, and its peak of memory above the model is written beside what
`companion.model.memory` plans: both clean runs, a sweep or a screen, and a read-out. On the processor nobody counts the peak.

Each part of a batch is a file in results/benchmarks/gpu/, in a folder for this card, shape, batch and these versions; no
other result is mixed in. A run that was cut off goes on where it stopped. results/benchmarks/gpu.csv sums up all folders.
Exit status: 0 all is measured, 2 a mistake in what was asked for or a difference, 3 time is up (the command to go on with
is printed; at least one part was done), 130 stopped.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from benchmarks.gpu_parts import ESTIMATED, PARTS, Row, measure_batch, peak_bytes, warm_up
from benchmarks.shapes import LLAMA_8B, SMALL_8B, SMOKE, Shape, machine, random_llama
from companion.base import device, files
from companion.base.errors import InputError
from companion.base.paths import relative, results_dir
from companion.model import memory
from companion.model.architecture import Subject, find_parts
from companion.run.cli import run_with_flags

SHAPES = {"smoke": SMOKE, "small": SMALL_8B, "8b": LLAMA_8B}
SHOWN = ["part", "pairs", "interventions", "seconds", "hooks_seconds", "times_hooks", "off_by", "peak_mib", "plan_mib"]
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Setting:
    """What is measured, where, and what is known before it starts."""

    where: torch.device
    shape: Shape
    dtype: torch.dtype
    at_once: int  # pairs in a batch
    weights: int  # bytes
    plan: int  # bytes above the weights
    conditions: Row
    folder: Path

    def file(self, part: str, first: int) -> Path:
        """The file of one part of the batch that starts at this pair."""
        return self.folder / f"{part}-{first}.json"


def main(arguments: Sequence[str]) -> int:
    """Measure what is not measured yet, and sum up."""
    options = _options(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    setting = _setting(options)
    if waiting := _waiting(setting, options.parts):
        try:
            _run(setting, waiting, deadline)
        except torch.OutOfMemoryError as error:
            kept = "what finished is kept; use a smaller --batch or --shape"
            raise InputError(f"{setting.where} ran out of memory beyond the plan; {kept}") from error
    _sum_up(setting)
    if _waiting(setting, options.parts):
        print(f"time is up; go on with: {shlex.join(['python', '-m', 'benchmarks.gpu', *arguments])}")
        return 3
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Time and memory of a mediation study.")
    parser.add_argument("--device", default="auto", help="auto (the first GPU, else the processor), cpu, cuda, cuda:N")
    parser.add_argument("--shape", choices=SHAPES, help="default: 8b on a GPU, small on the processor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--batch", type=int, default=0, help="pairs at a time; default: what a study runs at once")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no new part of a batch after this")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        raise InputError(f"--parts: unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.batch < 0:
        raise InputError(f"--batch {options.batch}: expected at least 1 pair")
    return options


def _setting(options: argparse.Namespace) -> Setting:
    """Everything that follows from names and shapes; says in one line what was taken."""
    where = device.resolve(options.device)
    name = options.shape or ("small" if where.type == "cpu" else "8b")
    shape, dtype, card = SHAPES[name], getattr(torch, options.dtype), device.facts(where)["name"]
    shapes = _subject(shape, dtype, torch.device("meta"))
    at_once = min(shape.n_pairs, options.batch or memory.pairs_at_once(shapes, shape.n_pos))
    size = f"shape {name}, {options.dtype}, {at_once} of {shape.n_pairs} pairs at a time"
    print(f"--device {options.device} is {where} ({card}); {size}", flush=True)
    sweep = memory.sweep_memory(shapes, at_once, shape.n_pos)
    plan, weights = sweep.total, memory.run_memory(shapes, copies=1).weights
    conditions = {"shape": name, "dtype": options.dtype, "at_once": at_once, **asdict(shape), **machine(where)}
    slug = re.sub(r"[^a-z0-9]+", "-", f"{card} {options.dtype} {name}".lower())
    folder = results_dir("benchmarks") / "gpu" / f"{slug}-{files.digest(conditions)[:8]}"
    return Setting(where, shape, dtype, at_once, weights, plan, conditions, folder)


def _subject(shape: Shape, dtype: torch.dtype, where: torch.device) -> Subject:
    return find_parts(random_llama(shape, dtype, where), None, "random Llama", sha256="random")


def _waiting(setting: Setting, asked: Sequence[str]) -> dict[int, list[str]]:
    """The parts without a file, by the first pair of their batch."""
    found: dict[int, list[str]] = {}
    for first in range(0, setting.shape.n_pairs, setting.at_once):
        left = [part for part in PARTS if part in asked and not setting.file(part, first).is_file()]
        if "recheck" in left and "screen" not in left and not setting.file("screen", first).is_file():
            raise InputError("the part recheck needs the part screen before it; add it to --parts")
        found |= {first: left} if left else {}
    return found


def _run(setting: Setting, waiting: dict[int, list[str]], deadline: float) -> None:
    """Warm up, compare, and measure until time is up."""
    free = memory.USABLE * device.free_memory(setting.where)
    if setting.weights + setting.plan > free:
        need = f"{setting.weights / GIB:.1f} GiB for the weights and {setting.plan / GIB:.1f} GiB for the work"
        remedy = "take another --shape or --dtype or a smaller --batch"
        raise InputError(f"{setting.where} can give {free / GIB:.1f} GiB, but this needs {need}; {remedy}")
    device.make_exact(setting.where)
    subject = _subject(setting.shape, setting.dtype, setting.where)
    wanted = [part for part in PARTS if any(part in parts for parts in waiting.values())]
    gaps = {part: warm_up(subject, setting.shape, part) for part in wanted}
    peak_bytes(setting.where, reset=True)
    held = peak_bytes(setting.where)  # the model, and the buffers that the libraries keep
    for first, parts in waiting.items():
        n_pairs = min(setting.at_once, setting.shape.n_pairs - first)
        for row in measure_batch(subject, setting.shape, first, n_pairs, parts, setting.file("screen", first)):
            peak = row.pop("peak") - held
            row |= {"peak_mib": None if setting.where.type == "cpu" else peak / MIB, "plan_mib": setting.plan / MIB}
            files.write_json(row | gaps[row["part"]] | setting.conditions, setting.file(row["part"], first))
            print(f"{row['part']} of the pairs from {first} on: {row['seconds']:.2f} s", flush=True)
            if time.monotonic() > deadline:
                return


def _sum_up(setting: Setting) -> None:
    """Write the table of all folders; print that of this one, and whether memory went as planned."""
    folders = sorted({file.parent for file in setting.folder.parent.glob("*/*.json")})
    tables = {folder: _table(folder) for folder in folders}
    place = results_dir("benchmarks") / "gpu.csv"
    files.write_table(pd.concat(tables.values()), place)
    own = tables[setting.folder]
    print(own[SHOWN].to_string(index=False, na_rep="-"))
    exact = own[~own.part.isin(ESTIMATED)]
    ratio = f"plain hooks {exact.hooks_seconds.sum() / exact.seconds.sum():.0f} times as long; " if len(exact) else ""
    print(f"all parts: {own.seconds.sum():.1f} s; {ratio}all results: {relative(place)}")
    print(f"memory: {memory_said(own)}")


def _table(folder: Path) -> pd.DataFrame:
    """One row for each part of a folder: pairs and seconds of all its batches, and the worst of all else."""
    rows = pd.DataFrame([files.read_json(file) for file in folder.glob("*.json")])
    rows = rows.drop(columns=["first_pair", "found"]).astype({"peak_mib": float})
    summed = dict.fromkeys(("pairs", "seconds", "hooks_seconds"), "sum")
    worst = dict.fromkeys(("interventions", "peak_mib", "plan_mib", "off_by", "changed_by"), "max")
    same = {name: "first" for name in rows if name not in {"part", *summed, *worst}}
    table = rows.groupby("part").agg(summed | worst | same).reset_index()
    table = table.sort_values("part", key=lambda part: part.map(PARTS.index), ignore_index=True)
    table.insert(4, "times_hooks", table.hooks_seconds / table.seconds)
    return table


def memory_said(table: pd.DataFrame) -> str:
    """Whether any part took more than its plan, and by how much.

    >>> memory_said(pd.DataFrame({"part": ["heads", "screen"], "peak_mib": [1.0, 3.5], "plan_mib": [2.0, 2.0]}))
    'screen took 3.50 MiB, 1.50 more than its plan of 2.00; every other part stayed within its plan'
    """
    if table.peak_mib.isna().all():
        return "nobody counts the peak on the processor"
    above = table[table.peak_mib > table.plan_mib]
    over = [
        f"{part} took {peak:.2f} MiB, {peak - plan:.2f} more than its plan of {plan:.2f}"
        for part, peak, plan in zip(above.part, above.peak_mib, above.plan_mib, strict=True)
    ]
    if len(over) < len(table):
        over.append(f"every {'other part' if over else 'part'} stayed within its plan")
    return "; ".join(over)


if __name__ == "__main__":
    sys.exit(run_with_flags("benchmarks.gpu", main, sys.argv[1:]))
