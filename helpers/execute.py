"""Run one notebook in this process (the runner starts one process for each).

`python -m helpers.execute SOURCE TARGET REPORT CWD PARAMETERS` executes SOURCE into TARGET with the JSON object
PARAMETERS injected (none if it is empty). If a cell fails, REPORT says which and why, and the exit status is 1.
"""

import json
import os
import re
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import Any

from helpers import notebook as nb
from helpers.store import write_json, write_text


def main(arguments: list[str]) -> int:
    """Execute, and write either the cleaned notebook or the report of the failure."""
    source, target, report = (Path(argument) for argument in arguments[:3])
    cwd, parameters = arguments[3], json.loads(arguments[4])
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    options = {"kernel_name": "python3", "cwd": cwd, "progress_bar": False}
    try:
        papermill.execute_notebook(source, target, parameters=parameters, **options)
    except PapermillExecutionError as error:
        failure = {"cell": answered(nb.read(target)), "name": error.ename, "message": error.evalue}
        return _failed(report, failure, "\n".join(error.traceback))
    except DeadKernelError as error:
        why = "the kernel died (was there enough memory?)"
        failure = {"cell": answered(nb.read(target)) + 1, "name": "DeadKernelError", "message": why}
        return _failed(report, failure, str(error))
    write_text(nb.text(nb.cleaned(nb.read(target))), target)
    return 0


def answered(notebook: nb.Notebook) -> int:
    """How many code cells of the notebook as written ran to an end, be it an error; papermill notes each reply.

    >>> cells = [{"cell_type": "code", "source": "x", "metadata": {"execution": {"shell.execute_reply": "12:00"}}}]
    >>> answered({"cells": cells + [{"cell_type": "code", "source": "x", "metadata": {}}]})
    1
    """
    notes = [cell["metadata"].get("execution", {}) for cell in nb.code_cells(notebook)]
    return sum("shell.execute_reply" in note for note in notes)


def _failed(report: Path, failure: dict[str, Any], traceback: str) -> int:
    write_json(failure, report)
    print(re.sub(r"\x1b\[[0-9;]*m", "", traceback), file=sys.stderr)
    return 1


def end_with_the_runner() -> None:
    """End this process when the runner's end of its standard input closes, also where the runner was killed.

    The kernel sees that its parent has gone and ends as well. Without this a killed run would go on computing, unseen.
    """
    os.read(0, 1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def has_runner() -> bool:
    """Whether a runner started this process: in a session of its own, with a pipe as its standard input.

    One that was started by hand goes on to its end, whatever its standard input is.
    """
    return os.getsid(0) == os.getpid() and stat.S_ISFIFO(os.fstat(0).st_mode)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_runner, daemon=True).start()
    sys.exit(main(sys.argv[1:]))
