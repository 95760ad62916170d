"""Run one notebook in this process (the runner starts one process for each).

`python -m helpers.execute SOURCE TARGET REPORT CWD PARAMETERS` executes SOURCE into TARGET with the JSON object
PARAMETERS injected (none if it is empty). If a cell fails, REPORT says which and why, and the exit status is 1.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from helpers import notebook as nb
from helpers.store import write_json, write_text


def main(arguments: list[str]) -> int:
    """Execute, and write either the cleaned notebook or the report of the failure."""
    source, target, report = (Path(argument) for argument in arguments[:3])
    cwd, parameters = arguments[3], json.loads(arguments[4])
    import papermill
    from papermill.exceptions import PapermillExecutionError

    options = {"kernel_name": "python3", "cwd": cwd, "progress_bar": False}
    try:
        papermill.execute_notebook(source, target, parameters=parameters, **options)
    except PapermillExecutionError as error:
        cell = cell_number(nb.read(source), error.cell_index, injected=bool(parameters))
        failure = {"cell": cell, "name": error.ename, "message": error.evalue}
        return _failed(report, failure, "\n".join(error.traceback))
    write_text(nb.text(nb.cleaned(nb.read(target))), target)
    return 0


def cell_number(notebook: nb.Notebook, index: int, *, injected: bool) -> int:
    """Which code cell of the notebook as written (1, 2, ...) stands at `index` of the notebook that ran.

    >>> cells = [{"cell_type": kind, "source": "x", "metadata": {}} for kind in ("markdown", "code", "code")]
    >>> cells[1]["metadata"]["tags"] = ["parameters"]
    >>> cell_number({"cells": cells}, 2, injected=False), cell_number({"cells": cells}, 3, injected=True)
    (2, 2)
    """
    tagged = [i for i, cell in enumerate(notebook["cells"]) if "parameters" in nb.tags(cell)]
    if injected and tagged and index > tagged[0]:
        index -= 1
    return len(nb.code_cells({"cells": notebook["cells"][: index + 1]}))


def _failed(report: Path, failure: dict[str, Any], traceback: str) -> int:
    write_json(failure, report)
    print(re.sub(r"\x1b\[[0-9;]*m", "", traceback), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
