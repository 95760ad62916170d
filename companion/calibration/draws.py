"""Draws of the calibration: models whose truth is known go through the unchanged pipeline and its rules.

The plan is fixed before any result. A draw is measured in parts, the stages of the pipeline.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from companion.base import paths
from companion.calibration.campaign import SCHEMAS, code_version, read_shipped, run_campaign
from companion.calibration.localise import localise_draw
from companion.calibration.rates import FRESH, FRESH_LAST, FRESH_LATER
from companion.claims import corrected_rules
from companion.claims.ledger import ledger
from companion.claims.verdict import Rows, Verdict, precondition
from companion.evidence import pipeline
from companion.evidence.pipeline import STAGES
from organisms import compiled, compiled_language

TABLES = ("verdicts", "localisation", "evidence")
TOPICS = 70  # the fewest, rounded up, that leave 20 topics in a test split of 30 %
# How many models of each kind: at least 59 that make a claim false and pass its precondition, for every claim.
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
# Models of their own for the corrections, which were written after draws of their claims: C1 and C6 from FRESH_LATER on,
# C4 from FRESH_LAST on, where C6 gets the nulls that it lacked.
COUNTS_CORRECTED = {
    FRESH_LATER: {
        "layers": {
            "early": 15, "middle": 15, "late_like_benign": 15, "skip_only": 30, "attention": 10, "late": 10,
            "early_carrier": 10,
        },
        "steering": {"late": 15, "early": 15, "middle": 15},
    },
    FRESH_LAST: {
        "layers": {
            "skip_only": 30, "attention": 30, "middle": 25, "early": 10, "late": 10, "late_like_benign": 10,
            "early_carrier": 10,
        },
        "steering": {"early": 18, "middle": 18},
    },
}  # fmt: skip
ROUNDS = 15  # of the plan
POWER_SEEDS = range(100, 105)  # models of their own for the power curves
# Below 67 topics every rule is silent by design; 70 topics with one pair each are the largest effect's draws.
POWER_TOPICS, POWER_PAIRS, POWER_EFFECTS = (120, 200), 3, (0.5, 1.0, 2.0, 3.0)
POWER_KINDS = {
    "context": ("late",), "layers": ("late", "early", "attention"), "timing": ("late",),
    "neurons": ("late", "distributed", "gated"),
}  # fmt: skip
FULL_RESPONSE = 5  # every so many seeds also have Y2 among the estimators
PART_OF = {claim: part for part, claims in STAGES.items() for claim in claims}
TRUTH = {True: "true", False: "false", None: "open"}


@dataclass(frozen=True)
class PlannedDraw:
    """One draw of the plan: a part of the pipeline on one model. `effect` None: drawn with the model."""

    purpose: Literal["main", "topics", "pairs", "effect", "first look"]
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

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from all others, as `shipped_keys` reads it from a table."""
        return self.purpose, self.part, self.kind, self.seed, self.topics, self.pairs, self.effect


def plan_draws() -> list[PlannedDraw]:
    """All draws in the order in which they are measured: round by round, one of each kind that still lacks some."""
    made = []
    for number, (part, kinds) in itertools.product(range(ROUNDS), COUNTS.items()):
        for kind, count in kinds.items():
            each = math.ceil(count / ROUNDS)
            own = range(number * each, min(count, (number + 1) * each))
            made += [PlannedDraw("main", part, kind, FRESH + i) for i in own]
    for first, counts in COUNTS_CORRECTED.items():
        for part, kinds in counts.items():
            made += [PlannedDraw("main", part, kind, first + i) for kind, count in kinds.items() for i in range(count)]
    for seed, (part, kinds_of_part) in itertools.product(POWER_SEEDS, POWER_KINDS.items()):
        for kind in kinds_of_part:
            made += [PlannedDraw("effect", part, kind, seed, effect=size) for size in POWER_EFFECTS]
            made += [PlannedDraw("topics", part, kind, seed, topics=n, effect=max(POWER_EFFECTS)) for n in POWER_TOPICS]
            made.append(PlannedDraw("pairs", part, kind, seed, effect=max(POWER_EFFECTS), pairs=POWER_PAIRS))
    return made


def measure_draw(
    kind: str, seed: int, part: str, *, topics: int = TOPICS, effect: float | None = None, pairs: int = 1,
    full_response: bool = False,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Measure one model with a part of the unchanged pipeline, and ask every rule of that part.

    `effect` is the TE of T2 - T2b to aim at, in log-odds (by default drawn between 2 and 4), and `pairs` how many each
    topic and treatment has. `full_response` adds Y2 to the estimators. Returns the verdicts of the registered and the
    corrected rules, how well each estimator finds the mechanism, and the evidence rows (`TABLES`), without their purpose.
    """
    organism = compiled.draw(kind, seed, effect=effect, topics=topics, pairs_per_topic=pairs)
    this = compiled.study(organism)
    prompts = compiled_language.steering_prompts(organism.pairs, seed) if part == "steering" else None
    measured = pipeline.measure_study(this, organism.name, (part,), full_response=full_response, prompt_set=prompts)
    own = Rows(organism.name, measured.rows[measured.rows.model == organism.name])
    said = judged(measured.rows, organism.name, (part,))
    verdicts = pd.DataFrame([one for _, one in said]).assign(
        kind=kind, seed=seed, topics=topics, pairs=pairs, effect=float(organism.design.effect), code=code_version(),
        rule=[rule for rule, _ in said], truth=[TRUTH[organism.claims[one.claim]] for _, one in said],
        gate=["passed" if precondition(own, one.claim) is None else "stopped" for _, one in said],
    )  # fmt: skip
    numbers = ["estimate", "ci_low", "ci_high"]
    verdicts[numbers] = verdicts[numbers].astype(float)  # None where a verdict shows no row
    evidence = measured.rows.assign(kind=kind, part=part, seed=seed)[list(SCHEMAS["evidence"])]
    columns = [name for name in SCHEMAS["verdicts"] if name != "purpose"]
    return {
        "localisation": localise_draw(organism, this, measured), "evidence": evidence, "verdicts": verdicts[columns],
    }  # fmt: skip


def judged(evidence: pd.DataFrame, model: str, parts: Collection[str] = tuple(STAGES)) -> list[tuple[str, Verdict]]:
    """What the registered and the corrected rules say of a model's evidence, on the claims of some parts."""
    asked = {claim for part in parts for claim in STAGES[part]}
    own = Rows(model, evidence[evidence.model == model])
    rules = {"registered": ledger(evidence, (model,)), "corrected": corrected_rules.corrected_verdicts(own)}
    return [(rule, one) for rule, verdicts in rules.items() for one in verdicts if one.claim in asked]


def measure_planned(draw: PlannedDraw) -> dict[str, pd.DataFrame]:
    """The rows of a planned draw; those for the power curves keep their verdicts only."""
    is_main = draw.purpose == "main"
    with_y2 = is_main and draw.part == "layers" and (draw.seed - FRESH) % FULL_RESPONSE == FULL_RESPONSE - 1
    made = measure_draw(
        draw.kind, draw.seed, draw.part, topics=draw.topics, effect=draw.effect, pairs=draw.pairs,
        full_response=with_y2,
    )  # fmt: skip
    if not is_main:
        made |= {name: made[name].iloc[:0] for name in ("localisation", "evidence")}
    return made | {"verdicts": made["verdicts"].assign(purpose=draw.purpose)}


def run_draws(share: str = "1/1", folder: Path = paths.CALIBRATION) -> None:
    """Measure every draw of this share that is not there yet, and join what there is."""
    known = shipped_keys(folder)
    plan = {draw.name: draw for draw in plan_draws()}
    run_campaign(plan, measure_planned, TABLES, lambda draw: draw.key in known, share, folder)


def shipped_keys(folder: Path = paths.CALIBRATION) -> set[tuple[object, ...]]:
    """Keys of the draws that the shipped table holds, as of a clone of the repository."""
    table = read_shipped("verdicts", folder, or_empty=True)
    columns = [table.purpose, table.claim.map(PART_OF), table.kind, table.seed, table.topics, table.pairs]
    effects = table.effect.where(table.purpose != "main").round(6)
    return {(*rest, None if size != size else size) for *rest, size in zip(*columns, effects, strict=True)}


def judged_again(folder: Path = paths.CALIBRATION, *, every: int = 1) -> pd.DataFrame:
    """What the rules of today say of the stored evidence of every n-th draw: `verdict` beside the `stored` one.

    A rule that is younger than a draw has no stored verdict on it, and is left out. Columns: part, kind, seed, claim, rule,
    verdict, stored.
    """
    stored = read_shipped("verdicts", folder).query("purpose == 'main'")
    known = stored.set_index(["kind", "seed", "claim", "rule"]).verdict
    groups = list(read_shipped("evidence", folder).groupby(["part", "kind", "seed"]))
    rows = [
        (part, kind, seed, one.claim, rule, one.verdict, known[kind, seed, one.claim, rule])
        for (part, kind, seed), evidence in groups[::every]
        for rule, one in judged(evidence, f"compiled-{kind}-{seed}", (part,))
        if (kind, seed, one.claim, rule) in known.index
    ]
    return pd.DataFrame(rows, columns=["part", "kind", "seed", "claim", "rule", "verdict", "stored"])
