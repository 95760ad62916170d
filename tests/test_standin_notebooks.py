"""The code of all notebooks on the device that stands in for a GPU, and the same numbers there as on the processor.

`python tests/test_standin_notebooks.py FOLDER` runs every kind of model into FOLDER (what is there is not run again) and
writes `results/benchmarks/standin.csv`: the code cells of each notebook, and how far its effects lie from the processor's.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from companion.base.files import write_table
from companion.base.paths import ROOT, results_dir
from companion.run.runner import NEEDS

RUNS = {"grouped queries": ("grouped-query", "float32"), "windows": ("embedded", "float32"),
        "full attention": ("full-0", "float32"), "bfloat16": ("grouped-query", "bfloat16")}  # fmt: skip
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in list(RUNS)[1:]]
# Tables of effects, and how far theirs may lie from the processor's, as a share of the largest: rounding, as
# `ModelFacts.tolerance` measures it, and more where a share is divided by a total effect.
CLOSE = ("01_total_effects", "02_treatments", "02_benign", "03_heads", "03_total_direct")
EFFECTS = dict.fromkeys(CLOSE, 1e-4) | {"02_cumulative": 1e-3}
COMPARED = ("01", "02", "03")


def run(device: str, kind: str, folder: Path, *numbers: str) -> Path:
    """Runs notebooks in a process of its own; the folder with their tables."""
    script = str(ROOT / "tests" / "standin_notebooks.py")
    command = [sys.executable, script, device, *RUNS[kind], str(folder), *numbers]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
    return folder / "results" / "run"


def largest_difference(here: Path, there: Path) -> float:
    """Between the estimates of two tables, as a share of the largest of them."""
    one, two = pd.read_csv(here), pd.read_csv(there)
    assert list(one) == list(two) and len(one) == len(two), here.name
    first, second = (table.estimate.to_numpy(float) for table in (one, two))
    assert np.array_equal(np.isnan(first), np.isnan(second)), here.name
    return float(np.nanmax(np.abs(first - second)) / max(1.0, np.nanmax(np.abs(first))))


@pytest.mark.parametrize("kind", [next(iter(RUNS)), *SLOW])
def test_the_code_of_all_notebooks_runs_on_the_device(kind: str, tmp_path: Path) -> None:
    there = run("standin", kind, tmp_path / "there")
    assert len(pd.read_csv(there / "standin_times.csv")) == len(NEEDS)
    if RUNS[kind][1] == "bfloat16":
        return  # its numbers are for screening: the noise floor that it prints is what they differ by
    here = run("cpu", kind, tmp_path / "here", *COMPARED)
    for name, most in EFFECTS.items():
        assert largest_difference(here / f"{name}.csv", there / f"{name}.csv") < most, name


def main(folder: str) -> None:
    """Every kind on the device, and the compared notebooks on the processor."""
    tables = []
    for kind, (model, dtype) in RUNS.items():
        place = Path(folder).resolve() / kind.replace(" ", "-")
        found = {}
        for device, numbers in (("standin", ()), ("cpu", COMPARED)):
            found[device] = place / device / "results" / "run"
            if not (found[device] / "standin_times.csv").is_file():
                run(device, kind, place / device, *numbers)
        differences = {
            name: largest_difference(found["cpu"] / f"{name}.csv", found["standin"] / f"{name}.csv") for name in EFFECTS
        }
        table = pd.read_csv(found["standin"] / "standin_times.csv")
        worst = [
            max((value for name, value in differences.items() if name[:2] == book[:2]), default=None)
            for book in table.notebook
        ]
        tables.append(table.assign(model=model, dtype=dtype, largest_difference=worst))
    order = ["model", "dtype", "notebook", "code_cells", "largest_difference"]
    write_table(pd.concat(tables)[order], results_dir("benchmarks") / "standin.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
