"""Parts of a sweep on disk: one for each batch, written whole or not at all, and only read if it is what it should be.

A part lies in a folder named by everything that its numbers rest on (weights, prompts, code, precision, kind of device)
and carries that name, its batch and a checksum of its content. One that is missing, torn, foreign or out of date is
measured again, never trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from helpers import freshness, grid_chunks, paths, positions, store
from helpers.staging import PARTS
from helpers.tokens import TokenPair

if TYPE_CHECKING:
    from helpers.study import Study
    from helpers.sweeps import Sweep

STAMP = "part"


def home(slug: str) -> Path:
    """Where a run's parts lie; the folder is there only if the run was sharded."""
    return paths.RESULTS / paths.check_slug(slug) / PARTS


def place(study: Study, sweep: str) -> Path | None:
    """The folder of this sweep's parts, or None for a run that keeps none."""
    return home(study.slug) / key(study, sweep) if home(study.slug).is_dir() else None


def make(study: Study, sweep: str) -> Path:
    """The same, made if it is not there."""
    folder = home(study.slug) / key(study, sweep)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def key(study: Study, sweep: str) -> str:
    """A name that changes with anything that the numbers of a sweep rest on."""
    subject = study.subject
    config = {name: repr(value) for name, value in subject.model.config.to_dict().items() if name[0] != "_"}
    kind = [str(subject.dtype), subject.device.type, subject.model.config._attn_implementation]
    header = positions.user_header(subject.tokenizer) if subject.tokenizer is not None else ""
    pairs = [repr((p.pair, *(part.tolist() for part in _tokens(p)))) for p in study.pairs]
    openers = {name: asdict(one) for name, one in study.openers.items()}
    return freshness.digest(sweep, subject.sha256, config, kind, header, pairs, openers, _code())[:32]


def _tokens(pair: TokenPair) -> tuple[np.ndarray, ...]:
    return pair.control, pair.treated, pair.control_offsets, pair.treated_offsets


@cache
def _code() -> str:
    helpers = freshness.hash_folder(paths.ROOT / "helpers", {}, "*.py")
    return freshness.digest(helpers, freshness.hash_file(paths.ROOT / "requirements.lock", {}))


def measured(
    folder: Path | None, batch: int, group: Sequence[TokenPair], sweep: Sweep, study: Study
) -> Mapping[str, pd.DataFrame]:
    """A batch's tables: read if its part is there and whole, else measured and, if parts are kept, written."""
    found = None if folder is None else read(folder, batch, sweep.tables)
    if found is not None:
        return found
    before = len(grid_chunks.chunk_events())
    tables = sweep.measure(study, group)
    if folder is not None:
        events = list(grid_chunks.chunk_events()[before:])
        for name, table in tables.items():
            write(table, folder, batch, name, events)
    return tables


def write(table: pd.DataFrame, folder: Path, batch: int, name: str, events: Sequence[str] = ()) -> Path:
    """Write one table of a batch with its stamp; `events` are chunks that had to be halved for want of memory."""
    stamped = table.copy(deep=False)
    stamped.attrs = {STAMP: _stamp(folder, batch, name, table, list(events))}
    return store.write_table(stamped, _path(folder, batch, name))


def read(folder: Path, batch: int, names: Sequence[str]) -> dict[str, pd.DataFrame] | None:
    """The tables of a batch, or None unless all of them are there, whole and made for this place."""
    found: dict[str, pd.DataFrame] = {}
    events: list[str] = []
    for name in names:
        part = _whole(folder, batch, name)
        if part is None:
            return None
        found[name], events = part
    grid_chunks.note_events(events)
    return found


def _stamp(folder: Path, batch: int, name: str, table: pd.DataFrame, events: list[str]) -> dict[str, Any]:
    whole = freshness.digest(content(table), events)
    return {"key": folder.name, "batch": batch, "table": name, "events": events, "content": whole}


def _whole(folder: Path, batch: int, name: str) -> tuple[pd.DataFrame, list[str]] | None:
    """A table and its events; None if it is not there, or not as it was written: it is then measured again."""
    path = _path(folder, batch, name)
    if not path.is_file():
        return None
    try:
        table = pd.read_parquet(path)
        stamp = table.attrs.pop(STAMP)
        is_whole = stamp == _stamp(folder, batch, name, table, stamp["events"])
    except Exception:  # bytes that changed fail anywhere: in pyarrow, in pandas, in the checksum of what was read
        return None
    return (table.reset_index(drop=True), stamp["events"]) if is_whole else None


def content(table: pd.DataFrame) -> str:
    """Checksum of a table's names, kinds and values.

    >>> one = pd.DataFrame({"a": [1.0, 2.0]})
    >>> content(one) == content(one.copy()) != content(one.assign(a=[1.0, 2.5]))
    True
    """
    digest = hashlib.sha256(repr([(name, str(kind)) for name, kind in table.dtypes.items()]).encode())
    digest.update(pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes())
    return digest.hexdigest()


def _path(folder: Path, batch: int, name: str) -> Path:
    return folder / f"{batch:05d}.{name}.parquet"
