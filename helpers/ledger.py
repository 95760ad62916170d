"""The ledger: evidence of all runs gathered, judged claim by claim, and written for people and programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from helpers import claims_corrected, freshness, store
from helpers.calibration_rates import CORRECTED, Rates, beside
from helpers.claims import c1, c2, c3
from helpers.claims_gates import c5b
from helpers.claims_neurons import c5a, c7
from helpers.claims_steering import c6
from helpers.claims_tokens import c4, c5c
from helpers.controls import UNTRAINED, Rows
from helpers.errors import InputError
from helpers.verdicts import Verdict

KEYS = ["model", "claim", "quantity", "variant"]
# The rules on tokens, neurons and steering, by claim; what they need is measured by notebooks 04 to 06.
RULES: dict[str, Callable[[Rows], Verdict]] = {"C4": c4, "C5a": c5a, "C5b": c5b, "C5c": c5c, "C6": c6, "C7": c7}


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
                table = store.read_table(path, store.EVIDENCE)
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


def ledger(evidence: pd.DataFrame, runs: Collection[str] = ()) -> list[Verdict]:
    """Verdicts for every model of an evidence table; untrained twins serve as controls only.

    Claims of notebooks 04 to 06 that were not measured are listed, as not testable, for models with a run of their own.
    """
    verdicts = []
    models = [model for model in evidence.model.unique() if not model.endswith(UNTRAINED)]
    for model in sorted(models, key=lambda name: name not in runs):
        own = Rows(model, evidence[evidence.model == model])
        twin = Rows(model + UNTRAINED, evidence[evidence.model == model + UNTRAINED])
        verdicts += [c1(own, twin), c2(own), c3(own)]
        measured = set(own.table.claim)
        verdicts += [rule(own) for claim, rule in RULES.items() if model in runs or claim in measured]
    return verdicts


def corrected(evidence: pd.DataFrame, runs: Collection[str] = ()) -> dict[tuple[str, str], Verdict]:
    """What the corrected rules say, by model and claim, of the claims that `ledger` lists; the registered verdicts stand."""
    listed = {(one.model, one.claim) for one in ledger(evidence, runs)}
    models = {model for model, _ in listed}
    found = [one for m in models for one in claims_corrected.rules(Rows(m, evidence[evidence.model == m]))]
    return {(one.model, one.claim): one for one in found if (one.model, one.claim) in listed}


def records(
    verdicts: Sequence[Verdict], rates: Rates | None = None, others: Mapping[tuple[str, str], Verdict] | None = None
) -> list[dict[str, object]]:
    """The ledger for `claims.json`, where an interval without limits and error rates that are not measured are None.

    `corrected` is what the claim's corrected rule says, with error rates of its own; None where there is none.
    """
    made = []
    for verdict in verdicts:
        other = (others or {}).get((verdict.model, verdict.claim))
        corrected = None if other is None else _record(other, rates, other.claim + CORRECTED)
        made.append({**_record(verdict, rates, verdict.claim), "corrected": corrected})
    return made


def _record(verdict: Verdict, rates: Rates | None, name: str) -> dict[str, object]:
    numbers = {key: getattr(verdict, key) for key in ("estimate", "ci_low", "ci_high")}
    finite = {key: x if x is not None and math.isfinite(x) else None for key, x in numbers.items()}
    return {**asdict(verdict), **finite, "tags": list(verdict.tags), "error_rates": (rates or {}).get(name)}


def table(
    verdicts: Sequence[Verdict], rates: Rates | None = None, others: Mapping[tuple[str, str], Verdict] | None = None
) -> pd.DataFrame:
    """The ledger as a table for people, numbers to two decimals, the reason last.

    `error_rate` says what the calibration knows of such a verdict, `corrected_rule` what that claim's corrected rule says, with
    its own `corrected_error_rate`.
    """
    frame = pd.DataFrame([asdict(verdict) for verdict in verdicts]).drop(columns=["controls", "quantity"])
    numbers = ["estimate", "ci_low", "ci_high"]
    frame[numbers] = frame[numbers].astype(float).round(2)
    frame["error_rate"] = [beside(one.claim, one.verdict, rates or {}) for one in verdicts]
    found = [(others or {}).get((one.model, one.claim)) for one in verdicts]
    frame["corrected_rule"] = ["" if one is None else one.verdict for one in found]
    frame["corrected_error_rate"] = [
        "" if one is None else beside(one.claim + CORRECTED, one.verdict, rates or {}) for one in found
    ]
    frame["tags"] = frame["tags"].map(", ".join)
    last = ["error_rate", "corrected_rule", "corrected_error_rate", "tags", "reason"]
    return frame[[*(name for name in frame.columns if name not in last), *last]]


def markdown(
    verdicts: Sequence[Verdict], rates: Rates | None = None, others: Mapping[tuple[str, str], Verdict] | None = None
) -> str:
    """The ledger as a Markdown table."""
    names = (
        "model",
        "claim",
        "verdict",
        "estimate",
        "error rate",
        "corrected rule",
        "its error rate",
        "tags",
        "reason",
    )
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    shown = table(verdicts, rates, others)
    for one, row in zip(verdicts, shown.itertuples(), strict=True):
        numbers = "" if one.estimate is None else f"{one.estimate:.2f} [{one.ci_low:.2f}, {one.ci_high:.2f}]"
        rules = (row.error_rate, row.corrected_rule, row.corrected_error_rate)
        cells = (one.model, one.claim, one.verdict, numbers, *rules, row.tags, one.reason)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
