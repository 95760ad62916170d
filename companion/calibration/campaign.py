"""All draws of the calibration: the plan, fixed before any result, and a run of it that can stop and go on.

Each draw is a pair of files below `data/calibration/.parts`, written whole or not at all. What is there is not measured
again, also if the code has changed since: a row names the code that made it, and notebook 07 measures some draws anew. To
measure everything again, remove `data/calibration`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from companion.base import files, paths
from companion.base.errors import InputError
from companion.calibration import localise, one_draw
from companion.calibration.one_draw import TOPICS
from companion.calibration.rates import FRESH_LAST, FRESH_LATER, STORED
from companion.evidence.pipeline import STAGES

Purpose = Literal["main", "topics", "pairs", "effect", "first look"]
SCHEMAS = {
    "verdicts": STORED,
    "localisation": localise.SCHEMA,
    "evidence": {**dict.fromkeys(("kind", "part"), "str"), "seed": "int", **files.EVIDENCE},
}
KEYS = {
    "verdicts": ["purpose", "kind", "seed", "topics", "pairs", "effect", "claim", "rule"],
    "localisation": ["kind", "seed", "estimator", "what"],
    "evidence": ["part", "kind", "seed", "model", "claim", "quantity", "variant"],
}
# How many models of each kind: at least 59 that make a claim false and pass its gate, for every claim.
COUNTS = {
    "context": {"context_free": 30, "context_unused": 30, "late": 15, "early": 15},
    "layers": {
        "early": 15, "middle": 15, "late_like_benign": 15, "skip_only": 30, "attention": 30, "late": 15, "early_carrier": 15,
    },
    "timing": {"each_token": 60, "late": 15, "gated": 15},
    "neurons": {
        "distributed": 15, "permuted": 25, "gated": 15, "late": 15, "adjacent": 15, "attention": 15, "middle": 15, "or": 15,
        "and": 15,
    },
    "steering": {"early": 30, "middle": 30, "late": 15},
}  # fmt: skip
# The corrected C1 and C6 were written after all draws of these claims above: models of their own, from this seed on.
COUNTS_LATER = {
    "layers": {
        "early": 15, "middle": 15, "late_like_benign": 15, "skip_only": 30, "attention": 10, "late": 10, "early_carrier": 10,
    },
    "steering": {"late": 15, "early": 15, "middle": 15},
}  # fmt: skip
# The corrected C4 came last, after all draws above: models of its own again, from this seed on. C6 gets the nulls it lacked.
COUNTS_LAST = {
    "layers": {
        "skip_only": 30, "attention": 30, "middle": 25, "early": 10, "late": 10, "late_like_benign": 10, "early_carrier": 10,
    },
    "steering": {"early": 18, "middle": 18},
}  # fmt: skip
FRESH = 11  # the first seed: smaller ones were seen while the corrected rules were written
ROUNDS = 15  # of the plan
POWER_SEEDS, POWER_FROM = 5, 100  # models of their own for the power curves
# Below 67 topics every rule is silent by design; 70 topics with one pair each are the largest effect's draws.
POWER_TOPICS, POWER_PAIRS, POWER_EFFECTS = (120, 200), 3, (0.5, 1.0, 2.0, 3.0)
POWER_KINDS = {
    "context": ("late",), "layers": ("late", "early", "attention"), "timing": ("late",),
    "neurons": ("late", "distributed", "gated"),
}  # fmt: skip
FULL_RESPONSE = 5  # every so many seeds also have Y2 among the estimators
PART_OF = {claim: part for part, claims in STAGES.items() for claim in claims}


@dataclass(frozen=True)
class PlannedDraw:
    """One draw of the plan: a part of the pipeline on one model. `effect` None: drawn with the model."""

    purpose: Purpose
    part: str
    kind: str
    seed: int
    topics: int = TOPICS
    effect: float | None = None
    pairs: int = 1  # of a topic and treatment

    @property
    def name(self) -> str:
        """Its file's name."""
        effect = "" if self.effect is None else f"-{self.effect:g}"
        pairs = "" if self.pairs == 1 else f"x{self.pairs}"
        return f"{self.part}-{self.kind}-{self.seed}-{self.topics}{pairs}{effect}"


def plan_draws() -> list[PlannedDraw]:
    """All draws in the order in which they are measured: round by round, one of each kind that still lacks some."""
    made = []
    for number, (part, kinds) in itertools.product(range(ROUNDS), COUNTS.items()):
        for kind, count in kinds.items():
            each = math.ceil(count / ROUNDS)
            made += [
                PlannedDraw("main", part, kind, FRESH + i)
                for i in range(number * each, min(count, (number + 1) * each))
            ]
    for first, counts in ((FRESH_LATER, COUNTS_LATER), (FRESH_LAST, COUNTS_LAST)):
        for part, kinds in counts.items():
            made += [PlannedDraw("main", part, kind, first + i) for kind, count in kinds.items() for i in range(count)]
    for seed in range(POWER_SEEDS):
        made += [draw for part in POWER_KINDS for draw in _power(part, [seed])]
    return made


def _power(part: str, seeds: Iterable[int]) -> list[PlannedDraw]:
    made = []
    for seed, kind in itertools.product((POWER_FROM + i for i in seeds), POWER_KINDS[part]):
        made += [PlannedDraw("effect", part, kind, seed, effect=size) for size in POWER_EFFECTS]
        made += [PlannedDraw("topics", part, kind, seed, topics=n, effect=max(POWER_EFFECTS)) for n in POWER_TOPICS]
        made.append(PlannedDraw("pairs", part, kind, seed, effect=max(POWER_EFFECTS), pairs=POWER_PAIRS))
    return made


def measure_draw(draw: PlannedDraw) -> dict[str, pd.DataFrame]:
    """Measure a draw: its rows of all tables."""
    is_whole = (
        draw.purpose == "main" and draw.part == "layers" and (draw.seed - FRESH) % FULL_RESPONSE == FULL_RESPONSE - 1
    )
    drawn = one_draw.one_draw(
        draw.kind, draw.seed, draw.topics, draw.effect, pairs=draw.pairs, parts=(draw.part,), full_response=is_whole
    )  # fmt: skip
    label = {"kind": draw.kind, "part": draw.part, "seed": draw.seed}
    main = slice(None) if draw.purpose == "main" else slice(0)
    return {
        "verdicts": drawn.verdicts.assign(purpose=draw.purpose),
        "localisation": drawn.localisation.iloc[main],
        "evidence": drawn.evidence.assign(**label).iloc[main][list(SCHEMAS["evidence"])],
    }


def run_draws(share: str = "1/1", folder: Path = paths.CALIBRATION, draws: Iterable[PlannedDraw] | None = None) -> None:
    """Measure every draw of this share ("2/3": the second of three) that has no file yet, and join what there is.

    Several shares may run at once. Stopping loses at most one draw.
    """
    own = list(plan_draws() if draws is None else draws)[slice(*every(share))]
    known = shipped(folder)
    missing = [draw for draw in own if draw_key(draw) not in known and not _path(folder, draw, "verdicts").is_file()]
    print(f"calibration: {len(own) - len(missing)} of {len(own)} draws are there", flush=True)
    start = time.monotonic()
    try:
        for done, draw in enumerate(missing, start=1):
            write_draws(folder, draw, measure_draw(draw))
            each = (time.monotonic() - start) / done
            left = each * (len(missing) - done) / 60
            print(f"{done}/{len(missing)} {draw.name}: {each:.0f} s a draw, about {left:.0f} min left", flush=True)
    finally:
        print("joined:", join_draws(folder), "rows of verdicts", flush=True)


def shipped(folder: Path = paths.CALIBRATION) -> set[tuple[object, ...]]:
    """Keys of the draws that the shipped table holds, as of a clone of the repository."""
    if not (folder / "verdicts.parquet").is_file():
        return set()
    table = read_draws(folder).assign(part=lambda rows: rows.claim.map(PART_OF))
    columns = [table[name] for name in ("purpose", "part", "kind", "seed", "topics", "pairs")]
    effects = table.effect.where(table.purpose != "main").round(6)
    return {(*rest, None if size != size else size) for *rest, size in zip(*columns, effects, strict=True)}


def draw_key(draw: PlannedDraw) -> tuple[object, ...]:
    """What tells a draw from all others."""
    return draw.purpose, draw.part, draw.kind, draw.seed, draw.topics, draw.pairs, draw.effect


def every(share: str) -> tuple[int, None, int]:
    """Start, stop and step of a share such as "2/3": the second of three. InputError for anything else."""
    try:
        place, n = (int(word) for word in share.split("/"))
    except ValueError:
        place, n = 0, 0
    if not 1 <= place <= n:
        raise InputError(f"--recalibrate {share}: expected a share such as 1/2, the first of two")
    return place - 1, None, n


def write_draws(folder: Path, draw: PlannedDraw, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write a draw; its verdicts come last, and say that it is done."""
    for name in sorted(tables, key=lambda name: name == "verdicts"):
        files.write_table(tables[name], _path(folder, draw, name))


def _path(folder: Path, draw: PlannedDraw, table: str) -> Path:
    return folder / ".parts" / f"{draw.name}.{table}.parquet"


def join_draws(folder: Path = paths.CALIBRATION) -> int:
    """Put all draws that there are, also those of earlier joins, into the shipped tables; the number of verdicts."""
    for name, key in KEYS.items():
        shipped = folder / f"{name}.parquet"
        parts = [*([shipped] if shipped.is_file() else []), *sorted((folder / ".parts").glob(f"*.{name}.parquet"))]
        tables = [table for path in parts if len(table := pd.read_parquet(path))]
        if tables:
            joined = pd.concat(tables, ignore_index=True).drop_duplicates(key, keep="last").sort_values(key)
            files.write_table(joined[list(SCHEMAS[name])], shipped)
    return len(read_draws(folder)) if (folder / "verdicts.parquet").is_file() else 0


def read_draws(folder: Path = paths.CALIBRATION, table: str = "verdicts") -> pd.DataFrame:
    """A shipped table: verdicts, localisation or evidence. InputError if it is not there."""
    return files.read_table(folder / f"{table}.parquet", SCHEMAS[table])


def judged_again(folder: Path = paths.CALIBRATION, *, every: int = 1) -> pd.DataFrame:
    """What the rules of today say of the stored evidence of every n-th draw: `verdict` beside the `stored` one.

    A rule that is younger than a draw has no stored verdict on it, and is left out. Columns: part, kind, seed, claim, rule,
    verdict, stored.
    """
    stored = read_draws(folder)
    known = stored[stored.purpose == "main"].set_index(["kind", "seed", "claim", "rule"]).verdict
    groups = list(read_draws(folder, "evidence").groupby(["part", "kind", "seed"]))
    rows = []
    for (part, kind, seed), evidence in groups[::every]:
        for rule, one in one_draw.judged(evidence, f"compiled-{kind}-{seed}", (part,)):
            if (kind, seed, one.claim, rule) in known.index:
                rows.append((part, kind, seed, one.claim, rule, one.verdict, known[kind, seed, one.claim, rule]))
    return pd.DataFrame(rows, columns=["part", "kind", "seed", "claim", "rule", "verdict", "stored"])
