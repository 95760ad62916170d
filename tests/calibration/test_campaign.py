"""A campaign measures every item once, goes on where it stopped, and joins the same shipped tables from any parts."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from companion.base.errors import InputError
from companion.calibration import campaign, draws
from companion.calibration.campaign import KEYS, SCHEMAS, read_shipped, run_campaign

TABLES = ("population", "localisation")


def rows_of(seed: int) -> dict[str, pd.DataFrame]:
    values = {"str": "x", "int": seed, "float": 0.5, "bool": True}
    row = {name: {column: values[kind] for column, kind in SCHEMAS[name].items()} for name in TABLES}
    return {name: pd.DataFrame([row[name]]) for name in TABLES}


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
    for path in (tmp_path / ".parts").iterdir():
        path.unlink()
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
    parts = tmp_path / ".parts"
    parts.mkdir()
    for half, rows in (("a", whole[is_first]), ("b", whole[~is_first]), ("empty", whole.iloc[:0])):
        rows.to_parquet(parts / f"{half}.{name}.parquet")
    assert campaign.join_parts((name,), tmp_path) == len(whole)
    pd.testing.assert_frame_equal(read_shipped(name, tmp_path), whole)
    (parts / f"b.{name}.parquet").unlink()
    campaign.join_parts((name,), tmp_path)
    pd.testing.assert_frame_equal(read_shipped(name, tmp_path), whole)


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
