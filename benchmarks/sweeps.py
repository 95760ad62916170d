"""The sweeps of notebooks 02 and 03, as a run makes them, against the operations that the cost model counts for them.

    python -m benchmarks.sweeps                  # around the quoted shape; some minutes on one core
    python -m benchmarks.sweeps --shape smoke    # seconds

Results: results/benchmarks/sweeps.csv. `operations / rate` is the time that the formula gives before its factor.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from benchmarks import bound, cost_model, draw
from benchmarks.cost_model import Design
from benchmarks.shapes import Shape, asked, machine, prompts, random_llama
from companion.base.display import progress
from companion.base.files import write_table
from companion.base.paths import results_dir
from companion.mediation.study import Study
from companion.mediation.sweeps import SWEEPS
from companion.model.architecture import find_parts
from companion.prompts.pairs import Pair
from companion.prompts.tokens import Openers, TokenPair

ANSWER = 24  # tokens that a random model's answers have: it does not end them
OPENERS = Openers((3, 4), (5, 6))


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every sweep and writes the table."""
    shape, ending = asked("benchmarks.sweeps", "Time of whole sweeps against the formula.", arguments)
    rate = bound.product_rate(shape)
    rows = [_measure(*point) for point in progress(list(_points(shape)), "sweeps")]
    table = pd.DataFrame(rows).assign(rate=rate, **machine(), shape=ending.strip("_") or "quoted")
    table["times_formula"] = table.seconds * rate / table.operations
    print(table[["sweep", "treatment", "layers", "pairs", "seconds", "times_formula"]].to_string(index=False))
    write_table(table, results_dir(draw.SLUG) / f"sweeps{ending}.csv")


def _points(shape: Shape) -> Iterator[tuple[str, str, Shape]]:
    """Sweep, treatment and shape; answers are scored token by token over the whole vocabulary, so on fewer pairs."""
    for n_layers in (shape.n_layers // 2 or 1, shape.n_layers):
        other = replace(shape, n_layers=n_layers)
        yield "layers", "T1", other
        yield "layers", "B1", other
        yield "modules and heads", "B1", other
        yield "whole answers", "T2", replace(other, n_pairs=shape.n_pairs // 4 or 1)


def counted(sweep: str, treatment: str, shape: Shape) -> float:
    """Operations that the formula gives for one sweep on pairs of one treatment."""
    kind = {"T1": "recognition", "T2": "generation", "B1": "benign"}[treatment]
    none = {"recognition": 0, "generation": 0, "benign": 0}
    design = Design(**{**none, kind: shape.n_pairs}, twin_share=0.0, answer_tokens=ANSWER)
    return cost_model.sweeps(shape, design)[sweep]


def study(shape: Shape, treatment: str) -> Study:
    """Random pairs that differ in their first token only, so that all others may change, on a random model."""
    control, _ = prompts(shape, "random")
    treated = control.clone()
    treated[:, 0] = (control[:, 0] + 1).clamp(max=shape.vocabulary - 1)
    treated[:, 0] -= (treated[:, 0] == control[:, 0]).long()
    nowhere = np.zeros((shape.n_pos, 2), dtype=int)
    pairs = [
        TokenPair(
            Pair(f"p{i}", treatment, f"t{i}", "a", "b", "test"), one.numpy(), other.numpy(), nowhere, nowhere, 0, 0
        )
        for i, (one, other) in enumerate(zip(control, treated, strict=True))
    ]
    subject = find_parts(random_llama(shape), None, "sweeps", sha256="not hashed")
    return Study("sweeps", subject, tuple(pairs), {treatment: OPENERS}, {}, {})


def _measure(sweep: str, treatment: str, shape: Shape) -> dict[str, object]:
    """The better of two runs of one batch."""
    made = study(shape, treatment)
    measure, seconds = SWEEPS["modules" if sweep == "modules and heads" else sweep].measure, []
    for _ in range(2):
        start = time.perf_counter()
        measure(made, made.pairs)
        seconds.append(time.perf_counter() - start)
    sizes = {"sweep": sweep, "treatment": treatment, "layers": shape.n_layers, "pairs": shape.n_pairs}
    return {**sizes, "seconds": min(seconds), "operations": counted(sweep, treatment, shape)}


if __name__ == "__main__":
    main()
