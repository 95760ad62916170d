"""How the cost of exact interventions grows with pairs, layers, positions, neurons and tokens, beside the
arithmetic bound.

    python -m benchmarks.scaling                  # around the quoted shape; some minutes on one core
    python -m benchmarks.scaling --shape smoke    # seconds

One size varies at a time. Results: results/benchmarks/scaling.csv and a figure.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pandas as pd

from benchmarks import bound, draw
from benchmarks.shapes import SITES, Job, Shape, Workload, asked, machine, prompts, random_llama
from benchmarks.tools import companion, setting_for
from companion.base.display import progress
from companion.model.architecture import find_parts


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every size and writes table and figure."""
    shape, ending = asked("benchmarks.scaling", "Cost of exact interventions against size.", arguments)
    rate = bound.product_rate(shape)
    rows = [_measure(*point, rate) for point in progress(list(_points(shape)), "sizes")]
    table = pd.DataFrame(rows).assign(**machine(), shape=ending.strip("_") or "quoted")
    table["times_bound"] = table.seconds / table.bound
    print(table[["factor", "size", "seconds", "bound", "times_bound"]].to_string(index=False))
    draw.save_scaling(table, f"scaling{ending}")


def _points(shape: Shape) -> Iterator[tuple[str, int, Shape, tuple[Job, ...]]]:
    for n_pairs in (shape.n_pairs // 4 or 1, shape.n_pairs, 4 * shape.n_pairs):
        other = replace(shape, n_pairs=n_pairs)
        yield "pairs", n_pairs, other, _at(other, 1)
    for n_layers in (shape.n_layers // 2, shape.n_layers, 2 * shape.n_layers):
        other = replace(shape, n_layers=n_layers)
        yield "layers", n_layers, other, _at(other, 1)
    for n_positions in (1, 4, min(16, shape.n_pos)):
        yield "patched positions", n_positions, shape, _at(shape, n_positions)
    for n_neurons in (16, 64, 256):
        neurons = range(min(n_neurons, shape.d_mlp))
        jobs = tuple(Job("neuron", shape.n_layers // 2, shape.n_pos - 1, neuron) for neuron in neurons)
        yield "neurons of a middle layer", len(jobs), shape, jobs
    for n_pos in (shape.n_pos // 2, shape.n_pos, 4 * shape.n_pos):
        other = replace(shape, n_pos=n_pos)
        yield "tokens in the prompt", n_pos, other, _at(other, 1)


def _at(shape: Shape, n_positions: int) -> tuple[Job, ...]:
    """Layers and modules at evenly spread positions, the last among them."""
    positions = [shape.n_pos - 1 - i * shape.n_pos // n_positions for i in range(n_positions)]
    return tuple(Job(site, layer, p) for p in positions for layer in range(shape.n_layers) for site in SITES)


def _measure(factor: str, size: int, shape: Shape, jobs: tuple[Job, ...], rate: float) -> dict[str, object]:
    """The better of two runs; both clean runs are given."""
    subject = find_parts(random_llama(shape), None, "scaling", sha256="not hashed")
    setting = setting_for(subject, *prompts(shape, "random"), log_prob=True)
    run, seconds = companion(setting), []
    for _ in range(2):
        start = time.perf_counter()
        run(jobs)
        seconds.append(time.perf_counter() - start)
    least = bound.minimal_operations(shape, Workload(factor, jobs)) / rate
    return {"factor": factor, "size": size, "interventions": len(jobs), "seconds": min(seconds), "bound": least}


if __name__ == "__main__":
    main()
