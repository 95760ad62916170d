"""Error rates that can be counted by eye, and campaigns that go on where they stopped."""

import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from companion.base.errors import InputError
from companion.calibration import campaign, draws, rates
from companion.calibration.campaign import KEYS, SCHEMAS, read_shipped, run_campaign
from companion.stats.clusters import rate

# ---- rates ----


def some_draws(*groups: tuple[int, dict[str, object]]) -> pd.DataFrame:
    """`n` draws with the given fields each; the others are those of a right, sampled verdict."""
    fine = {
        "kind": "late", "claim": "C1", "truth": "true", "verdict": "supported", "population_verdict": "supported",
        "gate": "passed", "quantity": "share", "reason": "", "code": "x", "topics": 70, "pairs": 1, "effect": 1.0,
        "estimate": 0.7, "ci_low": 0.6, "ci_high": 0.8, "population": 0.7,
    }  # fmt: skip
    rows = [{**fine, **fields} for n, fields in groups for _ in range(n)]
    return pd.DataFrame(rows).assign(seed=range(len(rows)))


def false_support(table: pd.DataFrame, **settings: bool) -> pd.Series:
    return rates.error_rates(table, **settings).set_index("error").loc["false supported"]


NULL = {"truth": "false", "kind": "early", "verdict": "contradicted", "population_verdict": "contradicted"}
TABLE = some_draws(
    (8, {}), (2, {"verdict": "inconclusive"}), (59, NULL), (1, {**NULL, "verdict": "supported", "kind": "middle"}),
    (5, {**NULL, "gate": "stopped", "verdict": "inconclusive"}), (3, {"truth": "open", "verdict": "supported"}),
)  # fmt: skip


def test_false_support_has_an_exact_bound() -> None:
    found = false_support(TABLE)
    assert (found.hits, found.n) == (1, 65)
    p = found.upper  # the rate with P(at most 1 of 65) = 0.05
    assert (1 - p) ** 65 + 65 * p * (1 - p) ** 64 == pytest.approx(0.05, abs=1e-6)
    untestable = some_draws((4, NULL), (3, {**NULL, "verdict": "not testable"}))
    assert [false_support(table, only_testable=True).n for table in (TABLE, untestable)] == [60, 4]


def test_no_error_among_59_nulls_bounds_the_rate_below_5_percent(tmp_path: Path) -> None:
    assert rates.one_sided(0, 59)[1] < 0.05 < rates.one_sided(0, 58)[1]
    assert rates.one_sided(0, 0) == (0, 1) and math.isnan(rate(0, 0)[0])
    assert rates.claim_rates(rates.main_draws(tmp_path)) == {}, "no draws, no rates"


def test_support_is_counted_by_true_value_on_either_side_of_the_threshold() -> None:
    near = {0.46: "inconclusive", 0.499: "supported", 0.5: "supported", 0.54: "inconclusive", 0.56: "supported"}
    table = some_draws(*((1, {"claim": "C1*", "value": value, "verdict": said}) for value, said in near.items()))
    found = rates.support_curve(pd.concat([table, some_draws((1, {"claim": "C7", "value": 0.5}))]))
    assert found.set_index("value")[["n", "hits"]].T.to_dict("list") == {0.475: [2, 1], 0.525: [2, 1], 0.575: [1, 1]}
    assert set(found.claim) == {"C1*"} and set(found.threshold) == {0.5}
    assert found.low.between(0, found.estimate).all() and found.high.between(found.estimate, 1).all()
    assert list(rates.support_curve(table.iloc[:0])) == list(found)


def test_coverage_counts_finite_intervals_and_power_right_verdicts() -> None:
    grows = some_draws((4, {"topics": 20, "verdict": "inconclusive"}), (4, {"topics": 70}))
    assert rates.power_curve(grows, "topics").set_index("topics").estimate.to_dict() == {20: 0, 70: 1}
    rounding = {"ci_low": 1.0, "ci_high": 1.0, "population": 0.9999}  # no width, and off by the network's rounding
    unknown = (3, {"ci_high": math.inf}), (2, {"population": math.nan})
    table = some_draws((18, {}), (1, rounding), (1, {"population": 0.81}), *unknown)
    assert rates.interval_coverage(table).loc["share", ["hits", "n"]].tolist() == [19, 20]


def test_a_ranking_is_judged_by_how_it_finds_the_set() -> None:
    rng = np.random.default_rng(0)
    member = rng.random(2000) < 0.1
    noise = rates.ranking_quality(member, rng.random(2000))
    assert abs(noise["auroc"] - 0.5) < 0.06 and noise["P@k"] < 0.2
    perfect = rates.ranking_quality(member, member + 0.1 * rng.random(2000))
    assert set(perfect.values()) == {1.0}
    assert math.isnan(rates.ranking_quality([False, False], [1.0, 2.0])["auroc"])


def test_built_models_count_that_are_like_the_model_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "layers_of", lambda kind, seed: {"late": 6, "middle": 9}[kind])
    table = pd.DataFrame({"kind": ["late", "middle"], "seed": [1, 2], "claim": "C1"})
    for layers, kinds in ((3, ["late"]), (12, ["late", "middle"]), (13, ["middle"]), (18, ["middle"])):
        near, which = rates.draws_like(table, (layers, False))
        assert near.kind.tolist() == kinds and f"({layers})" in which
    others = {
        (2, False): "2 layers and full",
        (19, False): "19 layers",
        (6, True): "sliding windows",
        None: "not known",
    }
    for shape, why in others.items():
        near, which = rates.draws_like(table, shape)
        assert len(near) == 2 and which.startswith("all built models") and why in which


# ---- campaign ----

TABLES = ("population", "localisation")


def rows_of(seed: int) -> dict[str, pd.DataFrame]:
    values = {"str": "x", "int": seed, "float": 0.5, "bool": True}
    return {name: pd.DataFrame({at: [values[kind]] for at, kind in SCHEMAS[name].items()}) for name in TABLES}


def run(folder: Path, measure=rows_of, share: str = "1/1") -> None:
    known = set(read_shipped("population", folder, or_empty=True).seed)
    run_campaign({f"item-{i}": i for i in range(4)}, measure, TABLES, lambda seed: seed in known, share, folder)


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    measure = Mock(side_effect=[rows_of(0), rows_of(1), KeyboardInterrupt, rows_of(2), rows_of(3)])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, measure)
    assert {len(read_shipped(name, tmp_path)) for name in TABLES} == {2}, "joined"
    run(tmp_path, measure)
    assert [call.args[0] for call in measure.call_args_list] == [0, 1, 2, 2, 3]
    before = (tmp_path / "population.parquet").read_bytes()
    shutil.rmtree(tmp_path / ".parts")
    run(tmp_path, measure)
    assert measure.call_count == 5, "a clone has the shipped tables only, and nothing is measured twice"
    assert (tmp_path / "population.parquet").read_bytes() == before


def test_an_item_of_which_a_table_is_missing_is_measured_again(tmp_path: Path) -> None:
    run(tmp_path)
    for path in (tmp_path / "population.parquet", tmp_path / ".parts" / "item-2.localisation.parquet"):
        path.unlink()
    measure = Mock(side_effect=rows_of)
    run(tmp_path, measure)
    measure.assert_called_once_with(2)


def test_shares_split_the_work(tmp_path: Path) -> None:
    run(tmp_path, share="2/2")
    assert list(read_shipped("population", tmp_path).seed) == [1, 3]
    for share in ("0/2", "3/2", "half"):
        with pytest.raises(InputError, match="such as 1/2"):
            run(tmp_path, share=share)
    with pytest.raises(InputError, match="is not there"):
        read_shipped("verdicts", tmp_path)
    empty = read_shipped("evidence", tmp_path, or_empty=True)
    assert not len(empty) and empty.seed.dtype == "int64" and empty.estimate.dtype == float


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_shipped_table_joined_from_two_halves_is_the_shipped_table(name: str, tmp_path: Path) -> None:
    whole = read_shipped(name)
    assert not whole.duplicated(KEYS[name]).any() and list(whole.columns) == list(SCHEMAS[name])
    is_first = np.random.default_rng(0).random(len(whole)) < 0.5
    (parts := tmp_path / ".parts").mkdir()
    for half, rows in (("a", whole[is_first]), ("b", whole[~is_first]), ("empty", whole.iloc[:0])):
        rows.to_parquet(parts / f"{half}.{name}.parquet")
    for left in ("a", "b"):  # once more without a part that was joined before
        assert campaign.join_parts((name,), tmp_path) == len(whole)
        pd.testing.assert_frame_equal(read_shipped(name, tmp_path), whole)
        (parts / f"{left}.{name}.parquet").unlink()


def test_population_measures_what_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("verdicts", "evidence"):
        table = read_shipped(name)
        table[(table.kind == "late") & table.seed.isin([11, 12])].to_parquet(tmp_path / f"{name}.parquet")
    verdicts = read_shipped("population")

    def of_draw(draw: draws.Draw, **_: pd.DataFrame) -> dict[str, pd.DataFrame]:
        part, kind, seed = draw
        at = (verdicts.kind == kind) & (verdicts.seed == seed) & verdicts.claim.isin(draws.IN_CLOSED_FORM[part])
        return {"population": verdicts[at]}

    population = Mock(side_effect=of_draw)
    monkeypatch.setattr(draws, "measure_population", population)
    for _ in range(2):
        draws.run_population("1/1", tmp_path)
    wanted = [(part, "late", seed) for part in ("context", "neurons") for seed in (11, 12)]
    assert [call.args[0] for call in population.call_args_list] == wanted
