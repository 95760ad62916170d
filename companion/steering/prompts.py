"""Prompts of a steering experiment, one row each, made from the pairs and, where the set has them, its suites.

Directions are fitted on the topics of `discover`, strengths and layers are chosen on `validate`, and every reported
number is from `test`. A topic never serves two of the three.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import pandas as pd

from companion.base.errors import InputError
from companion.base.folders import prompts_folder
from companion.generation.labels import clause_of
from companion.prompts.invented import Request
from companion.prompts.pairs import Pair

COLUMNS: Final = ("id", "text", "kind", "wrapped", "family", "tier", "severity", "topic", "split", "suite")
KINDS: Final = ("harmful", "borderline", "harmless")
UNKNOWN: Final = -1  # a tier or a severity that the prompt set does not tell
Prompts: TypeAlias = str | Path | pd.DataFrame  # a prompt set by name or folder, or its prompts beside the pairs


def from_pairs(pairs: Iterable[Pair]) -> pd.DataFrame:
    """Both sides of every pair as prompts.

    T1 and T2 give the harmful ones, wrapped where T2's wrapper is on; T1's control and both sides of T2b are
    `borderline`: each is made to look like a harmful request and is none. The benign behaviours are `harmless`. A family
    is the wrapper's, without the strength that a trailing number tells; the same text occurs once.
    """
    rows = []
    for pair in pairs:
        frame, _, tier = pair.family.rpartition("-")
        known = bool(frame) and tier.isdigit()
        family = (frame if known else pair.family) if pair.treatment in ("T2", "T2b") else ""
        for side in ("control", "treated"):
            kind = {"T2": "harmful", "T2b": "borderline"}.get(pair.treatment, "harmless")
            if pair.treatment == "T1":
                kind = "harmful" if side == "treated" else "borderline"
            wrapped = pair.treatment in ("T2", "T2b") and side == "treated"
            rank = int(tier) if known and wrapped else 0 if known else UNKNOWN
            text = getattr(pair, side)
            row = (f"{pair.id}.{side}", text, kind, wrapped, family, rank, _severity(text), pair.topic, pair.split)
            rows.append((*row, pair.treatment))
    return pd.DataFrame(rows, columns=list(COLUMNS)).drop_duplicates("text", ignore_index=True)


def from_suites(prompt_set: Prompts) -> pd.DataFrame:
    """The prompts beside the pairs: a table in memory as it is, or `suites.jsonl` of a set, all of them for `test`.

    An empty table where the set has no such file. Rows of the file need `id`, `suite`, `prompt` and `harmful`;
    `borderline`, `wrapper`, `family`, `tier` and `topic` are optional. The two refusal lessons of the embedded language,
    which ask for a refusal, are left out.
    """
    if isinstance(prompt_set, pd.DataFrame):
        return prompt_set[list(COLUMNS)]
    path = prompts_folder(str(prompt_set)) / "suites.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [line for line in text.split("\n") if line.strip()]
    rows = [_suite_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    return pd.DataFrame([row for row in rows if row is not None], columns=list(COLUMNS))


def _suite_row(line: str, where: str) -> tuple[Any, ...] | None:
    try:
        row = json.loads(line)
        prompt, harmful = str(row["prompt"]), bool(row["harmful"])
        name, suite = str(row["id"]), str(row["suite"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{where}: expected a JSON object with id, suite, prompt and harmful ({error})") from None
    if suite.startswith("f_"):
        return None
    tier, clause = int(row.get("tier", UNKNOWN)), clause_of(prompt)
    wrapped = tier > 0 or (tier == UNKNOWN and bool(row.get("wrapper")))
    kind = "harmful" if harmful else "borderline" if row.get("borderline") else "harmless"
    topic = str(row.get("topic") or (clause.topic if clause else name))
    return name, prompt, kind, wrapped, str(row.get("family") or ""), tier, _severity(prompt), topic, "test", suite


def _severity(prompt: str) -> float:
    """Log-odds that the request takes off compliance, known in the embedded language only; NaN if not harmful."""
    clause = clause_of(prompt)
    asked = Request(clause, "") if clause else None
    return asked.severity if asked and asked.harmful else float("nan")


def prompt_table(pairs: Sequence[Pair], prompt_set: Prompts) -> pd.DataFrame:
    """Every prompt of the experiment: those of the pairs, then those of the suites; a text occurs once.

    A suite prompt on a topic that the pairs use in another split is left out. Where no prompt is plainly harmless, the
    borderline ones whose wrapper is off take that place.
    """
    own, suites = from_pairs(pairs), from_suites(prompt_set)
    taken = {pair.topic: pair.split for pair in pairs}
    kept = [taken.get(topic, split) == split for topic, split in zip(suites.topic, suites.split, strict=True)]
    both = pd.concat([part for part in (own, suites[kept]) if len(part)], ignore_index=True)
    both = both.drop_duplicates("text", ignore_index=True)
    if not (both.kind == "harmless").any():
        both.loc[(both.kind == "borderline") & ~both.wrapped.astype(bool), "kind"] = "harmless"
    return both.astype({"wrapped": bool, "tier": int, "severity": float})


def thinned(prompts: pd.DataFrame, n: int, *, by: Sequence[str] = ("topic",)) -> pd.DataFrame:
    """At most `n` prompts, spread evenly over the values of `by`, in their old order; the same ones at every call."""
    if len(prompts) <= n:
        return prompts
    shuffled = prompts.sample(frac=1, random_state=0)
    turn = shuffled.groupby(list(by), sort=False).cumcount()
    return prompts.loc[sorted(shuffled.index[np.argsort(turn.to_numpy(), kind="stable")][:n])]
