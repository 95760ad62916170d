"""How the cost of exact interventions grows with layers, positions, the shared prefix, pairs, neurons and vocabulary.

    python -m benchmarks.scaling                  # around the quoted shape; some minutes on one core
    python -m benchmarks.scaling --shape smoke    # seconds

One size varies at a time. Each intervention is read against the whole vocabulary. Results: results/benchmarks/scaling.csv and
a figure, with the cost model's line; its factor comes from sweeps.csv, so `benchmarks.sweeps` is run first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pandas as pd
import torch

from benchmarks import bound, cost_model, draw, sweeps
from benchmarks.shapes import SITES, Shape, asked, machine
from companion.base.display import progress
from companion.mediation import estimands, outcomes
from companion.mediation.study import Study
from companion.model import replay
from companion.model.interventions import Patch, position_mask

# What varies and its size; what is timed, made ready from a batch; and the operations that are counted.
Point = tuple[str, int, Shape, Callable[[Study], Callable[[], object]], float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every size and writes table and figure."""
    shape, ending = asked("benchmarks.scaling", "Cost of exact interventions against size.", arguments)
    rate = bound.product_rate(shape)
    rows = [_measured(*point) for point in progress(list(_points(shape)), "sizes")]
    table = pd.DataFrame(rows).assign(rate=rate, **machine(), shape=ending.strip("_") or "quoted")
    table["times_formula"] = table.seconds * rate / table.operations
    print(table[["factor", "size", "seconds", "times_formula"]].to_string(index=False))
    draw.save_scaling(table, f"scaling{ending}", cost_model.overhead()[0])


def _points(shape: Shape) -> Iterator[Point]:
    for n_pairs in (shape.n_pairs // 4 or 1, shape.n_pairs, 4 * shape.n_pairs):
        yield _at("pairs", n_pairs, replace(shape, n_pairs=n_pairs))
    for n_layers in (shape.n_layers // 2, shape.n_layers, 2 * shape.n_layers):
        yield _at("layers", n_layers, replace(shape, n_layers=n_layers))
    for vocabulary in (shape.vocabulary // 4, shape.vocabulary, 4 * shape.vocabulary):
        yield _at("vocabulary", vocabulary, replace(shape, vocabulary=vocabulary))
    for n_positions in (1, 4, min(16, shape.n_pos)):
        yield _at("patched positions", n_positions, replace(shape, n_pairs=shape.n_pairs // 4 or 1), n_positions)
    for n_neurons in (16, 64, min(256, shape.d_mlp)):
        yield _neurons(n_neurons, shape)
    for behind in (shape.n_pos // 4, shape.n_pos // 2, shape.n_pos):
        one = replace(shape, n_shared=shape.n_pos - behind)
        yield "tokens behind the prefix", behind, one, _whole_sweep, sweeps.counted("layers", "T1", one)


def _whole_sweep(made: Study) -> Callable[[], object]:
    """The sweep of layers on recognition pairs, with both clean runs and with patches at all tokens that two prompts share."""
    return lambda: sweeps.MEASURED["layers"](made, "T1")


def _at(factor: str, size: int, shape: Shape, n_positions: int = 1) -> Point:
    """Every layer's block, attention and MLP at evenly spread positions, the last among them; clean runs are given."""
    positions = [shape.n_pos - 1 - i * shape.n_pos // n_positions for i in range(n_positions)]
    costs = [cost_model.at_each_layer(shape, len(SITES), 1, shape.n_pos - position) for position in positions]

    def patched(made: Study) -> Callable[[], object]:
        batch = estimands.run_clean(made.subject, made.of("T1"))
        masks = [position_mask(batch.control.tokens, position) for position in positions]
        patches = [Patch(site, layer, one) for one in masks for site in SITES for layer in range(shape.n_layers)]
        return lambda: replay.interchange(made.subject, batch.control, batch.treated, patches, readout=_log_odds(made))

    return factor, size, shape, patched, shape.n_pairs * sum(costs)


def _neurons(n_neurons: int, shape: Shape) -> Point:
    """Single neurons of a middle layer at the last token; clean runs are given."""
    layer = shape.n_layers // 2
    cost = n_neurons * (cost_model.climb(shape, [layer]) + cost_model.read_out(shape))

    def patched(made: Study) -> Callable[[], object]:
        batch = estimands.run_clean(made.subject, made.of("T1"))
        chosen = torch.arange(n_neurons)
        return lambda: replay.each_neuron(made.subject, batch.control, batch.treated, layer, chosen, _log_odds(made))

    return "neurons of a middle layer", n_neurons, shape, patched, shape.n_pairs * cost


def _log_odds(made: Study) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda resid: outcomes.log_odds(made.subject, resid, made.openers["T1"])


def _measured(
    factor: str, size: int, shape: Shape, ready: Callable[[Study], Callable[[], object]], operations: float
) -> dict[str, object]:
    made = sweeps.study(sweeps.checked_llama(shape), shape)
    return {"factor": factor, "size": size, "seconds": sweeps.timed(ready(made)), "operations": operations}


if __name__ == "__main__":
    main()
