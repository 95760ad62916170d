"""A campaign measures a plan item by item, can stop and go on, and joins what it has into the tables of `data/calibration`.

Each item is one file a table below `data/calibration/.parts`. What is there is not measured again, also if the code has changed
since: rows name the code that made them. To measure everything again, remove `data/calibration`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TypeVar

import pandas as pd

from companion.base import files, paths
from companion.base.errors import InputError

Item = TypeVar("Item")
# Columns of the shipped tables. A row of `verdicts` is a draw, claim and rule; `truth` is what was built.
VERDICTS = {
    **dict.fromkeys(("kind", "claim", "rule", "truth", "verdict", "gate", "quantity", "reason", "code"), "str"),
    **dict.fromkeys(("seed", "topics", "pairs"), "int"),
    **dict.fromkeys(("effect", "estimate", "ci_low", "ci_high"), "float"),
    "purpose": "str",  # what the draw was made for
}
SCORES = {**dict.fromkeys(("kind", "estimator", "what"), "str"), "seed": "int", "value": "float"}
SCHEMAS: Mapping[str, Mapping[str, str]] = {
    "verdicts": VERDICTS,
    "localisation": SCORES,
    "evidence": {**dict.fromkeys(("kind", "part"), "str"), "seed": "int", **files.EVIDENCE},
    "population": {
        **dict.fromkeys(("kind", "claim", "rule", "population_verdict", "code"), "str"),
        "seed": "int", "population": "float",
    },
    "knock_outs": {
        **dict.fromkeys(("kind", "site"), "str"), "seed": "int", **dict.fromkeys(("decider", "bystander"), "float"),
        **dict.fromkeys(("late", "is_mlp", "is_late"), "bool"),
    },
    "real_plants": {
        **dict.fromkeys(("kind", "adapter", "treatment", "effect", "of", "where", "code"), "str"),
        "learned": "bool", **dict.fromkeys(("size", "share", "low", "high", "te"), "float"),
        **dict.fromkeys(("pairs", "topics"), "int"),
    },
}  # fmt: skip
# What tells the rows of a table apart, in the order by which they are sorted.
KEYS = {
    "verdicts": ["purpose", "kind", "seed", "topics", "pairs", "effect", "claim", "rule"],
    "localisation": ["kind", "seed", "estimator", "what"],
    "evidence": ["part", "kind", "seed", "model", "claim", "quantity", "variant"],
    "population": ["kind", "claim", "rule", "seed"],
    "knock_outs": ["kind", "seed"],
    "real_plants": ["kind", "treatment", "effect", "of", "where"],
}


def read_shipped(table: str, folder: Path = paths.CALIBRATION, *, or_empty: bool = False) -> pd.DataFrame:
    """A table of `SCHEMAS`. InputError if it is not there, or with `or_empty` a table without rows."""
    path, schema = folder / f"{table}.parquet", SCHEMAS[table]
    if or_empty and not path.is_file():
        kinds = {"int": "int64", "float": "float64", "bool": "bool", "str": "object"}
        return pd.DataFrame(columns=list(schema)).astype({name: kinds[kind] for name, kind in schema.items()})
    return files.read_table(path, schema)


@cache
def code_version() -> str:
    """Hash of the library's code, by which a row names the code that made it."""
    return files.digest(*(files.hash_folder(paths.ROOT / name, {}, "*.py") for name in ("companion", "organisms")))[:12]


def run_campaign(
    plan: Mapping[str, Item], measure: Callable[[Item], Mapping[str, pd.DataFrame]], tables: tuple[str, ...],
    is_shipped: Callable[[Item], bool], share: str = "1/1", folder: Path = paths.CALIBRATION,
) -> None:  # fmt: skip
    """Measure every item of this share ("2/3": the second of three) that is neither shipped nor a file, and join all.

    `plan` names the items; `measure` gives an item's rows of each of the `tables`. Several shares may run at once, and stopping
    loses at most one item. InputError for a share that is none.
    """
    own = list(plan.items())[slice(*every(share))]
    written = {path.name for path in (folder / ".parts").glob("*.parquet")}
    wanted = {name: {f"{name}.{table}.parquet" for table in tables} for name in plan}
    missing = [(name, item) for name, item in own if not is_shipped(item) and not wanted[name] <= written]
    print(f"{tables[0]}: {len(own) - len(missing)} of {len(own)} are there", flush=True)
    start = time.monotonic()
    try:
        for done, (name, item) in enumerate(missing, start=1):
            for table, rows in measure(item).items():
                files.write_table(rows, folder / ".parts" / f"{name}.{table}.parquet")
            gc.collect()  # a model and its kept runs lie in cycles, which a few large objects do not make Python look for
            each = (time.monotonic() - start) / done
            left = each * (len(missing) - done) / 60
            print(f"{done}/{len(missing)} {name}: {each:.0f} s each, about {left:.0f} min left", flush=True)
    finally:
        print(f"joined: {join_parts(tables, folder)} rows of {tables[0]}", flush=True)


def every(share: str) -> tuple[int, None, int]:
    """Start, stop and step of a share such as "2/3": the second of three. InputError for anything else."""
    try:
        place, n = (int(word) for word in share.split("/"))
    except ValueError:
        place, n = 0, 0
    if not 1 <= place <= n:
        raise InputError(f"--recalibrate {share}: expected a share such as 1/2, the first of two")
    return place - 1, None, n


def join_parts(tables: tuple[str, ...], folder: Path = paths.CALIBRATION) -> int:
    """Put all parts, also those of earlier joins, into the shipped tables; the number of rows of the first table."""
    for name in tables:
        shipped, key = folder / f"{name}.parquet", KEYS[name]
        parts = [*([shipped] if shipped.is_file() else []), *sorted((folder / ".parts").glob(f"*.{name}.parquet"))]
        found = [rows for path in parts if len(rows := pd.read_parquet(path))]
        if found:
            joined = pd.concat(found, ignore_index=True).drop_duplicates(key, keep="last").sort_values(key)
            files.write_table(joined[list(SCHEMAS[name])], shipped)
    return len(read_shipped(tables[0], folder, or_empty=True))
