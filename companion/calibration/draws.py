"""Draws of the calibration: models whose truth is known go through the unchanged pipeline and its rules.

The plan is fixed before any result. A draw is measured in parts, the stages of the pipeline, and judged; a population verdict
is what the same rules say without sampling error, on effects in closed form over new topics. The closed form knows effects on
the first answer token: C1 to C4 and C5a have a population verdict, but not the corrected C1. Rows that it knows take the place
of the sample's, with intervals of no width; what needs a run of the model stays as it was measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from companion.base import paths
from companion.base.files import EVIDENCE
from companion.base.thresholds import MLP_SHARE, MLP_SHARE_WITH_OWN, PSI, UNTRAINED, deepest_early_layer
from companion.calibration.campaign import SCHEMAS, SCORES, code_version, read_shipped, run_campaign
from companion.calibration.rates import CONTRADICTED_TO, FRESH_LAST, FRESH_LATER, SUPPORTED_FROM
from companion.calibration.truths import Measured, ideal_push_rows, localise_draw, truth_of
from companion.claims.corrected_rules import C6_PARTS
from companion.claims.ledger import KEYS, ledger, rule_name
from companion.claims.verdict import Rows, Verdict, decide, precondition
from companion.evidence import layers, steering, tokens
from companion.evidence.layers import EvidenceRows
from companion.evidence.neurons import gating_evidence, measure_neurons, neuron_evidence
from companion.mediation import mechanisms, sweeps
from companion.mediation.study import CONTROL_PAIRS, Study, normalisations
from companion.model.load import untrained_twin
from companion.steering.experiment import Prompts
from organisms import compiled, compiled_language, compiled_truth
from organisms.compiled import Organism
from organisms.compiled_design import HELD_OUT, KINDS, Design, draw_design
from organisms.compiled_language import Planned
from organisms.compiled_program import build_program

# What is measured together, and the claims that it is measured for.
STAGES = {
    "context": ("C3",), "layers": ("C1", "C2", "C4"), "timing": ("C5c",), "neurons": ("C5a", "C5b", "C7"),
    "steering": ("C6", *C6_PARTS),
}  # fmt: skip
TABLES = ("verdicts", "localisation", "evidence", "population")
FRESH = 11  # the first seed: smaller ones were seen while the corrected rules were written
# Further first seeds: of C6, measured with budgets of what can act; near a threshold; of kinds whose builder knew no rule.
FRESH_LIVE, FRESH_NEAR, FRESH_HELD_OUT = 400, 500, 600
TOPICS = 70  # the fewest, rounded up, that leave 20 topics in a test split of 30 %
# How many models of each kind, by the first seed: at least 59 that make a claim false and pass its precondition, for every
# claim. The corrections have models of their own, since they were written after draws of their claims: C1 from FRESH_LATER on,
# C4 from FRESH_LAST on. All draws of C6 are from FRESH_LIVE on: earlier ones had budgets that counted what cannot act.
COUNTS = {
    FRESH: {
        "context": {"context_free": 30, "context_unused": 30, "late": 15, "early": 15},
        "layers": {"early": 15, "middle": 15, "late_like_benign": 15, "skip_only": 30, "attention": 30, "late": 15,
                   "early_carrier": 15},
        "timing": {"each_token": 60, "late": 15, "gated": 15},
        "neurons": {"distributed": 15, "permuted": 25, "gated": 15, "late": 15, "adjacent": 15, "attention": 15, "middle": 15,
                    "or": 15, "and": 15},
    },
    FRESH_LATER: {
        "layers": {"early": 15, "middle": 15, "late_like_benign": 15, "skip_only": 30, "attention": 10, "late": 10,
                   "early_carrier": 10},
    },
    FRESH_LAST: {
        "layers": {"skip_only": 30, "attention": 30, "middle": 25, "early": 10, "late": 10, "late_like_benign": 10,
                   "early_carrier": 10},
    },
    FRESH_LIVE: {"steering": {"late": 30, "early": 30, "middle": 30}},
}  # fmt: skip
# Models of their own for the power curves; for what the corrections of C1, C3 and C4 read, models planned after these.
POWER_FIRST, POWER_MODELS = {"context": 700, "layers": 700, "timing": 100, "neurons": 100}, 5
# Below 67 topics every rule is silent by design; 70 topics with one pair each are the largest effect's draws.
POWER_TOPICS, POWER_PAIRS, POWER_EFFECTS = (120, 200), 3, (0.5, 1.0, 2.0, 3.0)
POWER_KINDS = {
    "context": ("late",), "layers": ("late", "early", "attention"), "timing": ("late",),
    "neurons": ("late", "distributed", "gated"),
}  # fmt: skip
# Models whose true value lies near a threshold, by kind: the part, how many, and their topics. C5c needs more topics, since
# with 21 in the test split its exact limits leave no share below 1 surely above 0.8.
NEAR = {
    "split_decision": ("layers", 33, TOPICS), "split_context": ("context", 48, TOPICS), "split_last": ("neurons", 30, TOPICS),
    "split_gate": ("neurons", 30, TOPICS), "split_opener": ("timing", 10, 200),
}  # fmt: skip
# Kinds whose builder knew the text of the claims and not the rules, and the parts that ask what they were built for.
HELD_OUT_PARTS = {
    **dict.fromkeys(("backup", "understudy", "self_carried"), ("layers",)),
    **dict.fromkeys(("cancelled", "relayed"), ("layers", "neurons")), **dict.fromkeys(("opposed", "crowd"), ("neurons",)),
    "bag_of_words": ("context",), "recovers": ("timing",), "suppressed": ("steering",),
}  # fmt: skip
HELD_OUT_DRAWS = 8
FULL_RESPONSE = 5  # every so many seeds also have Y2 among the estimators
PART_OF = {claim: part for part, claims in STAGES.items() for claim in claims}
TRUTH = {True: "true", False: "false", None: "open"}
# Population verdicts: by part, the claims that have one. Topics are the unit, with one pair each: ten moved no value by more
# than 0.002 where we looked. Four fifths count as test: 19 times as many as in a draw of 70 topics.
IN_CLOSED_FORM = {"context": ("C3",), "layers": ("C1", "C2", "C4"), "neurons": ("C5a",)}
NEW_TOPICS, DISCOVER_EVERY = 500, 5
EVERY_LAYERS = 5  # the closed form of the layers' draws takes a quarter of a minute, so only every fifth has one
BENIGN = tuple(f"B{i + 1}" for i in range(compiled_language.BEHAVIOURS))
Draw = tuple[str, str, int]  # part, kind, seed
Values = dict[tuple[str, str, str], float]  # by claim, quantity and variant


@dataclass(frozen=True)
class PlannedDraw:
    """One draw of the plan: a part of the pipeline on one model. `effect` None: drawn with the model."""

    purpose: Literal["main", "topics", "pairs", "effect", "threshold", "held-out"]
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
    """All draws in the order of measuring: one of each kind, then the next; power curves; near a threshold; held-out kinds."""
    main = [
        PlannedDraw("main", part, kind, first + i)
        for first, parts in COUNTS.items()
        for part, counts in parts.items()
        for kind, count in counts.items()
        for i in range(count)
    ]
    power, largest = [], max(POWER_EFFECTS)
    for i, (part, kinds) in itertools.product(range(POWER_MODELS), POWER_KINDS.items()):
        for at in [(part, kind, POWER_FIRST[part] + i) for kind in kinds]:
            power += [PlannedDraw("effect", *at, effect=size) for size in POWER_EFFECTS]
            power += [PlannedDraw("topics", *at, topics=n, effect=largest) for n in POWER_TOPICS]
            power.append(PlannedDraw("pairs", *at, effect=largest, pairs=POWER_PAIRS))
    near = [
        PlannedDraw("threshold", part, kind, FRESH_NEAR + i, topics=topics)
        for kind, (part, count, topics) in NEAR.items()
        for i in range(count)
    ]
    held_out = [
        PlannedDraw("held-out", part, kind, FRESH_HELD_OUT + i)
        for i in range(HELD_OUT_DRAWS)
        for kind in HELD_OUT
        for part in HELD_OUT_PARTS[kind]
    ]
    main.sort(key=lambda draw: draw.seed)
    near.sort(key=lambda draw: (draw.seed - FRESH_NEAR) / NEAR[draw.kind][1])
    return [*main, *power, *near, *held_out]


def measure_study(
    this: Study, label: str, stages: Collection[str] = tuple(STAGES), *, full_response: bool = False,
    prompt_set: Prompts | None = None,
) -> Measured:  # fmt: skip
    """Evidence rows under a model label, with those of the untrained twin behind them, for some stages.

    `full_response` adds Y2, which no verdict rests on. Steering asks for the `prompt_set`, whose suites it is tried on. Every
    stage has the preconditions of the treatments that its rules ask about.
    """
    core = replace(this, pairs=tuple(pair for pair in this.pairs if pair.pair.split != "validate"))
    harm = replace(core, pairs=tuple(pair for pair in core.pairs if pair.pair.treatment != "T1"))
    rows: EvidenceRows = []
    swept = neurons = computed = None
    if "layers" in stages:
        swept = layers.measure_layers(harm, label, full_response=full_response, direct=True)
        rows += swept.evidence + layers.evidence_c2(swept.effects, swept.effects, label, normalisations(harm))
        computed = mechanisms.interaction_effects(core)
        rows += layers.evidence_c1_computed(computed, label, core.subject.n_layers)
        # Without T1: the one control that reads a twin is that of C1.
        thin = harm.subsample(CONTROL_PAIRS)
        rows += layers.measure_layers(replace(thin, subject=untrained_twin(harm.subject)), label + UNTRAINED).evidence
        rows += tokens.measure_c4(this, label)
    elif {"timing", "neurons", "steering"} & set(stages):
        rows += layers.precondition_rows(sweeps.clean_outcomes(harm), label, core.subject.n_layers)
    if "context" in stages and core.of("T1"):
        rows += layers.measure_layers(replace(core, pairs=tuple(core.of("T1")), twins={}), label).evidence
    if "timing" in stages:
        rows += tokens.evidence_c5c(tokens.measure_timing(this), label)
    if "neurons" in stages:
        neurons = measure_neurons(core)
        rows += neuron_evidence(neurons, label) + gating_evidence(core, neurons.table, label)
    if "steering" in stages and prompt_set is not None:
        rows += [{"model": label, **row} for row in steering.steering_evidence(this, prompt_set)]
    table = pd.DataFrame(rows, columns=list(EVIDENCE)).drop_duplicates(KEYS, ignore_index=True)
    return Measured(table, swept, neurons, computed)


def measure_draw(draw: PlannedDraw) -> dict[str, pd.DataFrame]:
    """Measure one model with a part of the unchanged pipeline, and ask every rule of that part: rows of each of the `TABLES`.

    Only draws of the error rates keep what their verdicts rest on; only those near a threshold have rows of true values.
    """
    kind, seed, part, is_main = draw.kind, draw.seed, draw.part, draw.purpose == "main"
    organism = compiled.draw(kind, seed, effect=draw.effect, topics=draw.topics, pairs_per_topic=draw.pairs)
    this = compiled.study(organism)
    prompts = compiled_language.steering_prompts(organism.pairs, seed) if part == "steering" else None
    with_y2 = is_main and part == "layers" and (seed - FRESH) % FULL_RESPONSE == FULL_RESPONSE - 1
    measured = measure_study(this, organism.name, (part,), full_response=with_y2, prompt_set=prompts)
    rows = measured.rows
    if prompts is not None:
        pushed = pd.DataFrame(ideal_push_rows(this, prompts), columns=list(EVIDENCE)).assign(model=organism.name)
        rows = pd.concat([rows, pushed], ignore_index=True)
    own, said, is_near = Rows(organism.name, rows), judged(rows, organism.name, part), draw.purpose == "threshold"
    values = built_values(kind, seed) if is_near else pd.DataFrame(columns=list(SCHEMAS["population"]))
    known = values.set_index(["claim", "rule"]).population.to_dict()

    def truth(one: Verdict) -> str:
        if is_near:
            value = known.get((one.claim, one.rule))
            return TRUTH[None if value is None else bool(value >= SUPPORTED_FROM[rule_name(one.claim, one.rule)])]
        return truth_of(one.claim, own) if one.claim in C6_PARTS else TRUTH[organism.claims[one.claim]]

    verdicts = pd.DataFrame(said).assign(
        purpose=draw.purpose, kind=kind, seed=seed, topics=draw.topics, pairs=draw.pairs, code=code_version(),
        effect=float(organism.design.effect), truth=[truth(one) for one in said],
        gate=["passed" if precondition(own, one.claim) is None else "stopped" for one in said],
    )[list(SCHEMAS["verdicts"])]  # fmt: skip
    numbers = ["estimate", "ci_low", "ci_high"]
    verdicts[numbers] = verdicts[numbers].astype(float)  # None where a verdict shows no row
    evidence = rows.assign(kind=kind, part=part, seed=seed)[list(SCHEMAS["evidence"])]
    found = localise_draw(organism, this, measured) if is_main else pd.DataFrame(columns=list(SCORES))
    return {
        "verdicts": verdicts, "localisation": found, "evidence": evidence if is_main else evidence.iloc[:0],
        "population": values,
    }  # fmt: skip


def judged(evidence: pd.DataFrame, model: str, part: str) -> list[Verdict]:
    """What the registered and the corrected rules say of a model's evidence, on the claims of a part."""
    return [one for one in ledger(evidence, (model,)) if one.claim in STAGES[part]]


def built_values(kind: str, seed: int) -> pd.DataFrame:
    """The true values of a model near a threshold, as rows of `population`: over new topics, by the program's arithmetic.

    `population_verdict` is what the value alone allows: the other conditions of a rule were built to hold.
    """
    design = draw_design(kind, seed)
    program, pairs = build_program(design, NEW_TOPICS), new_pairs(design, PART_OF[compiled_truth.PLACED[kind][0]])
    rows = []
    for claim, value in compiled_truth.near_values(design, program, pairs).items():
        name = rule_name(claim, "corrected")
        verdict = decide(supported=value >= SUPPORTED_FROM[name], contradicted=value <= CONTRADICTED_TO[name])
        rows.append((kind, claim, "corrected", verdict, code_version(), seed, value))
    return pd.DataFrame(rows, columns=list(SCHEMAS["population"]))


def run_draws(share: str = "1/1") -> None:
    """Measure every draw of this share that is not there yet, and join what there is."""
    known, plan = shipped_keys(), {draw.name: draw for draw in plan_draws()}
    run_campaign(plan, measure_draw, TABLES, lambda draw: draw.key in known, share)


def shipped_keys() -> set[tuple[object, ...]]:
    """Keys of the draws that the shipped table holds, as of a clone of the repository."""
    table = read_shipped("verdicts", or_empty=True)
    columns = [table.purpose, table.claim.map(PART_OF), table.kind, table.seed, table.topics, table.pairs]
    effects = table.effect.where(~table.purpose.isin(("main", "threshold", "held-out"))).round(6)
    return {(*rest, None if size != size else size) for *rest, size in zip(*columns, effects, strict=True)}


def verdicts_without_sampling(
    organism: Organism, this: Study, rows: pd.DataFrame, part: str
) -> tuple[dict[tuple[str, str], Verdict], pd.DataFrame]:
    """Population verdicts by claim and rule, of the claims of a part that have one, and the evidence rows that they rest on."""
    label, known, replaced = organism.name, closed_form_values(organism, this, part), rows.copy()
    for (claim, quantity, variant), value in known.items():
        at = (rows.model == label) & (rows.claim == claim) & (rows.quantity == quantity) & (rows.variant == variant)
        replaced.loc[at, ["estimate", "ci_low", "ci_high"]] = value
    # Not every hand-over layer has C4's share, and nothing says in closed form where a decision is computed.
    quantities = {quantity for claim, quantity, _ in known if claim == "C4"}
    shares, own = {"registered": MLP_SHARE, "corrected": MLP_SHARE_WITH_OWN}, Rows(label, rows)
    hidden = {("C4", rule) for rule, name in shares.items() if name not in quantities or own.find("C4", name) is None}
    hidden.add(("C1", "corrected"))
    said = {(one.claim, one.rule): one for one in judged(replaced, label, part) if one.claim in IN_CLOSED_FORM[part]}
    return {key: one for key, one in said.items() if key not in hidden}, replaced


def closed_form_values(organism: Organism, this: Study, part: str) -> Values:
    """Estimates of a part's evidence rows over new topics. The program has no norm: freezing its scale changes nothing."""
    program, pairs = build_program(organism.design, NEW_TOPICS), new_pairs(organism.design, part)
    generation = [one for one in pairs if one.pair.treatment in ("T2", "T2b")]
    table = split_anew(compiled_truth.effect_table(program, pairs))
    test = table[table.split == "test"]
    te = test.drop_duplicates(["treatment", "pair_id"]).groupby("treatment").te.mean()
    known: Values = {("gate", f"TE {name}", "main"): float(value) for name, value in te.items()}
    if part == "context":
        early = test[(test.position == "shared") & (test.layer == deepest_early_layer(this.subject.n_layers))]
        family = early.pair_id.map({one.pair.id: f"family {one.pair.family}" for one in pairs})
        parts = {"main": early, "unsaturated": early, **dict(list(early.groupby(family)))}
        return known | {("C3", PSI, str(name)): float(p.nie0.sum() / p.te.sum()) for name, p in parts.items()}
    if part == "neurons":
        share, k90 = compiled_truth.last_layer(program, generation)
        known |= {("C5a", "psi1", name): share for name in ("main", "norm frozen", "unsaturated")}
        return known | {("C5a", "k90", "main"): float(k90)}
    linear = table[table.site.str.endswith(".direct")].assign(outcome="contrast.frozen")
    effects = pd.concat([table, table.assign(outcome="Y1.frozen"), linear], ignore_index=True)
    carried = split_anew(compiled_truth.path_table(program, generation))
    carried = pd.concat([carried, carried.assign(outcome="Y1.frozen")], ignore_index=True)
    rows = layers.evidence_c1(effects, organism.name, this.subject.n_layers)
    rows += layers.evidence_c2(effects, effects, organism.name, normalisations(this))
    rows += tokens.evidence_c4(carried, organism.name, program.n_layers)
    made = pd.DataFrame(rows)
    return known | dict(zip(zip(made.claim, made.quantity, made.variant, strict=True), made.estimate, strict=True))


def new_pairs(design: Design, part: str) -> list[Planned]:
    """New pairs for the same model over new topics, one a topic and treatment."""
    pairs = compiled_language.draw_pairs([design.seed, KINDS.index(design.kind), 1], NEW_TOPICS, 1)
    wanted = ("T1",) if part == "context" else ("T2", "T2b", *(BENIGN if part == "layers" else ()))
    return [one for one in pairs if one.pair.treatment in wanted]


def split_anew(table: pd.DataFrame) -> pd.DataFrame:
    """Every fifth topic is for choices (discover), all others for numbers (test)."""
    number = table.topic.str.extract(r"(\d+)$")[0].astype(int)
    return table.assign(split=np.where(number % DISCOVER_EVERY == 0, "discover", "test"))


def measure_population(draw: Draw, evidence: pd.DataFrame, stored: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Population verdicts of one draw, from all stored evidence and the stored verdicts: no model is run through the pipeline."""
    part, kind, seed = draw
    organism = compiled.draw(kind, seed, topics=TOPICS, pairs_per_topic=1)
    own = evidence[(evidence.part == part) & (evidence.kind == kind) & (evidence.seed == seed)]
    found, known = verdicts_without_sampling(organism, compiled.study(organism), own, part)
    rows = []
    for row in stored[(stored.kind == kind) & (stored.seed == seed)].itertuples():
        if verdict := found.get((row.claim, row.rule)):
            # The sample's verdict shows the main row of its quantity, or that of one family.
            sample = own[(own.claim == row.claim) & (own.quantity == row.quantity) & (own.estimate == row.estimate)]
            variant = sample.variant.iloc[0] if len(sample) else "main"
            shown = Rows(verdict.model, known).find(verdict.claim, row.quantity, variant)
            # NaN where the closed form does not know it.
            value = float(shown.estimate) if shown is not None and shown.ci_low == shown.ci_high else math.nan
            rows.append((kind, row.claim, row.rule, verdict.verdict, code_version(), seed, value))
    return {"population": pd.DataFrame(rows, columns=list(SCHEMAS["population"]))}


def run_population(share: str = "1/1", folder: Path = paths.CALIBRATION) -> None:
    """Compute the population verdicts of this share that are not there yet, and join what there is."""
    evidence = read_shipped("evidence", folder)
    stored = read_shipped("verdicts", folder).query("purpose == 'main'")
    known = {(one.kind, one.seed, one.claim) for one in read_shipped("population", folder, or_empty=True).itertuples()}
    plan = {
        f"{part}-{kind}-{seed}": (part, kind, seed)
        for part, kind, seed in evidence[["part", "kind", "seed"]].drop_duplicates().itertuples(index=False, name=None)
        if part in IN_CLOSED_FORM and (part != "layers" or (seed - FRESH) % EVERY_LAYERS == EVERY_LAYERS - 1)
    }
    run_campaign(
        plan, partial(measure_population, evidence=evidence, stored=stored), ("population",),
        lambda draw: any((*draw[1:], claim) in known for claim in IN_CLOSED_FORM[draw[0]]), share, folder,
    )  # fmt: skip
