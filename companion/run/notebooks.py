"""Notebooks as plain JSON, and how one is run in a process of its own. Only the standard library is imported here.

The runner starts `python -m companion.run.notebooks SOURCE TARGET CWD PARAMETERS PIPE`, which executes SOURCE into TARGET with
the JSON object PARAMETERS injected; if that fails, the open file of number PIPE gets a line that says which cell and why.
"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from companion.base.errors import InputError
from companion.base.files import read_json, write_json, write_text
from companion.base.folders import is_small
from companion.base.paths import NOTEBOOKS, ROOT, relative
from companion.base.smollm2 import REFUSES

Notebook = dict[str, Any]
Cell = dict[str, Any]
INJECTED = "injected-parameters"  # papermill's tag for the cell that it adds
TARGET = "target.ipynb"
# The kernel is this very Python, whatever kernels are registered on the machine.
KERNEL = {
    "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
    "display_name": "Python 3", "language": "python",
}  # fmt: skip
# Where the system's allocator is glibc's: memory that was freed is kept. Sweeps free and ask for the same sizes all the time,
# and a page that comes anew from the system costs some systems more than what is computed on it. Very large pieces go back
# all the same: between kept ones they would leave gaps that nothing fits into.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**26),
}  # fmt: skip
# Variables under which a library neither phones home nor depends on chance; bars hold times, which would be stored.
DETERMINISTIC = {
    "PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": "0",
    "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "WANDB_MODE": "disabled",
}  # fmt: skip


def read_notebook(path: Path) -> Notebook:
    """The notebook at `path`; `InputError` if it is missing or is none."""
    notebook = read_json(path)
    try:  # once, all that is done with a notebook and its cells
        dict(notebook["metadata"].items())
        for cell in notebook["cells"]:
            source(cell).strip(), tags(cell), cell["cell_type"].strip()
            [out["output_type"] for out in cell.get("outputs", [])]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{relative(path)} is not a notebook as Jupyter writes it: restore the file") from error
    return dict(notebook)


def source(cell: Cell) -> str:
    """A cell's text; the format allows a string or a list of lines."""
    return "".join(cell["source"])


def tags(cell: Cell) -> list[str]:
    """A cell's tags."""
    return list(cell["metadata"].get("tags", []))


def code_cells(notebook: Notebook) -> list[Cell]:
    """The code cells that run, in order: not the empty ones, nor what papermill once injected."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and source(cell).strip()]
    return [cell for cell in cells if INJECTED not in tags(cell)]


def notebook_title(notebook: Notebook) -> str:
    """The first heading."""
    lines = (line for cell in notebook["cells"] for line in source(cell).splitlines())
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "(no heading)")


def notebook_parameters(notebook: Notebook) -> dict[str, Any]:
    """Names and values of the cell tagged `parameters`; empty if it is not there or has anything but plain values."""
    text = "\n".join(source(cell) for cell in code_cells(notebook) if "parameters" in tags(cell))
    try:
        statements = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
        return {ast.unparse(node.targets[0]): ast.literal_eval(node.value) for node in statements}
    except (SyntaxError, ValueError):
        return {}


def is_executed(notebook: Notebook) -> bool:
    """Whether it was run top to bottom: execution counts 1..n and no error."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and source(cell).strip()]
    counts = [cell.get("execution_count") for cell in cells]
    errors = [out for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error"]
    return counts == list(range(1, len(cells) + 1)) and not errors


def prepared(notebook: Notebook) -> Notebook:
    """The notebook to run: without an old injected cell (papermill would leave it in) and with fixed cell ids."""
    kept = (cell for cell in notebook["cells"] if INJECTED not in tags(cell))
    cells = [{"id": f"cell-{number:02d}", **cell} for number, cell in enumerate(kept)]
    return {"cells": cells, "metadata": _metadata(notebook), "nbformat": 4, "nbformat_minor": 5}


def cleaned(notebook: Notebook) -> Notebook:
    """The executed notebook without times, random ids and versions, so that a rerun gives the same bytes."""
    cells = []
    for cell in notebook["cells"]:
        metadata = {name: value for name, value in cell["metadata"].items() if name not in ("papermill", "execution")}
        if not metadata.get("tags", True):
            del metadata["tags"]
        clean = {**cell, "metadata": metadata}
        if INJECTED in tags(cell):
            clean["id"] = INJECTED
        if cell["cell_type"] == "code":
            clean["outputs"] = _joined(cell["outputs"])
        cells.append(clean)
    return {**notebook, "cells": cells, "metadata": _metadata(notebook)}


def _metadata(notebook: Notebook) -> dict[str, Any]:
    dropped = ("papermill", "widgets", "kernelspec", "language_info")
    kept = {name: value for name, value in notebook["metadata"].items() if name not in dropped}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    language = {"name": "python", "file_extension": ".py", "pygments_lexer": "ipython3"}
    return {**kept, "kernelspec": kernel, "language_info": language}


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


def notebook_text(notebook: Notebook) -> str:
    """The file's content, as Jupyter writes it."""
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def quiet() -> dict[str, str]:
    """This process's variables, with those of `DETERMINISTIC`."""
    return {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | DETERMINISTIC


def environment(scratch: Path) -> dict[str, str]:
    """Variables for a notebook, which sees `results` and `figures` in `scratch` and no IPython profile of the user's."""
    write_json(KERNEL, scratch / "jupyter" / "kernels" / "python3" / "kernel.json")
    folders = {"COMPANION_RESULTS": scratch / "results", "COMPANION_FIGURES": scratch / "figures"}
    folders |= {"JUPYTER_PATH": scratch / "jupyter", "IPYTHONDIR": scratch / "ipython"}
    return quiet() | ALLOCATOR | {name: str(path) for name, path in folders.items()}


def threads(model: str) -> dict[str, str]:
    """One thread for small models, unless OMP_NUM_THREADS says otherwise: waiting for a second one may cost them tenfold."""
    return {} if "OMP_NUM_THREADS" in os.environ or not is_small(model) else {"OMP_NUM_THREADS": "1"}


def start_notebook(
    notebook: Notebook, parameters: Mapping[str, Any], folder: Path, log: Path
) -> tuple[subprocess.Popen[bytes], IO[str]]:
    """Start a notebook, which writes into `folder`/results, `folder`/figures and `folder`/target.ipynb, and all it says to `log`.

    Returns its process and a pipe on which that says what went wrong. With no parameters nothing is injected. The process
    ends when its standard input closes, as where the runner was killed; Ctrl-C does not reach it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    write_text(notebook_text(prepared(notebook)), folder / "source.ipynb")
    variables = environment(folder) | threads(str(parameters.get("MODEL", REFUSES)))
    reading, writing = os.pipe()
    words = [str(folder / "source.ipynb"), str(folder / TARGET), str(NOTEBOOKS), json.dumps(dict(parameters))]
    with log.open("w", encoding="utf-8") as file, os.fdopen(writing, "wb"):  # our end is closed, so the pipe has an end
        process = subprocess.Popen(
            [sys.executable, "-m", "companion.run.notebooks", *words, str(writing)], cwd=ROOT, env=variables,
            stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[writing],
        )  # fmt: skip
    return process, os.fdopen(reading, errors="replace")


def main(arguments: list[str]) -> int:
    """Execute a notebook and write it cleaned, or say through the pipe what went wrong."""
    source, target, cwd, parameters, pipe = arguments
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    try:
        problem, story = _executed(Path(source), Path(target), cwd, json.loads(parameters))
    except Exception as error:
        problem, story = _sentence(type(error).__name__, str(error)), traceback.format_exc()
    if problem:
        os.write(int(pipe), problem.encode("utf-8", errors="replace"))
        print(re.sub(r"\x1b\[[0-9;]*m", "", story), file=sys.stderr)
    return int(bool(problem))


def _end_with_the_runner() -> None:
    """Wait for the end of standard input, then end this process and its group; the kernel sees that its parent has gone."""
    os.read(0, 1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _executed(source: Path, target: Path, cwd: str, parameters: dict[str, Any]) -> tuple[str, str]:
    """Two empty texts; or, if a cell failed, which and why in a line, and the traceback."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    options = {"parameters": parameters, "kernel_name": "python3", "cwd": cwd, "progress_bar": False}
    try:
        papermill.execute_notebook(source, target, **options)
    except PapermillExecutionError as error:
        cell = _answered(read_notebook(target))
        return f"code cell {cell}: {_sentence(error.ename, error.evalue)}", "\n".join(error.traceback)
    except DeadKernelError as error:
        why = "DeadKernelError: the kernel died (was there enough memory?)"
        return f"code cell {_answered(read_notebook(target)) + 1}: {why}", str(error)
    write_text(notebook_text(cleaned(read_notebook(target))), target)
    return "", ""


def _sentence(name: str, message: str) -> str:
    """The last line of an error's message after its name; an InputError is written for the user, and needs no name."""
    last = next((line.strip() for line in reversed(message.splitlines()) if line.strip()), "")
    return last if name == "InputError" else f"{name}: {last}".removesuffix(": ")


def _answered(notebook: Notebook) -> int:
    """How many code cells of the notebook as written ran to an end, be it an error; papermill notes each reply."""
    notes = [cell["metadata"].get("execution", {}) for cell in code_cells(notebook)]
    return sum("shell.execute_reply" in note for note in notes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
