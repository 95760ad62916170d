"""Run one notebook in this process (the runner starts one process for each).

`python -m helpers.execute SOURCE TARGET CWD PARAMETERS PIPE` executes SOURCE into TARGET with the JSON object PARAMETERS
injected (none if it is empty). If that fails, the exit status is 1, and the open file of number PIPE gets a line that says
which cell and why: a pipe takes it also where a full disk takes no file.
"""

import json
import os
import re
import signal
import stat
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from helpers import notebook as nb
from helpers.store import write_text


def main(arguments: list[str]) -> int:
    """Execute, and write the cleaned notebook, or say what went wrong."""
    source, target, cwd, parameters, pipe = arguments
    try:
        problem, traceback = _executed(Path(source), Path(target), cwd, json.loads(parameters))
    except OSError as error:
        place = f"its notebook could not be run or saved in {tempfile.gettempdir()}"
        _tell(pipe, f"{error.strerror or error}: {place}: make room, or set TMPDIR to another disk, and run again")
        raise
    except Exception as error:
        _tell(pipe, _sentence(type(error).__name__, str(error)))
        raise
    if problem:
        _tell(pipe, problem)
        print(re.sub(r"\x1b\[[0-9;]*m", "", traceback), file=sys.stderr)
    return int(bool(problem))


def _executed(source: Path, target: Path, cwd: str, parameters: dict[str, Any]) -> tuple[str, str]:
    """Two empty texts; or, if a cell failed, which and why in a line, and the traceback."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    options = {"kernel_name": "python3", "cwd": cwd, "progress_bar": False}
    try:
        papermill.execute_notebook(source, target, parameters=parameters, **options)
    except PapermillExecutionError as error:
        cell = answered(nb.read(target))
        return f"code cell {cell}: {_sentence(error.ename, error.evalue)}", "\n".join(error.traceback)
    except DeadKernelError as error:
        why = "DeadKernelError: the kernel died (was there enough memory?)"
        return f"code cell {answered(nb.read(target)) + 1}: {why}", str(error)
    write_text(nb.text(nb.cleaned(nb.read(target))), target)
    return "", ""


def _sentence(name: str, message: str) -> str:
    """The last line of an error's message after its name; an InputError is written for the user and says all there is to say.

    >>> _sentence("KeyError", "'a'"), _sentence("InputError", "no model: name one"), _sentence("MemoryError", "")
    ("KeyError: 'a'", 'no model: name one', 'MemoryError')
    """
    last = next((line.strip() for line in reversed(message.splitlines()) if line.strip()), "")
    return last if name == "InputError" else f"{name}: {last}".removesuffix(": ")


def _tell(pipe: str, line: str) -> None:
    os.write(int(pipe), line.encode("utf-8", errors="replace"))


def answered(notebook: nb.Notebook) -> int:
    """How many code cells of the notebook as written ran to an end, be it an error; papermill notes each reply.

    >>> cells = [{"cell_type": "code", "source": "x", "metadata": {"execution": {"shell.execute_reply": "12:00"}}}]
    >>> answered({"cells": cells + [{"cell_type": "code", "source": "x", "metadata": {}}]})
    1
    """
    notes = [cell["metadata"].get("execution", {}) for cell in nb.code_cells(notebook)]
    return sum("shell.execute_reply" in note for note in notes)


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
    if has_runner():
        threading.Thread(target=end_with_the_runner, daemon=True).start()
    sys.exit(main(sys.argv[1:]))
