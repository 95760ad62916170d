"""Start one notebook in a process of its own and say in a sentence what went wrong, if something did."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers import notebook as nb
from helpers.paths import NOTEBOOKS, ORGANISM, ROOT, relative
from helpers.preflight import names
from helpers.store import write_json, write_text

KERNEL = {
    "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
    "display_name": "Python 3",
    "language": "python",
}


def quiet() -> dict[str, str]:
    """This process's variables with those under which a library neither phones home nor depends on chance."""
    variables = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return variables | {
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # bars hold times, and would be stored in the notebooks
        "WANDB_MODE": "disabled",
    }


def environment(results: Path, figures: Path, scratch: Path) -> dict[str, str]:
    """Variables for a notebook, which sees its folders at `results` and `figures`.

    The kernel is this very Python, without the user's IPython profile, whatever kernels are registered on the machine.
    """
    write_json(KERNEL, scratch / "jupyter" / "kernels" / "python3" / "kernel.json")
    folders = {"COMPANION_RESULTS": results, "COMPANION_FIGURES": figures}
    jupyter = {"JUPYTER_PATH": scratch / "jupyter", "IPYTHONDIR": scratch / "ipython"}
    return quiet() | {name: str(path) for name, path in (folders | jupyter).items()}


def threads(model: str) -> dict[str, str]:
    """One thread for the shipped models, unless OMP_NUM_THREADS says otherwise; all there are for larger ones.

    Small products gain little from a second thread, and where the other core is busy, waiting for it costs tenfold.
    """
    return {} if "OMP_NUM_THREADS" in os.environ or model not in names(ORGANISM) else {"OMP_NUM_THREADS": "1"}


def execute(
    notebook: nb.Notebook, parameters: Mapping[str, Any], results: Path, figures: Path, log: Path
) -> tuple[str, str]:
    """Run a notebook; returns its executed text and "", or "" and a sentence with the cell and the error.

    With no parameters nothing is injected. `log` gets all that the process wrote, with the full traceback.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source, target = scratch / "source.ipynb", scratch / "target.ipynb"
        write_text(nb.text(nb.prepared(notebook)), source)
        words = [str(source), str(target), str(NOTEBOOKS), json.dumps(dict(parameters))]
        status, why = _wait(
            [sys.executable, "-m", "helpers.execute", *words],
            environment(results, figures, scratch) | threads(str(parameters.get("MODEL", "embedded"))),
            log,
        )
        if status == 0:
            return target.read_text(encoding="utf-8"), ""
        return "", f"{why or ended(status)}\n  the whole story: {relative(log)}"


def _wait(command: list[str], variables: Mapping[str, str], log: Path) -> tuple[int, str]:
    """Exit status of the command, and what it wrote into the pipe whose number is its last word.

    Ctrl-C reaches us alone and is passed on, so that the kernel is shut down. The command's standard input is a pipe from us:
    if this process is killed, it ends too.
    """
    reading, writing = os.pipe()
    with log.open("w", encoding="utf-8") as file, os.fdopen(reading, errors="replace") as told:
        with os.fdopen(writing, "wb"):  # this process's copy is closed, so that what is told has an end
            child = subprocess.Popen(
                [*command, str(writing)],
                cwd=ROOT,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[writing],
            )
        try:
            why = told.read()
            return child.wait(), why
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
            raise


def ended(status: int) -> str:
    """What an exit status says of a process that said nothing itself.

    >>> ended(-9)
    'its process was killed (was there enough memory?)'
    """
    killed = "was killed (was there enough memory?)"
    return f"its process {killed if status == -signal.SIGKILL else f'ended with status {status}'}"
