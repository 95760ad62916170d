"""What the rules say of a compiled model when sampling error is gone: the same rules on effects in closed form.

The closed form gives effects on the first answer token, so C1 to C4 and C5a have a population verdict and the others none; nor
has the corrected C1, which asks where the decision is computed. Rows that the closed form knows take the place of the sample's,
with intervals of no width; what needs a run of the model (probe, benign neurons, untrained twin) stays as it was measured.
Topics are the unit, with one pair each: ten moved no value by more than 0.002 where we looked.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from companion.base import paths
from companion.base.thresholds import MLP_SHARE, MLP_SHARE_WITH_OWN, deepest_early_layer
from companion.calibration import draws
from companion.calibration.campaign import SCHEMAS, code_version, read_shipped, run_campaign
from companion.calibration.rates import FRESH
from companion.claims import corrected_rules
from companion.claims.ledger import ledger
from companion.claims.verdict import Rows, Verdict
from companion.evidence import layers, tokens
from companion.mediation.control_models import normalisations
from companion.mediation.study import Study
from organisms import compiled, compiled_language, compiled_truth
from organisms.compiled import Organism
from organisms.compiled_language import Planned
from organisms.compiled_program import KINDS, build_program

CLAIMS = {"context": ("C3",), "layers": ("C1", "C2", "C4"), "neurons": ("C5a",)}  # by part; others have no closed form
TOPICS, DISCOVER_EVERY = 500, 5  # four fifths of the topics count as test: 19 times as many as in a draw of 70 topics
EVERY_LAYERS = 5  # the closed form of the layers' draws takes a quarter of a minute, so only every fifth has one
BENIGN = tuple(f"B{i + 1}" for i in range(compiled_language.BEHAVIOURS))
Draw = tuple[str, str, int]  # part, kind, seed
Values = dict[tuple[str, str, str], float]  # by claim, quantity and variant


def verdicts_without_sampling(
    organism: Organism, this: Study, rows: pd.DataFrame, part: str
) -> dict[tuple[str, str], tuple[Verdict, pd.DataFrame]]:
    """By claim and rule, where a part of `CLAIMS` has one: the population verdict, and the evidence rows that it rests on."""
    label = organism.name
    known = closed_form_values(organism, this, part)
    replaced = with_values(rows, label, known)
    own = Rows(label, replaced[replaced.model == label])
    sample = rows[(rows.model == label) & (rows.claim == "C4") & (rows.variant == "main")]
    shares = set(sample.quantity) & {quantity for claim, quantity, _ in known if claim == "C4"}
    # Not every hand-over layer has C4's share.
    shown = {"registered": MLP_SHARE in shares, "corrected": MLP_SHARE_WITH_OWN in shares}
    said = [("registered", one) for one in ledger(replaced, (label,))]
    said += [("corrected", one) for one in corrected_rules.corrected_verdicts(own) if one.claim != "C1"]
    return {
        (one.claim, rule): (one, replaced)
        for rule, one in said
        if one.claim in CLAIMS[part] and (one.claim != "C4" or shown[rule])
    }


def closed_form_values(organism: Organism, this: Study, part: str) -> Values:
    """Estimates of a part's evidence rows over new topics. The program has no norm: freezing its scale changes nothing."""
    program, pairs = build_program(organism.design, TOPICS), new_pairs(organism, part)
    generation = [one for one in pairs if one.pair.treatment in ("T2", "T2b")]
    table = split_anew(compiled_truth.effect_table(program, pairs))
    test = table[table.split == "test"]
    te = test.drop_duplicates(["treatment", "pair_id"]).groupby("treatment").te.mean()
    known: Values = {("gate", f"TE {name}", "main"): float(value) for name, value in te.items()}
    if part == "context":
        early = test[(test.position == "shared") & (test.layer == deepest_early_layer(this.subject.n_layers))]
        psi = float(early.nie0.sum() / early.te.sum())
        return known | {("C3", "psi0 early, shared tokens", name): psi for name in ("main", "unsaturated")}
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
    keys = [(str(one["claim"]), str(one["quantity"]), str(one["variant"])) for one in rows]
    return known | {key: float(one["estimate"]) for key, one in zip(keys, rows, strict=True)}  # type: ignore[arg-type]


def new_pairs(organism: Organism, part: str) -> list[Planned]:
    """New pairs of the same model over new topics, one a topic and treatment."""
    design = organism.design
    pairs = compiled_language.draw_pairs([design.seed, KINDS.index(design.kind), 1], TOPICS, 1)
    wanted = ("T1",) if part == "context" else ("T2", "T2b", *(BENIGN if part == "layers" else ()))
    return [one for one in pairs if one.pair.treatment in wanted]


def split_anew(table: pd.DataFrame) -> pd.DataFrame:
    """Every fifth topic is for choices (discover), all others for numbers (test)."""
    number = table.topic.str.extract(r"(\d+)$")[0].astype(int)
    return table.assign(split=np.where(number % DISCOVER_EVERY == 0, "discover", "test"))


def with_values(rows: pd.DataFrame, label: str, known: Values) -> pd.DataFrame:
    """The evidence with the known values in place of the sample's, as intervals of no width."""
    made = rows.copy()
    for (claim, quantity, variant), value in known.items():
        at = (made.model == label) & (made.claim == claim) & (made.quantity == quantity) & (made.variant == variant)
        made.loc[at, ["estimate", "ci_low", "ci_high"]] = value
    return made


def plan_population(evidence: pd.DataFrame) -> list[Draw]:
    """Which of the stored draws get population verdicts."""
    found = evidence[["part", "kind", "seed"]].drop_duplicates().itertuples(index=False, name=None)
    return [
        (part, kind, seed)
        for part, kind, seed in found
        if part in CLAIMS and (part != "layers" or (seed - FRESH) % EVERY_LAYERS == EVERY_LAYERS - 1)
    ]


def measure_population(draw: Draw, evidence: pd.DataFrame, stored: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Population verdicts of one draw, from all stored evidence and the stored verdicts: no model is run through the pipeline."""
    part, kind, seed = draw
    organism = compiled.draw(kind, seed, topics=draws.TOPICS, pairs_per_topic=1)
    own = evidence[(evidence.part == part) & (evidence.kind == kind) & (evidence.seed == seed)]
    found = verdicts_without_sampling(organism, compiled.study(organism), own, part)
    rows = []
    for row in stored[(stored.kind == kind) & (stored.seed == seed)].itertuples():
        if (row.claim, row.rule) in found:
            verdict, known = found[row.claim, row.rule]
            shown = Rows(verdict.model, known[known.model == verdict.model]).find(verdict.claim, row.quantity)
            # The quantity that the sample's verdict shows; NaN where the closed form does not know it.
            value = float(shown.estimate) if shown is not None and shown.ci_low == shown.ci_high else math.nan
            rows.append((kind, row.claim, row.rule, verdict.verdict, code_version(), seed, value))
    return {"population": pd.DataFrame(rows, columns=list(SCHEMAS["population"]))}


def run_population(share: str = "1/1", folder: Path = paths.CALIBRATION) -> None:
    """Compute the population verdicts of this share that are not there yet, and join what there is."""
    evidence = read_shipped("evidence", folder)
    stored = read_shipped("verdicts", folder).query("purpose == 'main'")
    known = {(one.kind, one.seed, one.claim) for one in read_shipped("population", folder, or_empty=True).itertuples()}
    run_campaign(
        {"-".join(map(str, draw)): draw for draw in plan_population(evidence)},
        partial(measure_population, evidence=evidence, stored=stored), ("population",),
        lambda draw: any((*draw[1:], claim) in known for claim in CLAIMS[draw[0]]), share, folder,
    )  # fmt: skip
