"""Result files: whole or not at all, the same bytes each time, and checked when they are read."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from companion.base import files, paths
from companion.base.display import NotDefined
from companion.base.errors import InputError

COLUMNS = {"site": "str", "layer": "int", "te": "float", "ok": "bool"}
both = pytest.mark.parametrize("suffix", ["csv", "parquet"])


def table() -> pd.DataFrame:
    return pd.DataFrame({"site": ["head", "NA"], "layer": [0, 5], "te": [1 / 3, np.nan], "ok": [True, False]})


@both
def test_a_table_comes_back_and_has_the_same_bytes_each_time(tmp_path: Path, suffix: str) -> None:
    path, again = (files.write_table(table(), tmp_path / f"deep/er/{name}.{suffix}") for name in "ab")
    back = files.read_table(path, COLUMNS)
    pd.testing.assert_frame_equal(back, table(), rtol=1e-5, check_dtype=False)
    assert [str(kind) for kind in back.dtypes[1:]] == ["int64", "float64", "bool"]
    assert path.read_bytes() == again.read_bytes()
    if suffix == "csv":  # committed floats have six digits
        assert path.read_bytes() == b"site,layer,te,ok\nhead,0,0.333333,True\nNA,5,,False\n"
    empty = files.write_table(table().head(0), tmp_path / f"empty.{suffix}")
    assert list(files.read_table(empty, COLUMNS).columns) == list(COLUMNS)


def test_a_table_that_is_not_defined_leaves_no_file_and_shows_why(tmp_path: Path) -> None:
    missing = NotDefined("This prompt set holds no jailbreak wrapper.")
    path = files.write_table(table(), tmp_path / "t.csv")
    for _ in range(2):  # with an older file of that name, and without
        assert files.write_table(missing, path) is missing
        assert not list(tmp_path.iterdir())
    assert not missing and str(missing) in missing._repr_markdown_()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = files.write_text("old", tmp_path / "a.txt")
    with pytest.raises(RuntimeError), files.replacing(path) as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(ValueError, match=r"\.parquet or \.csv"):
        files.write_table(table(), path)


def test_json_is_sorted_and_plain(tmp_path: Path) -> None:
    path = files.write_json({"b": np.float32(0.5), "a": np.array([1, 2])}, tmp_path / "a.json")
    assert path.read_text() == '{\n "a": [\n  1,\n  2\n ],\n "b": 0.5\n}\n'
    assert files.read_json(path) == {"a": [1, 2], "b": 0.5}
    for bad in (float("nan"), float("inf"), np.float64("nan"), np.array([np.nan])):
        with pytest.raises(ValueError, match="write None"):
            files.write_json({"a": bad}, path)
    assert files.read_json(path)["b"] == 0.5


def test_a_missing_result_names_its_notebook() -> None:
    shipped, own = (
        r"results/embedded/02_none\.csv is not there.*02.*--only 02",
        "--only 02 --force with the flags that made 'm",
    )
    for run, message in (("embedded", shipped), ("mine", own)):
        with pytest.raises(InputError, match=message):
            files.read_table(paths.RESULTS / run / "02_none.csv", COLUMNS)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_torn_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    files.write_json({"a": 1}, path) if suffix == "json" else files.write_table(table(), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=rf"t\.{suffix}"):
        files.read_json(path) if suffix == "json" else files.read_table(path, COLUMNS)


@both
def test_a_missing_column_and_a_wrong_kind_are_named(tmp_path: Path, suffix: str) -> None:
    path, words = files.write_table(table(), tmp_path / f"t.{suffix}"), table().assign(layer=["a", "b"])
    with pytest.raises(InputError, match="no column 'topic'"):
        files.read_table(path, {"topic": "str"})
    for column, kind in [("te", "int"), ("site", "float"), ("layer", "bool"), ("te", "str")][
        : 4 if suffix == "parquet" else 2
    ]:
        with pytest.raises(InputError, match=f"column '{column}'"):
            files.read_table(path, {column: kind})
    with pytest.raises(InputError, match="column 'layer' should hold whole numbers"):
        files.read_table(files.write_table(words, path), COLUMNS)
