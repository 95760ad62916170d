"""The cost model against what was measured, and against counts made another way."""

from dataclasses import replace

import pandas as pd
import pytest

from benchmarks import bound, cost_model, sweeps
from benchmarks.shapes import LLAMA_8B, QUOTED, SITES, Job, Workload
from companion.base.paths import ROOT

FACTOR = 1.6  # how far a measured point may lie from the formula
JOBS = tuple(Job(site, layer, QUOTED.n_pos - 1) for layer in range(QUOTED.n_layers) for site in SITES)
LAST_TOKEN = Workload("x", JOBS)


def predicted(row: pd.Series, rate: float) -> float:
    """Seconds by the formula; the benchmark scores two numbers a pair, one of them over the whole vocabulary."""
    sizes = {"pairs": "n_pairs", "layers": "n_layers", "tokens in the prompt": "n_pos"}
    shape = replace(QUOTED, **{sizes[row.factor]: int(row["size"])})
    operations = shape.n_pairs * cost_model.last_token(shape, read_rows=shape.vocabulary)
    return cost_model.OVERHEAD * operations / rate


@pytest.mark.parametrize("factor", ["pairs", "layers", "tokens in the prompt"])
def test_the_formula_holds_at_the_measured_points(factor: str) -> None:
    table = pd.read_csv(ROOT / "results" / "benchmarks" / "scaling.csv")
    assert table.times_bound.min() < cost_model.OVERHEAD < table.times_bound.max()
    at_quoted = table[(table.factor == "pairs") & (table["size"] == QUOTED.n_pairs)].iloc[0]
    rate = bound.minimal_operations(QUOTED, LAST_TOKEN) / at_quoted.bound  # of that machine's products
    for _, row in table[table.factor == factor].iterrows():
        assert 1 / FACTOR < row.seconds / predicted(row, rate) < FACTOR, row


def test_the_formula_holds_for_whole_sweeps_as_a_run_makes_them() -> None:
    table = pd.read_csv(ROOT / "results" / "benchmarks" / "sweeps.csv")
    design = cost_model.sweeps(QUOTED, cost_model.Design())
    assert set(table.sweep) == set(design) - {"untrained twin"}  # which is the first of them once more
    for row in table.itertuples():
        shape = replace(QUOTED, n_layers=row.layers, n_pairs=row.pairs)
        assert row.operations == pytest.approx(sweeps.counted(row.sweep, row.treatment, shape), rel=1e-4)
        assert 1 / FACTOR < row.seconds * row.rate / (cost_model.OVERHEAD * row.operations) < FACTOR, row


def test_the_page_has_the_table_of_the_code() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert not [line for line in cost_model.table() if line not in page]


def test_the_count_is_that_of_the_bound_up_to_the_top_layer() -> None:
    exact = bound.minimal_operations(QUOTED, LAST_TOKEN) / QUOTED.n_pairs
    assert cost_model.last_token(QUOTED, read_rows=QUOTED.vocabulary) == pytest.approx(exact, rel=0.02)


def test_sizes_are_the_known_ones_and_twice_the_processors_take_half_the_time() -> None:
    assert cost_model.parameters(LLAMA_8B) == pytest.approx(8.03e9, rel=0.01)
    assert cost_model.parameters(cost_model.LLAMA_70B) == pytest.approx(70.6e9, rel=0.01)
    one, two = (cost_model.hours(LLAMA_8B, cost_model.Design(), cost_model.Machine("", n, 1e13)) for n in (1, 2))
    assert one == pytest.approx(2 * two)
