"""Result files: whole or not at all, the same bytes each time, and checked when they are read."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from companion.base import files, paths
from companion.base.errors import InputError

COLUMNS = {"site": "str", "layer": "int", "te": "float", "ok": "bool"}


def table() -> pd.DataFrame:
    return pd.DataFrame({"site": ["head", "NA"], "layer": [0, 5], "te": [1 / 3, np.nan], "ok": [True, False]})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_comes_back(tmp_path: Path, suffix: str) -> None:
    path = files.write_table(table(), tmp_path / f"deep/er/t.{suffix}")
    back = files.read_table(path, COLUMNS)
    pd.testing.assert_frame_equal(back, table(), rtol=1e-5, check_dtype=False)
    assert [str(kind) for kind in back.dtypes[1:]] == ["int64", "float64", "bool"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_same_table_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    first, second = (files.write_table(table(), tmp_path / f"{name}.{suffix}") for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_committed_floats_have_six_digits(tmp_path: Path) -> None:
    path = files.write_table(table(), tmp_path / "t.csv")
    assert path.read_bytes() == b"site,layer,te,ok\nhead,0,0.333333,True\nNA,5,,False\n"


def test_an_empty_table_comes_back(tmp_path: Path) -> None:
    for suffix in ("csv", "parquet"):
        path = files.write_table(table().head(0), tmp_path / f"t.{suffix}")
        assert list(files.read_table(path, COLUMNS).columns) == list(COLUMNS)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = files.write_text("old", tmp_path / "a.txt")
    with pytest.raises(RuntimeError), files.replacing(path) as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_json_is_sorted_and_plain(tmp_path: Path) -> None:
    path = files.write_json({"b": np.float32(0.5), "a": np.array([1, 2])}, tmp_path / "a.json")
    assert path.read_text() == '{\n "a": [\n  1,\n  2\n ],\n "b": 0.5\n}\n'
    assert files.read_json(path) == {"a": [1, 2], "b": 0.5}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float64("nan"), np.array([np.nan])])
def test_json_refuses_what_is_no_number(tmp_path: Path, bad: object) -> None:
    with pytest.raises(ValueError, match="write None"):
        files.write_json({"a": bad}, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_a_missing_result_names_its_notebook() -> None:
    with pytest.raises(InputError, match=r"results/embedded/02_none\.csv is not there.*02.*--only 02"):
        files.read_table(paths.RESULTS / "embedded" / "02_none.csv", COLUMNS)
    with pytest.raises(InputError, match=r"--only 02 --force with the flags that made 'mine'"):
        files.read_table(paths.RESULTS / "mine" / "02_none.csv", COLUMNS)


def test_torn_files_are_named(tmp_path: Path) -> None:
    for suffix in ("csv", "parquet", "json"):
        path = tmp_path / f"t.{suffix}"
        write = files.write_json if suffix == "json" else files.write_table
        write({"a": 1} if suffix == "json" else table(), path)  # type: ignore[operator]
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(InputError, match=rf"t\.{suffix}"):
            files.read_json(path) if suffix == "json" else files.read_table(path, COLUMNS)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_missing_column_and_a_wrong_kind_are_named(tmp_path: Path, suffix: str) -> None:
    path = files.write_table(table().assign(layer=["a", "b"]), tmp_path / f"t.{suffix}")
    with pytest.raises(InputError, match="column 'layer' should hold whole numbers"):
        files.read_table(path, COLUMNS)
    with pytest.raises(InputError, match="no column 'topic'"):
        files.read_table(path, {"topic": "str"})


@pytest.mark.parametrize("column,kind", [("te", "int"), ("site", "float"), ("layer", "bool"), ("te", "str")])
def test_a_parquet_column_of_another_kind_is_refused(tmp_path: Path, column: str, kind: str) -> None:
    path = files.write_table(table(), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=f"column '{column}'"):
        files.read_table(path, {column: kind})


@pytest.mark.parametrize("slug", ["", ".", "..", ".hidden", "a/b", "a b", "a\n", "ä", "../x", "x" * 101])
def test_slugs_that_leave_their_folder_are_refused(slug: str) -> None:
    with pytest.raises(InputError, match="cannot name a run"):
        paths.results_dir(slug)


def test_run_folders_are_made_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "r")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "f")
    assert paths.results_dir("a-b_c.1").is_dir()
    assert paths.figures_dir("a-b_c.1") == tmp_path / "f" / "a-b_c.1"
