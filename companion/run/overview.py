"""What is told of whole runs: the tables of `00_start_here`, the evidence that `08_claims` judges, and all runs' verdicts.

Only the standard library is imported here, since the runner joins the verdicts of all runs when its notebooks have finished.
"""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.base import files
from companion.base.errors import InputError
from companion.base.paths import RESULTS, relative, results_dir
from companion.run.freshness import run_times

if TYPE_CHECKING:
    import pandas as pd

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
    import pandas as pd

    return pd.DataFrame(STEPS, columns=["step", "what", "file", "notebook"])


def estimands() -> pd.DataFrame:
    """The effects, each with the two cells whose difference it is."""
    import pandas as pd

    return pd.DataFrame(ESTIMANDS, columns=["estimand", "from_cell", "to_cell", "reads"])


def run_time_table(slug: str) -> pd.DataFrame:
    """Wall seconds that each notebook took when it last ran."""
    import pandas as pd

    times = sorted(run_times(results_dir(slug)).items())
    return pd.DataFrame(times, columns=["notebook", "seconds"]).query("notebook != '00_start_here'")


def verdict_table(slug: str) -> pd.DataFrame | str:
    """Claim, verdict and reason for the model of one run; a sentence if it has not been judged yet."""
    path = RESULTS / slug / "claims.csv"
    if not path.is_file():
        return "No verdicts yet: run ./run_all.sh"
    table = files.read_table(path, VERDICTS)
    own = table[table.model == slug]
    if own.empty:
        raise InputError(f"{relative(path)} has no row for {slug}: run ./run_all.sh with the flags that made it")
    return own[["claim", "verdict", "tags", "reason"]].reset_index(drop=True)


def run_evidence(slug: str) -> pd.DataFrame:
    """The evidence that a run's notebooks 02 to 06 left, of its own model and of those that it is compared with.

    Raises InputError for a damaged file, and where there is none.
    """
    import pandas as pd

    from companion.claims.ledger import KEYS

    found = sorted((RESULTS / slug).glob("0[2-6]_evidence.csv"))
    if not found:
        raise InputError(f"{relative(RESULTS / slug)} holds no evidence: run ./run_all.sh first")
    tables = [files.read_table(path, files.EVIDENCE) for path in found]
    return pd.concat(tables, ignore_index=True).drop_duplicates(KEYS)


def join_claims(results: Path) -> None:
    """Join the verdicts of all runs, `NAME/claims.*`, into `claims.csv`, `claims.json` and `claims.md`.

    A run also judges models that its own is compared with: those come last, and only where they have no run of their own.
    A run's torn file is left out: its notebook 08 is stale, and makes it again.
    """
    for name in ("claims.csv", "claims.json", "claims.md"):
        runs = {}
        for path in sorted(results.glob(f"*/{name}")):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                runs[path.parent.name] = _claims(path)
        if runs:
            own = [row for run, (_, rows) in runs.items() for (model, _), row in rows.items() if model == run]
            others: dict[tuple[str, str], Any] = {}
            for _, rows in runs.values():
                others |= {key: row for key, row in rows.items() if key[0] not in runs and key not in others}
            joined = [*own, *others.values()]
            if name == "claims.json":
                files.write_json(joined, results / name)
            else:
                head = next(iter(runs.values()))[0]
                files.write_text("".join([head, *joined]), results / name)


def _claims(path: Path) -> tuple[str, dict[tuple[str, str], Any]]:
    """The head of a file of verdicts, and its rows by model and claim; a row is a line, or in JSON an object."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return "", {(row["model"], row["claim"]): row for row in json.loads(text)}
    lines = text.splitlines(keepends=True)
    if not lines[-1].endswith("\n"):
        raise ValueError("its last line is not complete")
    n_head = 1 if path.suffix == ".csv" else 2
    cells = (next(csv.reader([line])) if path.suffix == ".csv" else line.split(" | ") for line in lines[n_head:])
    return "".join(lines[:n_head]), {
        (model.removeprefix("| "), claim): line for (model, claim, *_), line in zip(cells, lines[n_head:], strict=True)
    }


def claims_table(path: Path, slug: str) -> str:
    """The verdicts on a run's own model as aligned text; all rows without one for the model `slug`, "" without a file."""
    if not path.is_file():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    own = [{name: row[name] for name in row if name != "model"} for row in rows if row.get("model") == slug] or rows
    table = [list(own[0]), *(list(row.values()) for row in own)] if own else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)
