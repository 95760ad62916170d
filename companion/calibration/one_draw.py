"""One draw of the calibration: a model whose truth is known goes through the unchanged pipeline and its rules.

    drawn = one_draw("early", seed=3)

A draw is measured in parts, the stages of the pipeline: each gives the verdicts of some claims.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from companion.base import files, paths
from companion.calibration import localise
from companion.calibration.rates import MEASURED
from companion.claims import corrected_rules
from companion.claims.ledger import ledger
from companion.claims.verdict import Rows, Verdict, precondition
from companion.evidence import pipeline
from companion.evidence.pipeline import STAGES
from organisms import compiled, compiled_language

TOPICS = 70  # the fewest, rounded up, that leave 20 topics in a test split of 30 %


TRUTH = {True: "true", False: "false", None: "open"}


@dataclass(frozen=True)
class Drawn:
    """Verdicts (`rates.MEASURED`) of the registered and the corrected rules, how well each estimator finds the
    mechanism (`localise.SCHEMA`), and the evidence rows (`files.EVIDENCE`) that the verdicts rest on.
    """

    verdicts: pd.DataFrame
    localisation: pd.DataFrame
    evidence: pd.DataFrame


def one_draw(
    kind: str, seed: int, topics: int = TOPICS, effect: float | None = None, *, pairs: int = 1,
    parts: Collection[str] = tuple(STAGES), full_response: bool = False,
) -> Drawn:  # fmt: skip
    """Measure one model with the unchanged pipeline, and ask every rule of the given parts.

    `pairs` of each topic and treatment. `effect` is the TE of T2 - T2b to aim at, in log-odds (by default drawn between 2 and 4).
    `full_response` adds Y2 to the estimators.
    """
    organism = compiled.draw(kind, seed, effect=effect, topics=topics, pairs_per_topic=pairs)
    this = compiled.study(organism)
    prompts = compiled_language.suites(organism.pairs, seed) if "steering" in parts else None
    measured = pipeline.measure_study(this, organism.name, parts, full_response=full_response, prompt_set=prompts)
    same = {
        "kind": kind,
        "seed": seed,
        "topics": topics,
        "pairs": pairs,
        "effect": float(organism.design.effect),
        "code": code(),
    }
    table = []
    for rule, one in judged(measured.rows, organism.name, parts):
        truth = TRUTH[organism.claims[one.claim]]
        own = _fields(one, Rows(organism.name, measured.rows[measured.rows.model == organism.name]))
        table.append({**same, "rule": rule, "truth": truth, **own})
    found = localise.localise_draw(organism, this, measured)
    return Drawn(pd.DataFrame(table)[list(MEASURED)], found, measured.rows)


def judged(evidence: pd.DataFrame, model: str, parts: Collection[str] = tuple(STAGES)) -> list[tuple[str, Verdict]]:
    """What the registered and the corrected rules say of a model's evidence, on the claims of some parts."""
    asked = {claim for part in parts for claim in STAGES[part]}
    own = Rows(model, evidence[evidence.model == model])
    rules = {"registered": ledger(evidence, (model,)), "corrected": corrected_rules.corrected_verdicts(own)}
    return [(rule, one) for rule, verdicts in rules.items() for one in verdicts if one.claim in asked]


def _fields(verdict: Verdict, rows: Rows) -> dict[str, object]:
    stopped = precondition(rows, verdict.claim) is not None
    numbers = {name: getattr(verdict, name) for name in ("estimate", "ci_low", "ci_high")}
    return {
        "claim": verdict.claim,
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "gate": "stopped" if stopped else "passed",
        "quantity": verdict.quantity,
        **{name: math.nan if value is None else value for name, value in numbers.items()},
    }


@cache
def code(module: str = __file__) -> str:
    """Hash of every helper that a draw's numbers can rest on: a module's file and all that it imports, at any depth."""
    seen: set[Path] = set()
    waiting = [Path(module)]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += _imports(path)
    return files.digest({path.name: files.hash_file(path, {}) for path in seen})[:12]


def _imports(path: Path) -> list[Path]:
    """Files of the helpers that a file imports, also those of its own package."""
    package = ".".join(path.resolve().parent.relative_to(paths.ROOT).parts)
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, (package if node.level else "", node.module)))
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    files = [
        paths.ROOT / (name.replace(".", "/") + ".py")
        for name in names
        if name.split(".")[0] in ("companion", "organisms")
    ]
    return [file for file in files if file.is_file()]
