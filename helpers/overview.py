"""What `00_start_here` shows: the pipeline's steps, run times and verdicts, read from files."""

from __future__ import annotations

import pandas as pd

from helpers import store
from helpers.errors import InputError
from helpers.manifest import run_times
from helpers.paths import RESULTS, results_dir

STEPS = (
    ("prompts", "a folder of\nuser turns", "pairs.jsonl", "01"),
    ("pairs", "tokens of\nequal length", "01_tokens.csv", "01"),
    ("clean runs", "both prompts,\nevery site kept", "(in memory)", "02 to 06"),
    ("effects", "four cells for each\npair and mediator", "02_layers.parquet\n... 05_tokens.parquet", "02 to 05"),
    ("statistics", "intervals over\ntopics", "02_evidence.csv\n... 06_evidence.csv", "02 to 06"),
    ("verdicts", "rules fixed\nbeforehand", "claims.json", "08"),
    ("figures", "each drawn from\nits own table", "NN_name.csv", "all"),
)
VERDICTS = {**dict.fromkeys(("model", "claim", "verdict", "tags", "reason"), "str"), "estimate": "float"}


def pipeline_steps() -> pd.DataFrame:
    """The steps of the pipeline in order, with the file each leaves and the notebook that takes it."""
    return pd.DataFrame(STEPS, columns=["step", "what", "file", "notebook"])


def run_time_table(slug: str) -> pd.DataFrame:
    """Wall seconds that each notebook took when it last ran."""
    times = sorted(run_times(results_dir(slug)).items())
    return pd.DataFrame(times, columns=["notebook", "seconds"]).query("notebook != '00_start_here'")


def verdict_table(slug: str) -> pd.DataFrame | str:
    """Claim, verdict and reason for the model of one run; a sentence if no run has been judged yet."""
    path = RESULTS / "claims.csv"
    if not path.is_file():
        return "No verdicts yet: run ./run_all.sh"
    table = store.read_table(path, VERDICTS)
    own = table[table.model == slug]
    if own.empty:
        raise InputError(f"results/claims.csv has no row for {slug}: run ./run_all.sh with the flags that made it")
    return own[["claim", "verdict", "tags", "reason"]].reset_index(drop=True)
