"""What the rules say of a compiled model when sampling error is gone: the same rules on effects in closed form.

The closed form gives effects on the first answer token. So C1 to C4 and C5a have a population verdict and the others have
none; nor has the corrected C1, which asks where the decision is computed. Rows that the closed form knows take the place of the
sample's, with intervals of no width; what needs a run of the model (probe, benign neurons, untrained twin, joint probability,
patch norms) stays as it was measured. Topics are the unit: ten pairs of each of the 500 moved no value by more than 0.002 where
we looked (one model a part), at ten times the cost, so there is one.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from helpers import calibration_carriers, carriers, claims_corrected, evidence
from helpers.claims_tokens import CARRIED, CARRIED_OWN
from helpers.controls import Rows
from helpers.depth import deepest_early_layer
from helpers.ledger import ledger
from helpers.normalisation import normalisations
from helpers.organisms import compiled_language as lang
from helpers.organisms import compiled_truth
from helpers.organisms.compiled import KINDS, Organism
from helpers.organisms.compiled_build import build
from helpers.organisms.compiled_claims import last_layer
from helpers.study import Study
from helpers.verdicts import Verdict

CLAIMS = {"context": ("C3",), "layers": ("C1", "C2", "C4"), "neurons": ("C5a",)}  # by part; others have no closed form
TOPICS, DISCOVER = 500, 0.2  # four fifths of the topics count as test: 19 times as many as in a draw of 70 topics
BENIGN = tuple(f"B{i + 1}" for i in range(lang.BEHAVIOURS))


def verdicts(
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
        known |= carrier_rows(split_anew(calibration_carriers.table(program, generation)), label, program.n_layers)
    else:
        share, k90 = last_layer(program, [one for one in pairs if one.pair.treatment in ("T2", "T2b")])
        known |= {("C5a", "psi1", "main"): share, ("C5a", "k90", "main"): float(k90)}
        known |= {("C5a", "psi1", name): share for name in ("norm frozen", "unsaturated")}
    replaced = with_values(rows, label, known)
    own = Rows(label, replaced[replaced.model == label])
    said = [("registered", one) for one in ledger(replaced, (label,))]
    said += [("corrected", one) for one in claims_corrected.rules(own) if one.claim != "C1"]
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


def planned(organism: Organism, part: str) -> list[lang.Planned]:
    """New pairs of the same model over new topics, one a topic and treatment."""
    design = organism.design
    pairs = lang.plan([design.seed, KINDS.index(design.kind), 1], TOPICS, 1)
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
    rows = evidence.c1(whole, label, this.subject.n_layers)
    rows += evidence.c2(whole, whole, label, normalisations(this))
    return estimates(rows)


def carrier_rows(table: pd.DataFrame, label: str, n_layers: int) -> dict[tuple[str, str, str], float]:
    """C4; freezing the norm's scale changes nothing here either."""
    whole = pd.concat([table, table.assign(outcome="Y1.frozen")], ignore_index=True)
    return estimates(carriers.c4(whole, label, n_layers))


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
