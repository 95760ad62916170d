"""Notebooks as plain JSON: what a run needs to know of one, and what it keeps of an executed one.

Only the standard library: the command line reads every notebook each time it starts.
"""

import ast
import json
from pathlib import Path
from typing import Any

from helpers.errors import InputError
from helpers.paths import relative
from helpers.store import read_json

Notebook = dict[str, Any]
Cell = dict[str, Any]

INJECTED = "injected-parameters"  # papermill's tag for the cell that it adds


def read(path: Path) -> Notebook:
    """The notebook at `path`; `InputError` if it is missing or not a notebook."""
    notebook = read_json(path)
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise InputError(f"{relative(path)} is not a notebook: it has no list of cells")
    wrong = next((place for place, cell in enumerate(notebook["cells"], start=1) if not _is_cell(cell)), None)
    if wrong is not None or not isinstance(notebook.get("metadata"), dict):
        what = "it has no metadata" if wrong is None else f"its cell {wrong} is none"
        raise InputError(f"{relative(path)} is not a notebook as Jupyter writes it: {what}; restore the file")
    return notebook


def _is_cell(cell: Any) -> bool:
    """Whether a cell has all that is read of it here, of the right kinds."""
    if not isinstance(cell, dict) or not isinstance(cell.get("metadata"), dict):
        return False
    lines, outputs, tagged = cell.get("source"), cell.get("outputs", []), cell["metadata"].get("tags", [])
    is_text = isinstance(lines, str) or (isinstance(lines, list) and all(isinstance(line, str) for line in lines))
    is_shown = isinstance(outputs, list) and all(isinstance(one, dict) and "output_type" in one for one in outputs)
    return is_text and is_shown and isinstance(tagged, list) and isinstance(cell.get("cell_type"), str)


def source(cell: Cell) -> str:
    """A cell's text; the format allows a string or a list of lines.

    >>> source({"source": ["a = 1\\n", "a"]})
    'a = 1\\na'
    """
    return "".join(cell.get("source", ""))


def tags(cell: Cell) -> list[str]:
    """A cell's tags."""
    return list(cell.get("metadata", {}).get("tags", []))


def code_cells(notebook: Notebook) -> list[Cell]:
    """The code cells that run, in order: not the empty ones, nor what papermill once injected."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and source(cell).strip()]
    return [cell for cell in cells if INJECTED not in tags(cell)]


def title(notebook: Notebook) -> str:
    """The first heading.

    >>> title({"cells": [{"cell_type": "markdown", "source": "# Layers\\ntext"}]})
    'Layers'
    """
    lines = (line for cell in notebook["cells"] for line in source(cell).splitlines())
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "(no heading)")


def parameters(notebook: Notebook, path: Path) -> dict[str, Any]:
    """Names and values of the cell tagged `parameters`; `InputError` if it is not there or not plain values."""
    tagged = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    if len(tagged) != 1:
        raise InputError(f"{relative(path)} has {len(tagged)} cells tagged 'parameters', one is expected")
    found = {}
    try:
        for statement in ast.parse(source(tagged[0])).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                found[statement.targets[0].id] = ast.literal_eval(statement.value)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{relative(path)}: its parameters must be plain values ({error})") from error
    return found


def is_executed(notebook: Notebook) -> bool:
    """Whether it was run top to bottom: execution counts 1..n and no error."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and source(cell).strip()]
    counts = [cell.get("execution_count") for cell in cells]
    errors = [out for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error"]
    return counts == list(range(1, len(cells) + 1)) and not errors


def prepared(notebook: Notebook) -> Notebook:
    """The notebook to run: without an old injected cell (papermill would leave it in) and with fixed cell ids."""
    kept = [cell for cell in notebook["cells"] if INJECTED not in tags(cell)]
    cells = [{"id": f"cell-{number:02d}", **cell} for number, cell in enumerate(kept)]
    return {"cells": cells, "metadata": _metadata(notebook), "nbformat": 4, "nbformat_minor": 5}


def cleaned(notebook: Notebook) -> Notebook:
    """The executed notebook without times, random ids and versions, so that a rerun gives the same bytes."""
    return {**notebook, "cells": [_clean_cell(cell) for cell in notebook["cells"]], "metadata": _metadata(notebook)}


def _metadata(notebook: Notebook) -> dict[str, Any]:
    dropped = ("papermill", "widgets", "kernelspec", "language_info")
    kept = {name: value for name, value in notebook["metadata"].items() if name not in dropped}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    language = {"name": "python", "file_extension": ".py", "pygments_lexer": "ipython3"}
    return {**kept, "kernelspec": kernel, "language_info": language}


def _clean_cell(cell: Cell) -> Cell:
    dropped = ("papermill", "execution")
    metadata = {name: value for name, value in cell["metadata"].items() if name not in dropped}
    if not metadata.get("tags", True):
        del metadata["tags"]
    clean = {**cell, "metadata": metadata}
    if INJECTED in tags(cell):
        clean["id"] = INJECTED
    if cell["cell_type"] == "code":
        clean["outputs"] = _joined(cell["outputs"])
    return clean


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring pieces of one stream as one: where a print is cut depends on the clock."""
    joined: list[dict[str, Any]] = []
    for out in outputs:
        if joined and out["output_type"] == "stream" and joined[-1].get("name") == out["name"]:
            whole = "".join([*joined[-1]["text"], *out["text"]])
            joined[-1] = {**out, "text": whole.splitlines(keepends=True)}
        else:
            joined.append(out)
    return joined


def text(notebook: Notebook) -> str:
    """The file's content, as Jupyter writes it."""
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
