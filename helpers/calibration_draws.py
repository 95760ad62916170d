"""All draws of the calibration: the plan, fixed before any result, and a run of it that can stop and go on.

Each draw is a pair of files below `data/calibration/.parts`, written whole or not at all. What is there is not measured
again, also if the code has changed since: a row names the code that made it, and notebook 07 measures some draws anew. To
measure everything again, remove `data/calibration`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from helpers import calibration, calibration_localise, paths, store
from helpers.calibration import TOPICS
from helpers.calibration_stats import VERDICTS
from helpers.errors import InputError
from helpers.organisms.compiled_design import KINDS
from helpers.pipeline import STAGES

Purpose = Literal["main", "topics", "effect"]
FOLDER = paths.DATA / "calibration"
SCHEMA = {**VERDICTS, "purpose": "str"}
# The first rounds: kinds with nulls of C1 to C4 and C5c, then kinds that tell the neuron claims apart.
FIRST = {
    "layers": (
        "early", "middle", "late_like_benign", "attention", "skip_only", "context_free", "context_unused", "late",
        "each_token",
    ),
    "neurons": ("distributed", "permuted", "gated", "late", "adjacent", "attention", "middle", "or"),
}  # fmt: skip
SEEDS, SEEDS_EACH_TOKEN = 30, 60  # draws of a kind; `each_token` is the only null of C5c
POWER_SEEDS, POWER_FROM = 10, 100  # models of their own for the power curves
POWER_TOPICS, POWER_EFFECTS = (30, 50, 120), (0.5, 1.0, 2.0, 3.0)
POWER_KINDS = {"layers": ("late", "early", "attention"), "neurons": ("late", "distributed", "gated")}
POPULATION = {"layers": 4, "neurons": 2}  # every so many seeds also have a population verdict
FULL_RESPONSE = 4  # every so many seeds Y2 is among the estimators
PART_OF = {claim: part for part, claims in STAGES.items() for claim in claims}


@dataclass(frozen=True)
class Draw:
    """One draw of the plan: a part of the pipeline on one model. `effect` None: drawn with the model."""

    purpose: Purpose
    part: str
    kind: str
    seed: int
    topics: int = TOPICS
    effect: float | None = None

    @property
    def name(self) -> str:
        """Its file's name."""
        effect = "" if self.effect is None else f"-{self.effect:g}"
        return f"{self.part}-{self.kind}-{self.seed}-{self.topics}{effect}"


def plan() -> list[Draw]:
    """All draws in the order in which they are measured: round by round, the most informative kinds first."""
    made = [Draw("main", part, kind, seed) for seed in range(SEEDS) for part in FIRST for kind in FIRST[part]]
    at = 4 * len([*itertools.chain(*FIRST.values())])  # after four rounds one of the power curves, then the others
    made[at:at] = _power("layers", [0])
    others = {part: [kind for kind in KINDS if kind not in FIRST[part]] for part in FIRST}
    made += [Draw("main", part, kind, seed) for seed in range(SEEDS) for part in others for kind in others[part]]
    made += _power("neurons", range(POWER_SEEDS)) + _power("layers", range(1, POWER_SEEDS))
    return made + [Draw("main", "layers", "each_token", seed) for seed in range(SEEDS, SEEDS_EACH_TOKEN)]


def _power(part: str, seeds: Iterable[int]) -> list[Draw]:
    made = []
    for seed, kind in itertools.product((POWER_FROM + i for i in seeds), POWER_KINDS[part]):
        made += [Draw("topics", part, kind, seed, topics=n, effect=3.0) for n in POWER_TOPICS]
        made += [Draw("effect", part, kind, seed, effect=size) for size in POWER_EFFECTS]
    return made


def measure(draw: Draw) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure a draw: its rows of both tables."""
    is_main = draw.purpose == "main"
    rows, found = calibration.one_draw(
        draw.kind, draw.seed, draw.topics, draw.effect, parts=(draw.part,),
        population=is_main and draw.seed % POPULATION[draw.part] == 0,
        full_response=is_main and draw.part == "layers" and draw.seed % FULL_RESPONSE == 0,
    )  # fmt: skip
    return rows.assign(purpose=draw.purpose), found if is_main else found.iloc[:0]


def run(share: str = "1/1", folder: Path = FOLDER, draws: Iterable[Draw] | None = None) -> int:
    """Measure every draw of this share ("2/3": the second of three) that has no file yet, and join what there is.

    Several shares may run at once. Stopping loses at most one draw. Returns 0, the exit status.
    """
    own = list(plan() if draws is None else draws)[slice(*_every(share))]
    known = shipped(folder)
    missing = [draw for draw in own if key(draw) not in known and not _paths(folder, draw)[0].is_file()]
    print(f"calibration: {len(own) - len(missing)} of {len(own)} draws are there", flush=True)
    start = time.monotonic()
    try:
        for done, draw in enumerate(missing, start=1):
            write(folder, draw, *measure(draw))
            each = (time.monotonic() - start) / done
            left = each * (len(missing) - done) / 60
            print(f"{done}/{len(missing)} {draw.name}: {each:.0f} s a draw, about {left:.0f} min left", flush=True)
    finally:
        print("joined:", join(folder), "rows of verdicts", flush=True)
    return 0


def shipped(folder: Path) -> set[tuple[object, ...]]:
    """Keys of the draws that the shipped table holds, as of a clone of the repository."""
    if not (folder / "verdicts.parquet").is_file():
        return set()
    table = read(folder)[0].assign(part=lambda rows: rows.claim.map(PART_OF))
    columns = [table[name] for name in ("purpose", "part", "kind", "seed", "topics")]
    effects = table.effect.where(table.purpose != "main").round(6)
    return {(*rest, None if size != size else size) for *rest, size in zip(*columns, effects, strict=True)}


def key(draw: Draw) -> tuple[object, ...]:
    """What tells a draw from all others."""
    return draw.purpose, draw.part, draw.kind, draw.seed, draw.topics, draw.effect


def _every(share: str) -> tuple[int, None, int]:
    try:
        place, n = (int(word) for word in share.split("/"))
    except ValueError:
        place, n = 0, 0
    if not 1 <= place <= n:
        raise InputError(f"--recalibrate {share}: expected a share such as 1/2, the first of two")
    return place - 1, None, n


def write(folder: Path, draw: Draw, verdicts: pd.DataFrame, localisation: pd.DataFrame) -> None:
    """Write a draw; its verdicts come last, and say that it is done."""
    first, second = _paths(folder, draw)
    store.write_table(localisation, second)
    store.write_table(verdicts, first)


def _paths(folder: Path, draw: Draw) -> tuple[Path, Path]:
    parts = folder / ".parts"
    return parts / f"{draw.name}.verdicts.parquet", parts / f"{draw.name}.localisation.parquet"


def join(folder: Path = FOLDER) -> int:
    """Put all draws that there are, also those of earlier joins, into the two shipped tables; the number of verdicts."""
    keys = {"verdicts": ["purpose", "kind", "seed", "topics", "effect", "claim"],
            "localisation": ["kind", "seed", "estimator", "what"]}  # fmt: skip
    for name, key in keys.items():
        shipped = folder / f"{name}.parquet"
        parts = [*([shipped] if shipped.is_file() else []), *sorted((folder / ".parts").glob(f"*.{name}.parquet"))]
        tables = [table for path in parts if len(table := pd.read_parquet(path))]
        if tables:
            joined = pd.concat(tables, ignore_index=True).drop_duplicates(key, keep="last").sort_values(key)
            store.write_table(joined, shipped)
    return len(read(folder)[0]) if (folder / "verdicts.parquet").is_file() else 0


def read(folder: Path = FOLDER) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The shipped tables: verdicts and localisation. InputError if they are not there."""
    verdicts = store.read_table(folder / "verdicts.parquet", SCHEMA)
    return verdicts, store.read_table(folder / "localisation.parquet", calibration_localise.SCHEMA)
