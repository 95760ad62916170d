"""Runs the code of notebooks in one process, on the processor or on the stand-in device (`tests/standin.py`).

python tests/standin_notebooks.py DEVICE MODEL DTYPE FOLDER [01 02 ...]

`grouped-query` is a model that is made here: the embedded one with each query head cut into two that share its key head. It
computes the same function. A cell that fails ends the run with status 1. Tables go to FOLDER/results/run, and a table
`standin_times.csv` beside them says how long each notebook took.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROFILE = "smoke"


def grouped_query(folder: Path) -> Path:
    """The embedded model with twice the query heads, two on each key head, each writing half of what the one wrote."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(ROOT / "data" / "organism" / "window-0", folder)
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


def run_notebook(path: Path, parameters: dict[str, Any]) -> int:
    """Runs its code cells in order with these parameters; returns how many there are, or ends the process."""
    from IPython.core.interactiveshell import InteractiveShell

    from companion.run import notebooks

    shell = InteractiveShell.instance()
    shell.reset(new_session=False)
    cells = notebooks.code_cells(notebooks.read_notebook(path))
    for number, cell in enumerate(cells, start=1):
        own = [f"{name} = {value!r}" for name, value in parameters.items() if "parameters" in notebooks.tags(cell)]
        if not shell.run_cell("\n".join([notebooks.source(cell), *own]), silent=True).success:
            sys.exit(f"FAILED {path.stem}, code cell {number}")
    return len(cells)


def main(device: str, model: str, dtype: str, folder: str, *numbers: str) -> None:
    """Runs the notebooks of these numbers, or all."""
    place = Path(folder).resolve()
    variables = {"COMPANION_RESULTS": place / "results", "COMPANION_FIGURES": place / "figures", "COMPANION_STRICT": 1}
    os.environ |= {name: str(value) for name, value in variables.items()} | {"TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import matplotlib.pyplot as plt
    import pandas as pd
    import torch

    from companion.base.files import write_table
    from companion.run import runner

    if model == "grouped-query":
        made = place / model
        model = str(made if made.is_dir() else grouped_query(made))
    own = {"MODEL": model, "PROMPTS": "embedded", "SLUG": "run", "DEVICE": device, "DTYPE": dtype, "PROFILE": PROFILE}
    is_on = contextlib.nullcontext()
    if device == "standin":
        import standin

        is_on = standin.active()
    os.chdir(ROOT / "notebooks")
    rows = []
    with is_on:
        for number, path in runner.find_notebooks(ROOT / "notebooks", runner.NEEDS).items():
            if numbers and number not in numbers:
                continue
            start = time.monotonic()
            with torch.enable_grad():  # as in a kernel of its own: a lesson may switch gradients off
                n_cells = run_notebook(path, {**runner.DEFAULTS, **own})
            plt.close("all")
            rows.append((path.stem, n_cells, round(time.monotonic() - start, 1)))
            print(f"done: {path.stem}, {n_cells} code cells, {rows[-1][-1]} s", flush=True)
    table = pd.DataFrame(rows, columns=["notebook", "code_cells", "seconds"])
    write_table(table, place / "results" / "run" / "standin_times.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
