"""Result files: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import json_text
from helpers.errors import InputError
from helpers.paths import NOTEBOOKS, RESULTS, relative

if TYPE_CHECKING:  # pandas takes half a second to import and the command line only reads JSON
    import pandas as pd

KINDS = {"str": "text", "int": "whole numbers", "float": "numbers", "bool": "True or False"}

# One row: one pair's four cells for one mediator. First digit of y: the prompt, second: the mediator.
EFFECTS = {
    **dict.fromkeys(("pair_id", "topic", "treatment", "split", "site"), "str"),
    "layer": "int",
    **dict.fromkeys(("position", "outcome"), "str"),
    **dict.fromkeys(("y00", "y01", "y10", "y11", "te", "nie0", "nie1"), "float"),
}

# One row: one number that a verdict of the claims ledger rests on.
EVIDENCE = {
    **dict.fromkeys(("model", "claim", "quantity", "variant"), "str"),
    **dict.fromkeys(("estimate", "ci_low", "ci_high"), "float"),
    **dict.fromkeys(("n_pairs", "n_topics"), "int"),
    "note": "str",
}


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A scratch path beside `path` that takes its place if the block succeeds and is removed if it fails.

    Nobody ever sees half a file: the scratch name is unique and `os.replace` is atomic within a folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last because some writers choose their format by it.
    scratch = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(text: str, path: Path | str) -> Path:
    """Write UTF-8 text with `\\n` line ends, atomically; returns the path."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_json(value: Any, path: Path | str) -> Path:
    """Write sorted, indented JSON, atomically; numpy scalars and arrays become plain numbers and lists.

    NaN and inf are not JSON and raise `ValueError`: write None where there is no number.
    """
    try:
        text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False, default=_plain)
    except ValueError as error:
        raise ValueError(
            f"{relative(Path(path))} would hold NaN or inf: write None where there is no number"
        ) from error
    return write_text(text + "\n", path)


def read_json(path: Path | str) -> Any:
    """The value of a JSON file; `InputError` if it is missing or torn."""
    path = _existing(path)
    try:
        return json_text.parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{relative(path)} is not valid JSON ({error}). {_remedy(path)}") from error


def write_table(table: pd.DataFrame, path: Path | str) -> Path:
    """Write a table as parquet or CSV, by the suffix, atomically and without its index; returns the path.

    CSV floats have six significant digits: what is committed must not change with the last bit of a sum. Parquet holds
    checksums of its values, so that a changed bit is not read as another number.
    """
    path = Path(path)
    with replacing(path) as scratch:
        if path.suffix == ".parquet":
            table.to_parquet(scratch, index=False, compression="zstd", write_page_checksum=True)
        elif path.suffix == ".csv":
            table.to_csv(scratch, index=False, float_format="%.6g", lineterminator="\n")
        else:
            raise ValueError(f"{path.name}: a table is written as .parquet or .csv")
    return path


def read_table(path: Path | str, columns: Mapping[str, str]) -> pd.DataFrame:
    """A table whose `columns` (name -> "str", "int", "float" or "bool") are there and of that kind.

    Columns beyond those are passed on as they are. Raises `InputError` naming the file, the column and
    what to do if the file is missing or torn, or a column is missing or of another kind.
    """
    path = _existing(path)
    table = _parsed(path, columns)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(f"{relative(path)} has no column {', '.join(map(repr, missing))}. {_remedy(path)}")
    for name, kind in columns.items():
        table[name] = _cast(table[name], kind, path)
    return table


def _parsed(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    import pandas as pd

    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path, page_checksum_verification=True)
        if not path.read_bytes().endswith(b"\n"):
            raise ValueError("its last line is not complete")
        texts = {name: str for name, kind in columns.items() if kind == "str"}
        # Only numbers may be blank: a model called "NA" stays a text.
        blanks = {name: ["", "nan"] for name in columns if name not in texts}
        return pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=blanks)
    except Exception as error:  # bytes that changed raise errors of every kind, in pyarrow and in pandas
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{relative(path)} cannot be read ({reason}). {_remedy(path)}") from error


def _cast(column: pd.Series, kind: str, path: Path) -> pd.Series:
    from pandas.api import types

    found = {
        "str": lambda: types.infer_dtype(column, skipna=False) in ("string", "empty"),
        "int": lambda: types.is_integer_dtype(column) or not len(column),
        "float": lambda: types.is_any_real_numeric_dtype(column) or not len(column),
        "bool": lambda: types.is_bool_dtype(column) or not len(column),
    }
    if not found[kind]():
        have = f"column {column.name!r} should hold {KINDS[kind]}, but is {column.dtype}"
        raise InputError(f"{relative(path)}: {have} (or has blanks). {_remedy(path)}")
    return column.astype({"str": str, "int": "int64", "float": "float64", "bool": bool}[kind])


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{relative(path)} is not there. {_remedy(path)}")
    return path


def _remedy(path: Path) -> str:
    """How to make a result file again: its number is its notebook's."""
    number = "08" if path.name == "claims.csv" else (re.match(r"(\d\d)_", path.name) or ("", ""))[1]
    made_by = next(iter(sorted(NOTEBOOKS.glob(f"{number}_*.ipynb"))), None) if number else None
    if not number or not path.resolve().is_relative_to(RESULTS):
        return "Restore the file or make it again."
    name = f"notebooks/{made_by.name}" if made_by else f"notebook {number}"
    slug = path.resolve().relative_to(RESULTS).parts[0]
    same = "" if slug in ("embedded", path.name) else f" with the flags that made {slug!r}"
    return f"It is made by {name}: ./run_all.sh --only {number} --force{same}"


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
