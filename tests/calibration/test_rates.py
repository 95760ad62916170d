"""Error rates on hand-made tables of draws, where they can be counted by eye."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from companion.calibration import rates
from companion.stats.clusters import rate
from organisms.compiled_design import draw_design


def draws(*groups: tuple[int, dict[str, object]]) -> pd.DataFrame:
    """`n` draws with the given fields each; the others are those of a right, sampled verdict."""
    fine = {
        "kind": "late", "claim": "C1", "truth": "true", "verdict": "supported", "population_verdict": "supported",
        "gate": "passed", "quantity": "share", "reason": "", "code": "x", "topics": 70, "pairs": 1, "effect": 1.0,
        "estimate": 0.7, "ci_low": 0.6, "ci_high": 0.8, "population": 0.7,
    }  # fmt: skip
    rows = [{**fine, **fields} for n, fields in groups for _ in range(n)]
    return pd.DataFrame(rows).assign(seed=range(len(rows)))


def one(table: pd.DataFrame, **where: object) -> pd.Series:
    for name, value in where.items():
        table = table[table[name] == value]
    (row,) = table.itertuples(index=False)
    return pd.Series(row._asdict())


NULL = {"truth": "false", "kind": "early", "verdict": "contradicted", "population_verdict": "contradicted"}
TABLE = draws(
    (8, {}), (2, {"verdict": "inconclusive"}), (59, NULL), (1, {**NULL, "verdict": "supported", "kind": "middle"}),
    (5, {**NULL, "gate": "stopped", "verdict": "inconclusive"}), (3, {"truth": "open", "verdict": "supported"}),
)  # fmt: skip


def test_false_support_has_an_exact_bound() -> None:
    found = one(rates.error_rates(TABLE), error="false supported")
    assert (found.hits, found.n) == (1, 65)
    assert found.upper == pytest.approx(1 - 0.929, abs=2e-3)  # the rate p with P(at most 1 of 65) = 0.05
    p = found.upper
    assert (1 - p) ** 65 + 65 * p * (1 - p) ** 64 == pytest.approx(0.05, abs=1e-6)
    assert one(rates.error_rates(TABLE, only_testable=True), error="false supported").n == 60
    untestable = draws((4, NULL), (3, {**NULL, "verdict": "not testable"}))
    assert one(rates.error_rates(untestable, only_testable=True), error="false supported").n == 4


def test_no_error_among_59_nulls_bounds_the_rate_below_5_percent() -> None:
    assert rates.one_sided(0, 59)[1] < 0.05 < rates.one_sided(0, 58)[1]
    assert rates.one_sided(0, 0) == (0, 1) and math.isnan(rate(0, 0)[0])


def test_support_is_counted_by_true_value_on_either_side_of_the_threshold() -> None:
    near = [
        (0.46, "inconclusive"),
        (0.499, "supported"),
        (0.5, "supported"),
        (0.54, "inconclusive"),
        (0.56, "supported"),
    ]
    table = pd.concat([draws((1, {"claim": "C1*", "value": value, "verdict": said})) for value, said in near])
    found = rates.support_curve(pd.concat([table, draws((1, {"claim": "C7", "value": 0.5}))]))
    assert found[["claim", "value", "n", "hits", "threshold"]].to_numpy().tolist() == [
        ["C1*", 0.475, 2, 1, 0.5],
        ["C1*", 0.525, 2, 1, 0.5],
        ["C1*", 0.575, 1, 1, 0.5],
    ]
    assert found.low.between(0, found.estimate).all() and found.high.between(found.estimate, 1).all()
    assert list(rates.support_curve(table.iloc[:0])) == list(found)


def test_coverage_counts_finite_intervals_and_power_right_verdicts() -> None:
    grows = draws((4, {"topics": 20, "verdict": "inconclusive"}), (4, {"topics": 70}))
    assert rates.power_curve(grows, "topics").set_index("topics").estimate.to_dict() == {20: 0, 70: 1}
    rounding = {"ci_low": 1.0, "ci_high": 1.0, "population": 0.9999}  # no width, and off by the network's rounding
    table = draws(
        (18, {}), (1, rounding), (1, {"population": 0.81}), (3, {"ci_high": math.inf}), (2, {"population": math.nan})
    )
    found = rates.interval_coverage(table).loc["share"]
    assert (found.hits, found.n) == (19, 20)


def test_a_ranking_is_judged_by_how_it_finds_the_set() -> None:
    rng = np.random.default_rng(0)
    member = rng.random(2000) < 0.1
    noise = rates.ranking_quality(member, rng.random(2000))
    assert abs(noise["auroc"] - 0.5) < 0.06 and noise["P@k"] < 0.2
    perfect = rates.ranking_quality(member, member + 0.1 * rng.random(2000))
    assert set(perfect.values()) == {1.0}
    assert math.isnan(rates.ranking_quality([False, False], [1.0, 2.0])["auroc"])


def test_without_draws_there_are_no_rates(tmp_path: Path) -> None:
    assert rates.claim_rates(rates.main_draws(tmp_path)) == {}


def test_built_models_count_that_are_like_the_model_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "layers_of", lambda kind, seed: {"late": 6, "middle": 9}[kind])
    table = pd.DataFrame({"kind": ["late", "middle"], "seed": [1, 2], "claim": "C1"})
    for layers, kinds in ((3, ["late"]), (12, ["late", "middle"]), (13, ["middle"]), (18, ["middle"])):
        near, which = rates.draws_like(table, (layers, False))
        assert near.kind.tolist() == kinds and f"({layers})" in which
    for shape, why in (
        ((2, False), "2 layers and full"),
        ((19, False), "19 layers"),
        ((6, True), "sliding windows"),
        (None, "not known"),
    ):
        near, which = rates.draws_like(table, shape)
        assert len(near) == 2 and which.startswith("all built models") and why in which


def test_layers_of_a_built_model_are_those_of_its_design() -> None:
    assert rates.layers_of("late", 11) == draw_design("late", 11).n_layers
