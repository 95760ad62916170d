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
ESTIMANDS = (
    ("TE", "y00", "y11", "what the treatment does"),
    ("NIE0", "y00", "y01", "is the treated value enough?"),
    ("NIE1", "y10", "y11", "is it needed?"),
    ("NDE0", "y00", "y10", "what does not\npass through"),
    ("NDE1", "y01", "y11", "the same, mediator\nas in treated"),
)
VERDICTS = {**dict.fromkeys(("model", "claim", "verdict", "tags", "reason"), "str"), "estimate": "float"}


def pipeline_steps() -> pd.DataFrame:
    """The steps of the pipeline in order, with the file each leaves and the notebook that takes it."""
    return pd.DataFrame(STEPS, columns=["step", "what", "file", "notebook"])


def estimands() -> pd.DataFrame:
    """The effects, each with the two cells whose difference it is."""
    return pd.DataFrame(ESTIMANDS, columns=["estimand", "from_cell", "to_cell", "reads"])


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
