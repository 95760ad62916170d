"""The sweeps of notebooks 02 and 03, as a run makes them, against the operations that the cost model counts for them.

    python -m benchmarks.sweeps                  # at two shapes, that of the default run and the quoted one; minutes
    python -m benchmarks.sweeps --shape smoke    # seconds

Results: results/benchmarks/sweeps.csv. `operations / rate` is the time that the formula gives before its factor.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd

from benchmarks import bound, cost_model, draw
from benchmarks.shapes import QUOTED, REAL, Shape, asked, machine, random_llama, sharing
from companion.base.display import progress
from companion.base.files import write_table
from companion.base.paths import results_dir
from companion.mediation.mechanisms import interaction_effects
from companion.mediation.study import Study
from companion.mediation.sweeps import SWEEPS
from companion.model.architecture import Subject, find_parts
from companion.model.verify import read_facts, verify
from companion.prompts.pairs import Pair
from companion.prompts.tokens import Openers, TokenPair

SHAPES = {"real": REAL, "quoted": QUOTED}
MEASURED: Mapping[str, Callable[[Study, str], object]] = {
    "layers": lambda made, treatment: SWEEPS["layers"].measure(made, made.of(treatment)),
    "untrained twin": lambda made, treatment: SWEEPS["layers with direct effects"].measure(made, made.of(treatment)),
    "what is computed": lambda made, treatment: interaction_effects(made),
    "modules and heads": lambda made, treatment: SWEEPS["modules"].measure(made, made.of(treatment)),
    "whole answers": lambda made, treatment: SWEEPS["whole answers"].measure(made, made.of(treatment)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every sweep and writes the table."""
    shape, ending = asked("benchmarks.sweeps", "Time of whole sweeps against the formula.", arguments)
    shapes = {"smoke": replace(shape, n_shared=2)} if ending else SHAPES
    points = [(name, one, *point) for name, one in shapes.items() for point in _points(one)]
    rates = {name: bound.product_rate(one) for name, one in shapes.items()}
    rows = [_measured(*point) for point in progress(points, "sweeps")]
    table = pd.DataFrame(rows).assign(**machine())
    table.insert(7, "rate", table["shape"].map(rates))
    table["times_formula"] = table.seconds * table.rate / table.operations
    print(table[["shape", "sweep", "kind", "pairs", "seconds", "times_formula"]].to_string(index=False))
    write_table(table, results_dir(draw.SLUG) / f"sweeps{ending}.csv")


def _points(shape: Shape) -> Iterator[tuple[str, str, int]]:
    """Sweep, kind and number of pairs; fewer where many tokens are replayed."""
    for kind in ("T1", "T2", "B"):
        yield "layers", kind, shape.n_pairs
    yield "untrained twin", "T2", shape.n_pairs
    yield "what is computed", "T2", min(4, shape.n_pairs)
    yield "modules and heads", "T2", shape.n_pairs
    yield "whole answers", "T2", max(1, shape.n_pairs // 4)


def counted(sweep: str, kind: str, shape: Shape) -> float:
    """Operations that the formula gives for one sweep on a batch of one kind."""
    return shape.n_pairs * cost_model.pair_operations(sweep, kind, shape)


def checked_llama(shape: Shape) -> Subject:
    """A random model that passed the load check, without which no tokens are shared."""
    return _checked_llama(replace(shape, n_pairs=1, n_pos=1, n_shared=0))


@lru_cache(maxsize=1)
def _checked_llama(shape: Shape) -> Subject:
    subject = find_parts(random_llama(shape), None, "sweeps", sha256="not hashed")
    return replace(subject, facts=read_facts(subject, verify(subject)))


def study(subject: Subject, shape: Shape) -> Study:
    """A batch of each treatment for a costly model; all tokens but one count as complying, as in the shipped set.

    T2 is always there, since a study's main treatment is read out more often. T2b pairs have another second token behind the
    shared ones.
    """
    control, treated = sharing(shape)
    nowhere = np.zeros((shape.n_pos, 2), dtype=int)
    made = []
    for name in ("T1", "T2", "T2b", "B"):
        sides = control.clone(), treated.clone()
        for side in sides:
            side[:, shape.n_shared + 1] = 1 if name == "T2b" else 2
        made += [
            TokenPair(Pair(f"{name}{i}", name, f"t{i}", "a", "b", "test"), one, other, nowhere, nowhere, 0, 0)
            for i, (one, other) in enumerate(zip(*(side.numpy() for side in sides), strict=True))
        ]
    rest = Openers(tuple(range(1, shape.vocabulary)), (0,), rest=True)
    twins = {f"T2{i}": f"T2b{i}" for i in range(shape.n_pairs)}
    openers = dict.fromkeys(("T1", "T2", "T2b", "B"), rest)
    return Study("sweeps", subject, tuple(made), openers, twins, is_costly=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds of the better of two runs."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _measured(name: str, shape: Shape, sweep: str, kind: str, n_pairs: int) -> dict[str, object]:
    one = replace(shape, n_pairs=n_pairs)
    made = study(checked_llama(one), one)
    seconds = timed(lambda: MEASURED[sweep](made, kind))
    sizes = {"layers": one.n_layers, "pairs": n_pairs}
    return {
        "shape": name,
        "sweep": sweep,
        "kind": kind,
        **sizes,
        "seconds": seconds,
        "operations": counted(sweep, kind, one),
    }


if __name__ == "__main__":
    main()
