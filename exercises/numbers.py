"""Numbers in prose come from result tables: each stands behind a comment that says from which cell of which table.

`<!--=03_evidence quantity="MLP share of NIE": estimate-->0.67` is the column `estimate` of the one row of
`results/SLUG/03_evidence.csv` with those values, of the default run or, as in `SLUG/03_evidence`, of another; `estimate*100`
is for percent. Digits behind the point are kept as they stand. Readers see the number alone. A row of the run's own model, and of
the variant "main", is meant unless another is named.
"""

from __future__ import annotations

import re
from functools import cache

import pandas as pd

from companion.base.errors import InputError
from companion.base.paths import RESULTS, relative
from companion.run.overview import DEFAULT

MARK = re.compile(r"<!--=(?P<table>(?:[\w-]+/)?\w+)"
                  r'(?P<where>(?: \w+=(?:"[^"]*"|[^\s:]+))*): (?P<column>\w+)(?P<percent>\*100)?-->'
                  r"(?P<number>[+−-]?[\d,]*\.?\d+)")  # fmt: skip
_WHERE = re.compile(r'(\w+)=(?:"([^"]*)"|([^\s:]+))')


@cache
def _table(name: str) -> pd.DataFrame:
    slug, _, table = name.rpartition("/")
    path = RESULTS / (slug or DEFAULT) / f"{table}.csv"
    if not path.is_file():
        raise InputError(f"a number in prose: {relative(path)} is not there: ./run_all.sh makes it")
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def cell(name: str, where: str, column: str) -> float:
    """The number in a column of the one row of a table in which each named column holds the given text.

    Raises InputError where no row, or more than one, is meant.
    """
    rows, usual = _table(name), {"model": name.rpartition("/")[0] or DEFAULT, "variant": "main"}
    named = {key: quoted or plain for key, quoted, plain in _WHERE.findall(where)}
    for key, value in ({key: value for key, value in usual.items() if key in rows} | named).items():
        rows = rows[rows[key] == value]
    if len(rows) != 1:
        raise InputError(f"a number in prose: {len(rows)} rows of {name}.csv have{where}, one is expected")
    return float(rows[column].iloc[0])


def written(value: float, like: str) -> str:
    """The value with as many digits behind the point as `like`, and its kinds of signs.

    >>> written(0.6789, "0.5"), written(-1234.5, "+1,000"), written(2.0, "+1.00"), written(-0.5, "−1.0")
    ('0.7', '-1,234', '+2.00', '−0.5')
    """
    digits = len(like.partition(".")[2])
    text = format(value, f"{'+' if like[0] == '+' else ''}{',' if ',' in like else ''}.{digits}f")
    return text.replace("-", "−") if like[0] == "−" else text


def filled(text: str) -> str:
    """The text with each marked number as its table has it today."""

    def number(found: re.Match[str]) -> str:
        value = cell(found["table"], found["where"], found["column"]) * (100 if found["percent"] else 1)
        return found.group()[: -len(found["number"])] + written(value, found["number"])

    return MARK.sub(number, text)
