"""The code of all notebooks on the device that stands in for a GPU, and the same numbers there as on the processor.

`python tests/test_standin_notebooks.py FOLDER` runs every kind of model into FOLDER (what is there is not run again) and
writes `results/benchmarks/standin.csv`: the code cells of each notebook, and how far its effects lie from the processor's.
With DEVICE MODEL DTYPE [01 02 ...] behind FOLDER it runs notebooks in this process, as the tests do in one of its own.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from safetensors.torch import load_file, save_file

from companion.base.files import write_table
from companion.base.paths import NOTEBOOKS, ORGANISM, results_dir
from companion.run import notebooks, runner
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
    variables = {"COMPANION_RESULTS": folder / "results", "COMPANION_FIGURES": folder / "figures"}
    variables |= {"COMPANION_STRICT": 1, "TQDM_DISABLE": 1, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": 1}
    places = os.environ | {name: str(value) for name, value in variables.items()}
    places["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, __file__, str(folder), device, *RUNS[kind], *numbers]
    done = subprocess.run(command, capture_output=True, text=True, env=places, check=False)
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
        worst = pd.Series(differences).groupby(lambda name: name[:2]).max()
        table = pd.read_csv(found["standin"] / "standin_times.csv")
        tables.append(table.assign(model=model, dtype=dtype, largest_difference=table.notebook.str[:2].map(worst)))
    order = ["model", "dtype", "notebook", "code_cells", "largest_difference"]
    write_table(pd.concat(tables)[order], results_dir("benchmarks") / "standin.csv")


def grouped_query(folder: Path) -> Path:
    """The embedded model with twice the query heads, two on each key head, each writing half of what the one wrote."""
    shutil.copytree(ORGANISM / "window-0", folder)
    config = json.loads((folder / "config.json").read_text())
    n_heads, width = config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"]
    config |= {"num_attention_heads": 2 * n_heads, "num_key_value_heads": n_heads, "head_dim": width}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if ".q_proj." in name:  # rows are heads, one behind the other
            heads = tensor.unflatten(0, (n_heads, width))
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1).contiguous()
        if ".o_proj." in name:
            heads = tensor.unflatten(1, (n_heads, width)) / 2
            weights[name] = heads.repeat_interleave(2, dim=1).flatten(1, 2).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def run_here(folder: str, device: str, model: str, dtype: str, *numbers: str) -> None:
    """The code cells of these notebooks (all without numbers), in order; a cell that fails ends the process."""
    place = Path(folder)
    if model == "grouped-query":
        made = place / model
        model = str(made if made.is_dir() else grouped_query(made))
    own = {"MODEL": model, "PROMPTS": "embedded", "SLUG": "run", "DEVICE": device, "DTYPE": dtype, "PROFILE": "smoke"}
    given = "\n".join(f"{name} = {value!r}" for name, value in (runner.DEFAULTS | own).items())
    shell = InteractiveShell.instance()
    is_on = contextlib.nullcontext()
    if device == "standin":
        import standin  # only then: it registers a device

        is_on = standin.active()
    os.chdir(NOTEBOOKS)
    rows = []
    with is_on:
        for number, path in runner.find_notebooks().items():
            if numbers and number not in numbers:
                continue
            start = time.monotonic()
            shell.reset(new_session=False)
            cells = notebooks.code_cells(notebooks.read_notebook(path))
            with torch.enable_grad():  # as in a kernel of its own: a lesson may switch gradients off
                for place_of_cell, cell in enumerate(cells, start=1):
                    text = notebooks.source(cell) + ("\n" + given if "parameters" in notebooks.tags(cell) else "")
                    if not shell.run_cell(text, silent=True).success:
                        sys.exit(f"FAILED {path.stem}, code cell {place_of_cell}")
            plt.close("all")
            rows.append((path.stem, len(cells), round(time.monotonic() - start, 1)))
            print(f"done: {path.stem}, {len(cells)} code cells, {rows[-1][-1]} s", flush=True)
    table = pd.DataFrame(rows, columns=["notebook", "code_cells", "seconds"])
    write_table(table, results_dir("run") / "standin_times.csv")


if __name__ == "__main__":
    (run_here if sys.argv[2:] else main)(*sys.argv[1:])
