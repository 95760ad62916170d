"""C4 in closed form: what the last token's residual stream does if outputs above it are held, by a program's arithmetic.

What the rules say of a compiled model when sampling error is gone: the same rules on effects in closed form.

The closed form gives effects on the first answer token. So C1 to C4 and C5a have a population verdict and the others have
none; nor has the corrected C1, which asks where the decision is computed. Rows that the closed form knows take the place of the
sample's, with intervals of no width; what needs a run of the model (probe, benign neurons, untrained twin, joint probability,
patch norms) stays as it was measured. Topics are the unit: ten pairs of each of the 500 moved no value by more than 0.002 where
we looked (one model a part), at ten times the cost, so there is one.

Population verdicts of the calibration's draws: from the evidence that is stored, so that no model is run again.

Every draw whose claims have a closed form gets one, but of the layers' draws, whose closed form takes a quarter of a minute,
only every fifth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from companion.base import files, paths
from companion.base.thresholds import CARRIED, CARRIED_OWN, deepest_early_layer
from companion.calibration import campaign, one_draw
from companion.calibration.campaign import FRESH
from companion.calibration.rates import AT_LARGE, population_verdicts
from companion.claims import corrected_rules
from companion.claims.ledger import ledger
from companion.claims.verdict import Rows, Verdict
from companion.evidence import layers, tokens
from companion.mediation import estimands, path_specific
from companion.mediation.control_models import normalisations
from companion.mediation.study import Study
from organisms import compiled, compiled_language, compiled_truth
from organisms.compiled import Organism
from organisms.compiled_language import Planned
from organisms.compiled_program import KINDS, Program, build
from organisms.compiled_truth import Side, last_layer, readout, run_program, sides

PARTS = {"attn_out": "attn", "mlp_out": "mlp"}  # what a run's trace calls them


def carrier_table(program: Program, pairs: Sequence[Planned]) -> pd.DataFrame:
    """The rows of `path_specific.path_effects` on Y1, with those of T2 - T2b behind them, for pairs of T2 and T2b."""
    made = [_treatment(program, [one for one in pairs if one.pair.treatment == name]) for name in ("T2", "T2b")]
    effects = estimands.with_estimands(pd.concat(made, ignore_index=True))
    twins = {one.pair.id: one.pair.twin for one in pairs if one.pair.twin}
    return estimands.with_difference(effects, twins)


def _treatment(program: Program, pairs: Sequence[Planned]) -> pd.DataFrame:
    camps, both = compiled_language.outcomes()[pairs[0].pair.treatment], sides(program, pairs)
    y00, y11 = (readout(program, *camps, side.last.post[-1]) for side in both)
    fields = {"pair_id": "id", "topic": "topic", "treatment": "treatment", "split": "split"}
    meta = {name: [getattr(one.pair, field) for one in pairs] for name, field in fields.items()}
    tables = []
    for layer in range(program.n_layers):
        for name in path_specific.HELD:
            y01, y10 = (readout(program, *camps, final(a, b, layer, name)) for a, b in (both, both[::-1]))
            cells = {"y00": y00, "y01": y01, "y10": y10, "y11": y11}
            place = {"site": name, "layer": layer, "position": "last", "head": -1, "outcome": "Y1"}
            tables.append(pd.DataFrame({**meta, **place, **cells}))
    return pd.concat(tables, ignore_index=True)


def final(base: Side, source: Side, layer: int, name: str) -> Float[np.ndarray, "prompt channel"]:
    """Final state of the last token with the source's state after a layer, and the base's outputs held by `path_specific.HELD`."""
    clean, above = base.last, range(layer + 1, base.program.n_layers)
    do = {(site, at): getattr(clean, PARTS[site])[at] for site in path_specific.HELD[name] for at in above}
    own = clean.mlp[layer] - source.last.mlp[layer] if name == "all held" else 0.0
    do[("resid_post", layer)] = source.last.post[layer] + own
    return run_program(base.program, base.found, "last", base.end.pre, do, clean).post[-1]


CLAIMS = {"context": ("C3",), "layers": ("C1", "C2", "C4"), "neurons": ("C5a",)}  # by part; others have no closed form


TOPICS, DISCOVER = 500, 0.2  # four fifths of the topics count as test: 19 times as many as in a draw of 70 topics


BENIGN = tuple(f"B{i + 1}" for i in range(compiled_language.BEHAVIOURS))


def verdicts_without_sampling(
    organism: Organism, this: Study, rows: pd.DataFrame, part: str
) -> dict[tuple[str, str], tuple[Verdict, pd.DataFrame]]:
    """By claim and rule, where a part of `CLAIMS` has one: the population verdict, and the evidence rows that it rests on."""
    label = organism.name
    program, pairs = build(organism.design, TOPICS), planned(organism, part)
    table = split_anew(compiled_truth.table(program, pairs))
    known = gate_rows(table)
    if part == "context":
        early = table[(table.position == "shared") & (table.split == "test")]
        early = early[early.layer == deepest_early_layer(this.subject.n_layers)]
        psi = float(early.nie0.sum() / early.te.sum())
        known |= {("C3", "psi0 early, shared tokens", name): psi for name in ("main", "unsaturated")}
    elif part == "layers":
        known |= layer_rows(table, this, label)
        generation = [one for one in pairs if one.pair.treatment in ("T2", "T2b")]
        known |= carrier_rows(split_anew(carrier_table(program, generation)), label, program.n_layers)
    else:
        share, k90 = last_layer(program, [one for one in pairs if one.pair.treatment in ("T2", "T2b")])
        known |= {("C5a", "psi1", "main"): share, ("C5a", "k90", "main"): float(k90)}
        known |= {("C5a", "psi1", name): share for name in ("norm frozen", "unsaturated")}
    replaced = with_values(rows, label, known)
    own = Rows(label, replaced[replaced.model == label])
    said = [("registered", one) for one in ledger(replaced, (label,))]
    said += [("corrected", one) for one in corrected_rules.corrected_verdicts(own) if one.claim != "C1"]
    return {
        (one.claim, rule): (one, replaced)
        for rule, one in said
        if one.claim in CLAIMS[part] and (one.claim != "C4" or _is_shared(rule, known, rows[rows.model == label]))
    }


def _is_shared(rule: str, known: dict[tuple[str, str, str], float], sample: pd.DataFrame) -> bool:
    """Whether C4's share, which not every hand-over layer has, is there in the population and in the sample."""
    carried = CARRIED if rule == "registered" else CARRIED_OWN
    main = sample[(sample.claim == "C4") & (sample.variant == "main")]
    return ("C4", carried, "main") in known and carried in set(main.quantity)


def planned(organism: Organism, part: str) -> list[compiled_language.Planned]:
    """New pairs of the same model over new topics, one a topic and treatment."""
    design = organism.design
    pairs = compiled_language.plan([design.seed, KINDS.index(design.kind), 1], TOPICS, 1)
    wanted = ("T1",) if part == "context" else ("T2", "T2b", *(BENIGN if part == "layers" else ()))
    return [one for one in pairs if one.pair.treatment in wanted]


def split_anew(table: pd.DataFrame) -> pd.DataFrame:
    """Every fifth topic is for choices (discover), all others for numbers (test)."""
    number = table.topic.str.extract(r"(\d+)$")[0].astype(int)
    return table.assign(split=np.where(number % round(1 / DISCOVER) == 0, "discover", "test"))


def gate_rows(table: pd.DataFrame) -> dict[tuple[str, str, str], float]:
    """TE of every treatment."""
    test = table[table.split == "test"].drop_duplicates(["treatment", "pair_id"])
    return {("gate", f"TE {name}", "main"): float(value) for name, value in test.groupby("treatment").te.mean().items()}


def layer_rows(table: pd.DataFrame, this: Study, label: str) -> dict[tuple[str, str, str], float]:
    """C1 and C2. The program's arithmetic has no norm, so freezing its scale changes nothing."""
    frozen = table.assign(outcome="Y1.frozen")
    linear = table[table.site.str.endswith(".direct")].assign(outcome="contrast.frozen")
    whole = pd.concat([table, frozen, linear], ignore_index=True)
    rows = layers.evidence_c1(whole, label, this.subject.n_layers)
    rows += layers.evidence_c2(whole, whole, label, normalisations(this))
    return estimates(rows)


def carrier_rows(table: pd.DataFrame, label: str, n_layers: int) -> dict[tuple[str, str, str], float]:
    """C4; freezing the norm's scale changes nothing here either."""
    whole = pd.concat([table, table.assign(outcome="Y1.frozen")], ignore_index=True)
    return estimates(tokens.evidence_c4(whole, label, n_layers))


def estimates(rows: list[dict[str, object]]) -> dict[tuple[str, str, str], float]:
    """The estimates of evidence rows, by claim, quantity and variant."""
    return {(str(one["claim"]), str(one["quantity"]), str(one["variant"])): float(one["estimate"]) for one in rows}  # type: ignore[arg-type]


def with_values(rows: pd.DataFrame, label: str, known: dict[tuple[str, str, str], float]) -> pd.DataFrame:
    """The evidence with the known values in place of the sample's, as intervals of no width."""
    made = rows.copy()
    for (claim, quantity, variant), value in known.items():
        at = (made.model == label) & (made.claim == claim) & (made.quantity == quantity) & (made.variant == variant)
        made.loc[at, ["estimate", "ci_low", "ci_high"]] = value
    return made


EVERY = 5


KEY = ["kind", "claim", "rule", "seed"]


Draw = tuple[str, str, int]  # part, kind, seed


def wanted(evidence: pd.DataFrame) -> list[Draw]:
    """Which of the stored draws get population verdicts."""
    draws = evidence[["part", "kind", "seed"]].drop_duplicates().itertuples(index=False)
    return [
        (part, kind, seed)
        for part, kind, seed in draws
        if part in CLAIMS and (part != "layers" or (seed - FRESH) % EVERY == EVERY - 1)
    ]


def measure_population(draw: Draw, evidence: pd.DataFrame, stored: pd.DataFrame) -> pd.DataFrame:
    """Rows of one draw (`AT_LARGE`), from its evidence and its stored verdicts."""
    part, kind, seed = draw
    organism = compiled.draw(kind, seed, topics=one_draw.TOPICS, pairs_per_topic=1)
    found = verdicts_without_sampling(organism, compiled.study(organism), evidence, part)
    rows = []
    for row in stored[(stored.kind == kind) & (stored.seed == seed)].itertuples():
        if (row.claim, row.rule) in found:
            verdict, known = found[row.claim, row.rule]
            value = _value(verdict, known, row.quantity)
            rows.append((kind, row.claim, row.rule, verdict.verdict, one_draw.code(), seed, value))
    return pd.DataFrame(rows, columns=list(AT_LARGE))


def _value(verdict: Verdict, rows: pd.DataFrame, quantity: str) -> float:
    """The population's value of the quantity that the sample's verdict shows; NaN where the closed form does not know it."""
    row = Rows(verdict.model, rows[rows.model == verdict.model]).find(verdict.claim, quantity)
    is_known = row is not None and row.ci_low == row.ci_high
    return float(row.estimate) if row is not None and is_known else math.nan


def run_population(share: str = "1/1", folder: Path = paths.CALIBRATION) -> None:
    """Compute the verdicts of this share ("2/3": the second of three) that are not there yet, and join what there is."""
    evidence = campaign.read_draws(folder, "evidence")
    stored = campaign.read_draws(folder).query("purpose == 'main'")
    groups = dict(list(evidence.groupby(["part", "kind", "seed"])))
    known = {(one.kind, one.seed, one.claim) for one in population_verdicts(folder).itertuples()}
    asked = wanted(evidence)[slice(*campaign.every(share))]
    todo = [
        draw
        for draw in asked
        if not any((*draw[1:], claim) in known for claim in CLAIMS[draw[0]]) and not _path(folder, draw).is_file()
    ]
    start = time.monotonic()
    try:
        for done, draw in enumerate(todo, start=1):
            files.write_table(measure_population(draw, groups[draw], stored), _path(folder, draw))
            left = (time.monotonic() - start) / done * (len(todo) - done) / 60
            print(f"population {done}/{len(todo)} {'-'.join(map(str, draw))}: about {left:.0f} min left", flush=True)
    finally:
        print("population verdicts:", join_population(folder), flush=True)


def _path(folder: Path, draw: Draw) -> Path:
    return folder / ".parts" / f"{'-'.join(map(str, draw))}.population.parquet"


def join_population(folder: Path = paths.CALIBRATION) -> int:
    """Put all that there are, also those of earlier joins, into the shipped table; their number."""
    parts = [pd.read_parquet(path) for path in sorted((folder / ".parts").glob("*.population.parquet"))]
    table = pd.concat([population_verdicts(folder), *parts], ignore_index=True).drop_duplicates(KEY, keep="last")
    if len(table):
        files.write_table(table.sort_values(KEY, ignore_index=True), folder / "population.parquet")
    return len(table)
