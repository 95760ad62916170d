"""The claims ledger on a terminal."""

import csv
import textwrap
from pathlib import Path


def claims_table(path: Path, slug: str, width: int) -> str:
    """The verdicts on a run's own model as aligned text, the last column wrapped at `width` characters.

    Without a row for the model `slug` all rows are shown; without a row or a file nothing is.
    """
    if not path.is_file():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return ""
    own = [{name: row[name] for name in row if name != "model"} for row in rows if row.get("model") == slug] or rows
    columns = list(own[0])
    return "\n".join(aligned([columns, *([row[name] for name in columns] for row in own)], width))


def aligned(rows: list[list[str]], width: int) -> list[str]:
    """Lines of a table whose columns are padded and whose last column is wrapped.

    Where the padded columns leave it too little room, it stands below each row instead.

    >>> aligned([["claim", "why"], ["C1", "one two three"]], 15)
    ['claim  why', 'C1     one two', '       three']
    >>> aligned([["claim" + 8 * "-", "why"], ["C1", "one two three"]], 15)
    ['claim--------', '  why', 'C1', '  one two three']
    """
    *widths, _ = [max(map(len, column)) for column in zip(*rows, strict=True)]
    indent = sum(widths) + 2 * len(widths)
    is_narrow = indent > width / 2
    lines = []
    for *cells, last in rows:
        first = "".join(cell.ljust(size + 2) for cell, size in zip(cells, widths, strict=True))
        if is_narrow:
            lines += [first.rstrip(), *textwrap.wrap(last, width, initial_indent="  ", subsequent_indent="  ")]
            continue
        wrapped = textwrap.wrap(last, max(width - indent, 8)) or [""]
        lines += [(first + wrapped[0]).rstrip(), *(" " * indent + line for line in wrapped[1:])]
    return lines
