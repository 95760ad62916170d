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
from companion.base.display import NotDefined
from companion.base.errors import InputError
from companion.base.paths import NOTEBOOKS, RESULTS, relative
from companion.base.smollm2 import REFUSES
from companion.run.freshness import run_times

if TYPE_CHECKING:
    import pandas as pd

QUESTIONS = {
    "00": "Where in a model is a harmful answer decided, and how can one know?",
    "01": "What differs between two prompts, and how does an answer become a number?",
    "02": "In which layers is the answer decided?",
    "03": "Is it attention or the MLPs?",
    "04": "Do a few neurons carry it?",
    "04b": "Do neurons switch an upstream signal on and off?",
    "05": "At which tokens is it decided, and what carries it on?",
    "06": "Does steering defend, and at what price?",
    "07": "How often is the method itself wrong?",
    "08": "What does the evidence say, claim by claim?",
}
ANSWERS = dict.fromkeys(("model", "claim", "name", "answer", "number", "grade"), "str")
SAYS = {
    "supported": "holds", "contradicted": "does not hold", "inconclusive": "undecided", "not testable": "not measured",
}  # fmt: skip
SHORT = ("claim", "verdict", "estimate", "ci_low", "ci_high", "answer", "grade")  # columns of a table for the terminal
DEFAULT = REFUSES  # the run whose page the joined one is


def notebook_table(slug: str) -> pd.DataFrame:
    """The notebooks in reading order: name, the question that it asks, and the minutes that it last took (NaN: never ran)."""
    import pandas as pd

    names = {path.stem.partition("_")[0]: path.stem for path in sorted(NOTEBOOKS.glob("[0-9]*_*.ipynb"))}
    times = run_times(RESULTS / slug)
    rows = [(name, QUESTIONS[number], times.get(name, float("nan")) / 60) for number, name in names.items()]
    return pd.DataFrame(rows, columns=["notebook", "question", "minutes to run"]).round(1)


def verdict_table(slug: str) -> pd.DataFrame | NotDefined:
    """What each claim says and the answer for the model of one run; not defined before notebook 08 has run."""
    from companion.claims.corrected_rules import STATEMENTS

    path = RESULTS / slug / "08_claims.csv"
    if not path.is_file():
        return NotDefined("No claim has been judged yet: run ./run_all.sh.")
    table = files.read_table(path, ANSWERS)
    own = table[table.model == slug]
    if own.empty:
        raise InputError(f"{relative(path)} has no row for {slug}: run ./run_all.sh with the flags that made it")
    own = own.assign(says=own.claim.map(STATEMENTS)).fillna("")
    return own[["claim", "says", "answer"]].reset_index(drop=True)


def shape_of(slug: str) -> tuple[int, bool] | None:
    """Layers of a run's model, and whether its attention slides over windows; None where notebook 01 left no facts."""
    path = RESULTS / slug / "model_facts.json"
    if not path.is_file():
        return None
    facts = files.read_json(path)
    return int(facts["layers"]), bool(facts["windows"])


def run_evidence(slug: str) -> pd.DataFrame:
    """The evidence that a run's notebooks 02 to 06 left, also of models that it is compared with; InputError without any."""
    import pandas as pd

    from companion.claims.ledger import KEYS

    found = sorted((RESULTS / slug).glob("0[2-6]*_evidence.csv"))
    if not found:
        raise InputError(f"{relative(RESULTS / slug)} holds no evidence: run ./run_all.sh first")
    tables = [files.read_table(path, files.EVIDENCE) for path in found]
    return pd.concat(tables, ignore_index=True).drop_duplicates(KEYS)


def join_claims(results: Path) -> None:
    """Join the verdicts of all runs, `NAME/claims.*`, into `claims.csv`, `claims.json` and `claims.md`.

    A run also judges models that its own is compared with: those come last, and only where they have no run of their own.
    A run's torn file is left out: its notebook 08 is stale, and makes it again.
    """
    for name in ("claims.csv", "claims.json"):
        head, runs = "", dict[str, dict[tuple[str, ...], Any]]()
        for path in sorted(results.glob(f"*/{name}")):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                head, runs[path.parent.name] = _claims(path)
        own = [row for run, rows in runs.items() for (model, *_), row in rows.items() if model == run]
        others: dict[tuple[str, ...], Any] = {}
        for rows in runs.values():
            others |= {key: row for key, row in rows.items() if key[0] not in runs and key not in others}
        joined = [*own, *others.values()]
        if name == "claims.csv" and runs:
            files.write_text("".join([head, *joined]), results / name)
        elif runs:
            files.write_json(joined, results / name)
            _join_pages(results, joined)


def _claims(path: Path) -> tuple[str, dict[tuple[str, ...], Any]]:
    """The head of a file of verdicts, and its rows by model, claim and rule; a row is a line, or in JSON an object."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return "", {(row["model"], row["claim"], row["rule"]): row for row in json.loads(text)}
    head, *lines = text.splitlines(keepends=True)
    if not lines[-1].endswith("\n"):
        raise ValueError("its last line is not complete")
    return head, {tuple(next(csv.reader([line]))[:3]): line for line in lines}


def _join_pages(results: Path, records: list[dict[str, Any]]) -> None:
    """The page of the default run, or of the first one, with a line for every other model with a run above its last line."""
    texts = {path.parent.name: path.read_text(encoding="utf-8") for path in results.glob("*/claims.md")}
    pages = {run: text for run, text in texts.items() if text.endswith("\n")}
    if not pages:
        return
    first = DEFAULT if DEFAULT in pages else min(pages)
    given = {
        run: {one["claim"]: one["answer"] for one in records if one["model"] == run and one["answer"]} for run in pages
    }
    lines = []
    for run in sorted(run for run, answers in given.items() if answers and run != first):
        said: dict[str, list[str]] = {}
        for claim, answer in given[run].items():
            said.setdefault(SAYS.get(answer, answer), []).append(claim)
        parts = "; ".join(f"{word}: {', '.join(claims)}" for word, claims in said.items())
        same = sum(given[first].get(claim) == answer for claim, answer in given[run].items())
        lines.append(f"- `{run}`: {parts}. Same answer as `{first}` in {same} of {len(given[run])}.")
    above, gap, last = pages[first].rstrip().rpartition("\n\n")
    others = [gap + "**Other models with a run.**" + gap, "\n".join(lines)] if lines else []
    files.write_text("".join([above, *others, gap, last, "\n"]), results / "claims.md")


def claims_table(path: Path, slug: str) -> str:
    """The answers on a run's own model as aligned text; all rows without one for the model `slug`, "" without a file."""
    if not path.is_file():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row.get("model") == slug and row.get("answer", "-")] or rows
    names = [name for name in (own[0] if own else []) if name in SHORT]
    table = [names, *([row[name] for name in names] for row in own)] if own else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)
