"""What `00_start_here` shows: the pipeline's steps, run times and verdicts, read from files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from companion.base import files
from companion.base.errors import InputError
from companion.base.paths import RESULTS, results_dir
from companion.base.thresholds import UNTRAINED
from companion.claims.ledger import KEYS
from companion.run import freshness
from companion.run.freshness import run_times

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
    table = files.read_table(path, VERDICTS)
    own = table[table.model == slug]
    if own.empty:
        raise InputError(f"results/claims.csv has no row for {slug}: run ./run_all.sh with the flags that made it")
    return own[["claim", "verdict", "tags", "reason"]].reset_index(drop=True)


def collect(results: Path, own: str) -> tuple[pd.DataFrame, tuple[str, ...], tuple[str, ...]]:
    """Evidence of every run below a results folder, the names of the runs, and a sentence for each file left out.

    A run also measures its model's relatives; where a relative has a run of its own, that run's rows count. Of runs other
    than `own`, files are left out that cannot be read, or that are older than what they rest on: one run that failed half
    way must not stop or spoil the others'. Raises InputError for a damaged file of `own`, and where nothing is found.
    """
    tables, left_out = {}, list[str]()
    for folder in sorted(path for path in results.iterdir() if (path / "02_evidence.csv").is_file()):
        found = []
        for path in sorted(folder.glob("0[2-6]_evidence.csv")):
            try:
                table = files.read_table(path, files.EVIDENCE)
            except InputError as error:
                if folder.name == own:
                    raise
                left_out.append(f"{folder.name}: {error}")
                continue
            if folder.name == own or freshness.is_of_one_run(folder, path.name[:2]):
                found.append(table)
            else:
                left_out.append(f"{folder.name}: {path.name} is older than what it rests on: run that model again")
        if found:
            tables[folder.name] = pd.concat(found, ignore_index=True)
    if not tables:
        raise InputError(f"no run with evidence in {results}: run ./run_all.sh first")
    parts = []
    for run, table in tables.items():
        owner = table.model.str.removesuffix(UNTRAINED)
        parts.append(table[(owner == run) | ~owner.isin(tables)])
    return pd.concat(parts, ignore_index=True).drop_duplicates(KEYS), tuple(tables), tuple(left_out)
