"""Files: written whole or not at all, checked when they are read, and known by their hash.

Whatever is wrong with a file, the error is one `InputError` that names it and says what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from companion.base.display import NotDefined
from companion.base.errors import InputError, explained
from companion.base.paths import RESULTS, relative

if TYPE_CHECKING:
    import pandas as pd

# Effects: a row is one pair's four cells for one mediator. First digit of y: the prompt, second: the mediator.
EFFECTS = {"pair_id": "str", "topic": "str", "treatment": "str", "split": "str", "site": "str", "layer": "int",
           "position": "str", "outcome": "str",
           **dict.fromkeys(("y00", "y01", "y10", "y11", "te", "nie0", "nie1"), "float")}  # fmt: skip
# Evidence: a row is one number that a verdict of the claims ledger rests on.
EVIDENCE = {"model": "str", "claim": "str", "quantity": "str", "variant": "str", "estimate": "float", "ci_low": "float",
            "ci_high": "float", "n_pairs": "int", "n_topics": "int", "note": "str"}  # fmt: skip
# What a column of a kind is called, its type once it is read, and what pandas finds in it.
KINDS: dict[str, tuple[str, Any, Sequence[str]]] = {
    "str": ("text", str, ["string"]),
    "int": ("whole numbers", "int64", ["integer"]),
    "float": ("numbers", "float64", ["floating", "integer"]),
    "bool": ("True or False", bool, ["boolean"]),
}
KnownHashes = dict[str, list[Any]]  # path -> size, time of change and sha256 of a big file: weights may be many GB
_BIG = 1 << 20  # bytes from which on a file's hash is remembered


class BrokenJson(ValueError):
    """A text that is no JSON, or JSON that cannot be worked with; `line` is where, 1 if that is not known."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(f"line {line}: {reason}")
        self.reason, self.line = reason, line


def read_utf8(path: Path) -> str:
    """The text of a file that a user wrote; `InputError` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text; `BrokenJson` with a short reason for whatever is wrong with it."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # what cannot be written cannot be hashed or tokenized either
        return value
    except json.JSONDecodeError as error:
        raise BrokenJson(error.msg, error.lineno) from None
    except (ValueError, RecursionError) as error:  # half a surrogate pair, a number of too many digits, too deep
        raise BrokenJson(str(error)) from None


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
    options: dict[str, Any] = {"sort_keys": True, "indent": 1, "allow_nan": False, "ensure_ascii": False}
    return write_text(json.dumps(value, default=lambda array: array.tolist(), **options) + "\n", path)


def read_json(path: Path | str) -> Any:
    """The value of a JSON file; `InputError` if it is missing or torn."""
    path = _existing(path)
    with explained(f"{relative(path)} is not valid JSON", _remedy(path)):
        return parse_json(path.read_text(encoding="utf-8"))


@overload
def write_table(table: NotDefined, path: Path | str) -> NotDefined: ...
@overload
def write_table(table: pd.DataFrame, path: Path | str) -> Path: ...
def write_table(table: pd.DataFrame | NotDefined, path: Path | str) -> Path | NotDefined:
    """Write a table as parquet or CSV, by the suffix, atomically and without its index; returns the path.

    CSV floats have six significant digits: what is committed must not change with the last bit of a sum. Of a `NotDefined`
    no file is left, not an older one either; it is returned, so that a notebook shows why.
    """
    path = Path(path)
    if isinstance(table, NotDefined):
        path.unlink(missing_ok=True)
        return table
    with replacing(path) as scratch:
        if path.suffix == ".parquet":
            table.to_parquet(scratch, index=False, compression="zstd", write_page_checksum=True)
        else:
            table.to_csv(scratch, index=False, float_format="%.6g", lineterminator="\n")
    return path


def read_table(path: Path | str, columns: Mapping[str, str]) -> pd.DataFrame:
    """A table whose `columns` (name -> "str", "int", "float" or "bool") are there and of that kind.

    Other columns are passed on as they are. Raises `InputError` naming file, column and what to do for whatever is wrong.
    """
    import pandas as pd
    from pandas.api.types import infer_dtype

    path = _existing(path)
    with explained(f"{relative(path)} cannot be read", _remedy(path)):
        if path.suffix == ".parquet":
            table = pd.read_parquet(path, page_checksum_verification=True)
        elif not path.read_bytes().endswith(b"\n"):
            raise ValueError("its last line is not complete")
        else:
            texts = {name: str for name, kind in columns.items() if kind == "str"}
            # Only numbers may be blank: a model called "NA" stays a text.
            blanks = {name: ["", "nan"] for name in columns if name not in texts}
            table = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=blanks)
    if missing := [name for name in columns if name not in table.columns]:
        raise InputError(f"{relative(path)} has no column {', '.join(map(repr, missing))}; {_remedy(path)}")
    for name, kind in columns.items():
        word, dtype, found = KINDS[kind]
        if len(table) and infer_dtype(table[name], skipna=False) not in found:
            have = f"column {name!r} should hold {word}, but is {table[name].dtype}"
            raise InputError(f"{relative(path)}: {have} (or has blanks); {_remedy(path)}")
        table[name] = table[name].astype(dtype)
    return table


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{relative(path)} is not there; {_remedy(path)}")
    return path


def _remedy(path: Path) -> str:
    """How to make a result file again: its number is its notebook's."""
    number = "08" if path.name == "claims.csv" else (re.match(r"(\d\db?)_", path.name) or ("", ""))[1]
    if not number or not path.resolve().is_relative_to(RESULTS):
        return "restore the file or make it again"
    slug = path.resolve().relative_to(RESULTS).parts[0]
    same = "" if slug in ("smollm2-refuser", path.name) else f" with the flags that made {slug!r}"
    return f"notebook {number} makes it: ./run_all.sh --only {number} --force{same}"


def hash_file(path: Path, known: KnownHashes) -> str:
    """The file's sha256 in hex; that of a big file is looked up in `known`, or added to it."""
    stat = path.stat()
    if stat.st_size < _BIG:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    name, seen = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    if known.get(name, [])[:2] != seen:
        with path.open("rb") as file:
            known[name] = [*seen, hashlib.file_digest(file, "sha256").hexdigest()]
    return str(known[name][2])


def hash_folder(folder: Path, known: KnownHashes, pattern: str = "*") -> dict[str, str]:
    """sha256 of each file below `folder`, by its path inside; hidden files and caches are left out. Of a file its own."""
    if folder.is_file():
        return {folder.name: hash_file(folder, known)}
    inside = [path.relative_to(folder) for path in sorted(folder.rglob(pattern)) if path.is_file()]
    return {
        name.as_posix(): hash_file(folder / name, known)
        for name in inside
        if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)
    }


def digest(*parts: Any) -> str:
    """One hash of JSON-like values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
