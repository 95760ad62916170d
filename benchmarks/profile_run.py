"""Where the minutes of a whole run go, by notebook and by kind of work.

    python -m benchmarks.profile_run                                    # the default run: about an hour on one core
    python -m benchmarks.profile_run --model embedded --profile smoke   # flags as those of ./run_all.sh: --only, --pairs

Each notebook's cells run in a process of their own, one at a time, while a thread looks at the
main thread's stack every 10 ms. Results: results/benchmarks/profile.csv and a figure; of any other run under its own name.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from companion.base.paths import NOTEBOOKS, ROOT
from companion.run import notebooks, runner

EVERY = 0.01  # seconds between two looks
# Modules and functions of `companion` by kind of work; the longest name that fits a frame counts.
KINDS = {
    "loading": ("model.load", "model.verify", "prompts"),
    "clean runs": ("model.activations",),
    "replay above a patch": ("model.replay.sweep", "model.replay.interchange", "model.interventions"),
    "read-out, vocabulary": ("model.readout", "mediation.outcomes"),
    "single neurons": ("neurons", "model.replay.each_neuron"),
    "steered prompts, answers": ("generation", "mediation.outcomes.opened_with"),
    "steering fits": ("steering",),
    "bootstrap, statistics": ("stats", "mediation.summaries", "evidence", "claims", "calibration"),
    "figures": ("plots",),
    "cells by hand": (),
    "other": (),
}
OF = {f"companion.{name}": kind for kind, names in KINDS.items() for name in names}
OF["importlib"] = "loading"


def main(arguments: Sequence[str] | None = None) -> None:
    """Profiles the notebooks that the flags ask for, with those that they need, and writes the table."""
    from benchmarks import draw  # here: a notebook's process must find nothing imported
    from companion.run import cli, settings

    flags = cli.parse(list(sys.argv[1:] if arguments is None else arguments))
    found = settings.fetched(cli.parameters(flags, settings.resolve_device(flags.device)), flags.wrappers)
    paths = runner.find_notebooks()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in runner.with_needs(cli.chosen_notebooks(flags.only), paths):
            seconds = _profiled(paths[number], found, Path(scratch))
            rows += [{"notebook": number, "kind": kind, "seconds": seconds.get(kind, 0.0)} for kind in KINDS]
    name = "profile" if found == runner.DEFAULTS and flags.only is None else f"profile_{found['SLUG']}"
    print(draw.save_profile(rows, name).round(1).to_string())


def _profiled(path: Path, found: Mapping[str, Any], scratch: Path) -> dict[str, float]:
    """Seconds by kind of one notebook, run with the variables that the runner gives it."""
    variables = notebooks.environment(scratch)
    variables |= notebooks.threads(found["MODEL"]) | {"MPLBACKEND": "agg"}
    words = [str(path), json.dumps(dict(found)), str(scratch / f"{path.stem}.json")]
    code = "import sys; from benchmarks import profile_run; profile_run.sample(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, check=True)
    return dict(json.loads((scratch / f"{path.stem}.json").read_text()))


def sample(path: str, parameters: str, target: str) -> None:
    """Run a notebook's code cells in this process and write the seconds of each kind of work."""
    seconds, over, own = defaultdict[str, float](float), threading.Event(), threading.get_ident()

    def look() -> None:
        before = time.perf_counter()
        while not over.wait(EVERY):
            kind, now = kind_of(sys._current_frames()[own]), time.perf_counter()
            seconds[kind] += now - before
            before = now

    threading.Thread(target=look, daemon=True).start()
    os.chdir(NOTEBOOKS)
    names: dict[str, Any] = {"__name__": "__main__", "display": lambda *shown: None}
    for cell in notebooks.code_cells(notebooks.read_notebook(Path(path))):
        exec(notebooks.source(cell), names)
        names |= json.loads(parameters) if "parameters" in notebooks.tags(cell) else {}
    over.set()
    Path(target).write_text(json.dumps(dict(seconds)))


def kind_of(frame: Any) -> str:
    """The kind of the innermost frame that has one; what is imported counts as loading."""
    is_ours = False
    while frame is not None:
        name = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"
        package = name.partition(".")[0]
        if package == "__main__":
            return "other" if is_ours else "cells by hand"
        is_ours |= package in ("companion", "helpers")
        while name and name not in OF:
            name = name.rpartition(".")[0]
        if name:
            return OF[name]
        frame = frame.f_back
    return "other"


if __name__ == "__main__":
    main()
