"""What the sweeps of notebooks 02 and 03 cost on a model of any size: operations counted, one factor measured.

    python -m benchmarks.cost_model      # the table of docs/scaling.md

Operations are multiply-adds times two of dense products; attention scores are left out, as prompts are short. The factor
between arithmetic and wall time is that of results/benchmarks/sweeps.csv.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from benchmarks.shapes import LLAMA_8B, REAL, Shape, random_llama
from companion.base.paths import ROOT
from companion.base.thresholds import deepest_early_layer
from companion.mediation.study import CONTROL_PAIRS, FEWEST, ROBUST, chosen_pairs
from companion.model import memory
from companion.model.architecture import find_parts
from companion.prompts.pairs import Pair, load_set, subsample

TABLES = ROOT / "results" / "benchmarks"
GPU_RATE = 10e12  # operations a second in float32 without TF32: an assumption, about half of an A100's data sheet
SHARED_AMONG_JOBS = ("layers", "untrained twin", "whole answers", "modules and heads")  # by --shards; others are not
# A batch of the shipped set in the default design, on average: 4 pairs of 44 tokens, of which all share the first 26.
BATCH = {"n_pairs": 4, "n_pos": 44, "n_shared": 26}
MODELS = {  # names of well-known models, and whether the unembedding is the embedding once more
    "SmolLM2-135M": (replace(REAL, **BATCH), True),
    "Llama-3.2-1B": (Shape(16, 2048, 8192, 32, 8, 128_256, **BATCH), True),
    "Llama-3.1-8B": (replace(LLAMA_8B, **BATCH), False),
    "Llama-3.1-70B": (Shape(80, 8192, 28_672, 64, 8, 128_256, **BATCH), False),
}


# ---- operations of one pair ----


def mlp(shape: Shape) -> float:
    """One token through one layer's MLP."""
    return 2.0 * 3 * shape.d_model * shape.d_mlp


def layer(shape: Shape) -> float:
    """One token through one layer."""
    keys = shape.d_model // shape.n_heads * shape.n_key_heads
    return 2.0 * shape.d_model * (2 * shape.d_model + 2 * keys) + mlp(shape)


def read_out(shape: Shape) -> float:
    """One residual stream against the whole vocabulary, as Y2 and `"comply": "rest"` need it."""
    return 2.0 * shape.d_model * shape.vocabulary


def climb(shape: Shape, layers: Iterable[int], tokens: int = 1, read: int = 1) -> float:
    """Some tokens through all layers above each of `layers`; in the top layer only those read pass the MLP."""
    above = [shape.n_layers - 1 - place for place in layers]
    return sum(above) * tokens * layer(shape) - sum(n > 0 for n in above) * (tokens - read) * mlp(shape)


def at_each_layer(shape: Shape, sites: int, fed: int, tokens: int = 1, read: int = 1) -> float:
    """One intervention at each of these sites of every layer; `fed` tokens of a layer pass its own MLP first."""
    reading = shape.n_layers * read * read_out(shape)
    return sites * (climb(shape, range(shape.n_layers), tokens, read) + reading) + shape.n_layers * fed * mlp(shape)


def clean(shape: Shape) -> float:
    """Both clean runs; a batch computes the tokens that all its prompts share once."""
    once = shape.n_shared / shape.n_pairs
    return shape.n_layers * layer(shape) * (2 * (shape.n_pos - shape.n_shared) + once)


def pair_operations(sweep: str, kind: str, shape: Shape, is_costly: bool = True) -> float:
    """What a sweep costs for one pair of a kind: "T1", "T2" (T2b is alike) or "B"; both directions.

    A pair differs in the first token that not all prompts share. `is_costly` is that of `Study`.
    """
    n, behind = shape.n_layers, shape.n_pos - shape.n_shared
    through = n * layer(shape)
    if sweep == "whole answers":
        decoded = 2 * ((behind + memory.ANSWER - 1) * through + memory.ANSWER * read_out(shape))
        forced = 4 * ((behind + memory.ANSWER - 1) * through + memory.ANSWER * read_out(shape))
        return decoded + forced + 4 * at_each_layer(shape, 2, 1, memory.ANSWER, memory.ANSWER)
    if sweep == "modules and heads":  # the direct effects of both modules are only read
        return clean(shape) + 2 * (2 * n * read_out(shape) + at_each_layer(shape, shape.n_heads, shape.n_heads))
    if sweep == "what is computed":  # four clean runs, and each component on the sum of three of them
        made = n * shape.n_pos * (layer(shape) + mlp(shape))
        return 2 * clean(shape) + made + 2 * at_each_layer(shape, 2, behind, behind)
    if kind == "B":
        return clean(shape) + 2 * at_each_layer(shape, 2, 1)
    plain = clean(shape) + 2 * at_each_layer(shape, 3, 1)
    if kind == "T2":  # components are read once more, with the norm frozen
        return plain + 2 * 2 * n * read_out(shape)
    some = {*range((n - 1) % 3, n, 3), deepest_early_layer(n)} if is_costly else range(n)
    return plain + 2 * (climb(shape, some, behind - 1) + len(some) * read_out(shape))


# ---- a whole design ----


@dataclass(frozen=True)
class Design:
    """Pairs by kind, and those on which the untrained twin is measured; half of T2 are twins of the other half."""

    pairs: Mapping[str, int]
    twin: Mapping[str, int]
    is_costly: bool


def design(is_costly: bool) -> Design:
    """The shipped English set as a run chooses from it: what a costly model takes unasked, or all there is."""
    chosen = chosen_pairs(load_set("english"), FEWEST if is_costly else 0)
    few = subsample(chosen, ROBUST if is_costly else CONTROL_PAIRS)
    used, twin = (Counter(_kind(p) for p in some if not is_costly or p.split != "validate") for some in (chosen, few))
    return Design(used, {kind: n for kind, n in twin.items() if kind != "B" or not is_costly}, is_costly)


def _kind(pair: Pair) -> str:
    return "B" if pair.treatment[0] == "B" else pair.treatment[:2]


def sweeps(shape: Shape, asked: Design) -> dict[str, float]:
    """Operations of each sweep on all its pairs."""

    def of(sweep: str, pairs: Mapping[str, int]) -> float:
        return sum(n * pair_operations(sweep, kind, shape, asked.is_costly) for kind, n in pairs.items())

    generation = {"T2": asked.pairs["T2"]}
    found = {"layers": of("layers", asked.pairs), "untrained twin": of("layers", asked.twin)}
    found |= {"what is computed": of("what is computed", {"T2": generation["T2"] // 2})}
    found |= {"modules and heads": of("modules and heads", generation)}
    return found | ({} if asked.is_costly else {"whole answers": of("whole answers", generation)})


def overhead() -> tuple[float, float]:
    """Wall time over arithmetic: the geometric mean over whole sweeps, and how far any measured row lies from it."""
    whole, parts = (pd.read_csv(TABLES / f"{name}.csv") for name in ("sweeps", "scaling"))
    mean = float(np.exp(np.log(whole.times_formula).mean()))
    every = pd.concat([whole, parts]).times_formula / mean
    return mean, max(every.max(), 1 / every.min())


# ---- machines ----


@dataclass(frozen=True)
class Machine:
    """Jobs that share the batches, and the operations a second that each of them sustains."""

    name: str
    jobs: int
    rate: float


def machines() -> tuple[Machine, ...]:
    """Two cores at the rate that was measured, and GPUs at the rate that is assumed."""
    core = pd.read_csv(TABLES / "sweeps.csv").rate.median()
    gpus = {"one GPU": 1, "eight GPUs": 8, "a cluster of 64": 64}
    return Machine("laptop, two cores", 1, 2 * core), *(Machine(name, n, GPU_RATE) for name, n in gpus.items())


def hours(shape: Shape, asked: Design, machine: Machine) -> float:
    """Wall time of all sweeps; what jobs cannot share waits on one of them."""
    costs = sweeps(shape, asked)
    waited = sum(cost / (machine.jobs if name in SHARED_AMONG_JOBS else 1) for name, cost in costs.items())
    return overhead()[0] * waited / machine.rate / 3600


def sizes(shape: Shape, is_tied: bool) -> tuple[float, memory.RunMemory]:
    """Parameters, and the bytes that a process keeps, as the load check counts them."""
    model = random_llama(shape, where=torch.device("meta"))
    if is_tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return sum(p.numel() for p in model.parameters()), memory.run_memory(find_parts(model, None, "", sha256="none"))


def _rounded(hours: float) -> str:
    unit, size = next(
        (unit, size) for unit, size in (("days", 24), ("h", 1), ("min", 1 / 60), ("s", 0)) if hours >= 2 * size
    )
    number = hours / (size or 1 / 3600)
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"


def table() -> list[str]:
    """The table of docs/scaling.md, what each sweep takes of the whole, and the factor."""
    default, full, names = design(True), design(False), [machine.name for machine in machines()]
    rows, below = [], []
    for name, (shape, is_tied) in MODELS.items():
        need, costs = sizes(shape, is_tied)[1], sweeps(shape, default)
        total, times = sum(costs.values()), [_rounded(hours(shape, default, machine)) for machine in machines()]
        more = sum(sweeps(shape, full).values()) / total
        cells = [name, f"{need.weights / 1e9:.1f} GB", f"{need.total / 1e9:.0f} GB", *times, f"x {more:.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
        shares = [f"{cost / total:.0%}" for cost in costs.values()]
        below.append(f"| {name} | {total:.1e} | {' | '.join(shares)} |")
    mean, factor = overhead()
    return [
        f"| model | weights | memory | {' | '.join(names)} | full design |", "| --- " * (4 + len(names)) + "|", *rows, "",
        f"| model | operations | {' | '.join(costs)} |", "| --- " * (2 + len(costs)) + "|", *below, "",
        f"Wall time = {mean:.1f} x operations / rate; every measured row lies within a factor of {factor:.1f}.",
    ]  # fmt: skip


if __name__ == "__main__":
    print(*table(), sep="\n")
