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
from helpers.store import read_json, write_json, write_text

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
        source, target, report = (scratch / name for name in ("source.ipynb", "target.ipynb", "report.json"))
        write_text(nb.text(nb.prepared(notebook)), source)
        paths = [str(path) for path in (source, target, report, NOTEBOOKS)]
        command = [sys.executable, "-m", "helpers.execute", *paths, json.dumps(dict(parameters))]
        status = _wait(
            command, environment(results, figures, scratch) | threads(str(parameters.get("MODEL", "embedded"))), log
        )
        if status == 0:
            return target.read_text(encoding="utf-8"), ""
        return "", f"{_reason(report, status)}\n  the whole story: {relative(log)}"


def _wait(command: list[str], variables: Mapping[str, str], log: Path) -> int:
    """Exit status of the command. Ctrl-C reaches us alone and is passed on, so that the kernel is shut down.

    The command holds the other end of a pipe: if this process is killed, it ends too.
    """
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
            raise


def _reason(report: Path, status: int) -> str:
    if not report.is_file():
        killed = " (killed: was there enough memory?)" if status == -signal.SIGKILL else ""
        return f"its process ended with status {status}{killed}"
    failure = read_json(report)
    last = next((line.strip() for line in reversed(failure["message"].splitlines()) if line.strip()), "")
    # An InputError is written for the user and says all there is to say.
    what = last if failure["name"] == "InputError" else f"{failure['name']}: {last}".removesuffix(": ")
    return f"code cell {failure['cell']}: {what}"
