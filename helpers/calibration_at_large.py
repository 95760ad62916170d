"""Population verdicts of the calibration's draws: from the evidence that is stored, so that no model is run again.

Every draw whose claims have a closed form gets one, but of the layers' draws, whose closed form takes a quarter of a minute,
only every fifth.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import pandas as pd

from helpers import calibration, calibration_draws, calibration_population, paths, store
from helpers.calibration_draws import FRESH, TOPICS
from helpers.calibration_rates import at_large
from helpers.calibration_stats import AT_LARGE
from helpers.controls import Rows
from helpers.organisms import compiled
from helpers.verdicts import Verdict

EVERY = 5
KEY = ["kind", "claim", "rule", "seed"]
Draw = tuple[str, str, int]  # part, kind, seed


def wanted(evidence: pd.DataFrame) -> list[Draw]:
    """Which of the stored draws get population verdicts."""
    draws = evidence[["part", "kind", "seed"]].drop_duplicates().itertuples(index=False)
    return [
        (part, kind, seed)
        for part, kind, seed in draws
        if part in calibration_population.CLAIMS and (part != "layers" or (seed - FRESH) % EVERY == EVERY - 1)
    ]


def measure(draw: Draw, evidence: pd.DataFrame, stored: pd.DataFrame) -> pd.DataFrame:
    """Rows of one draw (`AT_LARGE`), from its evidence and its stored verdicts."""
    part, kind, seed = draw
    organism = compiled.draw(kind, seed, topics=TOPICS, pairs_per_topic=1)
    found = calibration_population.verdicts(organism, compiled.study(organism), evidence, part)
    rows = []
    for row in stored[(stored.kind == kind) & (stored.seed == seed)].itertuples():
        if (row.claim, row.rule) in found:
            verdict, known = found[row.claim, row.rule]
            value = _value(verdict, known, row.quantity)
            rows.append((kind, row.claim, row.rule, verdict.verdict, calibration.code(), seed, value))
    return pd.DataFrame(rows, columns=list(AT_LARGE))


def _value(verdict: Verdict, rows: pd.DataFrame, quantity: str) -> float:
    """The population's value of the quantity that the sample's verdict shows; NaN where the closed form does not know it."""
    row = Rows(verdict.model, rows[rows.model == verdict.model]).find(verdict.claim, quantity)
    is_known = row is not None and row.ci_low == row.ci_high
    return float(row.estimate) if row is not None and is_known else math.nan


def run(share: str = "1/1", folder: Path = paths.CALIBRATION) -> None:
    """Compute the verdicts of this share ("2/3": the second of three) that are not there yet, and join what there is."""
    evidence = calibration_draws.read(folder, "evidence")
    stored = calibration_draws.read(folder).query("purpose == 'main'")
    groups = dict(list(evidence.groupby(["part", "kind", "seed"])))
    known = {(one.kind, one.seed, one.claim) for one in at_large(folder).itertuples()}
    asked = wanted(evidence)[slice(*calibration_draws.every(share))]
    todo = [
        draw
        for draw in asked
        if not any((*draw[1:], claim) in known for claim in calibration_population.CLAIMS[draw[0]])
        and not _path(folder, draw).is_file()
    ]
    start = time.monotonic()
    try:
        for done, draw in enumerate(todo, start=1):
            store.write_table(measure(draw, groups[draw], stored), _path(folder, draw))
            left = (time.monotonic() - start) / done * (len(todo) - done) / 60
            print(f"population {done}/{len(todo)} {'-'.join(map(str, draw))}: about {left:.0f} min left", flush=True)
    finally:
        print("population verdicts:", join(folder), flush=True)


def _path(folder: Path, draw: Draw) -> Path:
    return folder / ".parts" / f"{'-'.join(map(str, draw))}.population.parquet"


def join(folder: Path = paths.CALIBRATION) -> int:
    """Put all that there are, also those of earlier joins, into the shipped table; their number."""
    parts = [pd.read_parquet(path) for path in sorted((folder / ".parts").glob("*.population.parquet"))]
    table = pd.concat([at_large(folder), *parts], ignore_index=True).drop_duplicates(KEY, keep="last")
    if len(table):
        store.write_table(table.sort_values(KEY, ignore_index=True), folder / "population.parquet")
    return len(table)
