"""`./run_all.sh --lab`: JupyterLab at the first notebook, with the kernel of the companion's own environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.paths import ROOT

FIRST = "notebooks/00_start_here.ipynb"


def command(root: Path = ROOT, first: str = FIRST, *options: str) -> list[str]:
    """Serve the repository, so that links between folders work, and open one notebook."""
    lab = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
    return [*lab, f"--LabApp.default_url=/lab/tree/{first}", *options]


def environment() -> dict[str, str]:
    """This environment, in which a kernel called `python3` that the user has elsewhere does not come first."""
    return {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1", "WANDB_MODE": "disabled"}


def run() -> int:
    """Open JupyterLab and wait until it is closed."""
    return subprocess.run(command(), env=environment(), cwd=ROOT, check=False).returncode
