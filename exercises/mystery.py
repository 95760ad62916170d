"""Things of unknown nature for the open questions: models, prompt sets, vectors, rules, called A, B and C.

`code` shuffles which is which, and draws other models: a teacher hands a class a number of its own, and
`python -m exercises.mystery CODE` prints the answers to it. They follow from how the things are made, not from a measurement.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from companion.base import files
from companion.base.paths import results_dir
from companion.calibration.campaign import read_shipped
from companion.calibration.plants import trained_places
from companion.claims import ledger
from companion.mediation import estimands
from companion.mediation.study import Study
from companion.prompts.pairs import Pair, load_set
from exercises.judging import NUMBERS
from organisms import compiled
from organisms.compiled_design import draw_design

LETTERS = ("A", "B", "C")
KINDS = {
    "02": ("early", "middle", "late"),
    "03": ("attention", "middle", "late"),
    "04": ("adjacent", "permuted", "gated"),
    "05": ("early_carrier", "middle", "late"),
}
NATURES = {
    "00": ("adds", "only together (AND)", "one of two would do (OR)"),
    "01": ("sound", "topics are split across splits", "control and treated are exchanged in half of the pairs"),
    "04": ("many neurons, side by side", "many neurons, scattered", "at most 8 neurons"),
    "06": ("towards refusing", "towards complying", "neither"),
    "07": ("attention", "first third", "last third"),
    "08": ("supported", "contradicted", "inconclusive"),
}


def places(number: str, code: int) -> dict[str, int]:
    """Which of the three stands behind each letter."""
    order = np.random.default_rng([code, int(number)]).permutation(len(LETTERS))
    return dict(zip(LETTERS, order.tolist(), strict=True))


def key(number: str, code: int = 1) -> dict[str, str]:
    """The right answers to a notebook's open question."""
    found = places(number, code)
    if number in NATURES:
        return {letter: NATURES[number][place] for letter, place in found.items()}
    designs = {letter: draw_design(KINDS[number][place], code) for letter, place in found.items()}
    told = {"02": lambda one: one.kind, "03": lambda one: one.writer, "05": lambda one: f"layer {one.carry[0]}"}
    return {letter: told[number](design) for letter, design in designs.items()}


def keys(code: int = 1) -> dict[str, dict[str, str]]:
    """The answers to all open questions, by notebook."""
    return {number: key(number, code) for number in NUMBERS}


def models(number: str, code: int = 1) -> dict[str, Study]:
    """Three compiled models with prompts of their own, for notebooks 02 to 05."""
    found = {}
    for letter, place in places(number, code).items():
        study = compiled.study(compiled.draw(KINDS[number][place], code, topics=20, pairs_per_topic=1))
        found[letter] = replace(study, slug=letter, subject=replace(study.subject, name=letter))
    return found


def cells(code: int = 1, n: int = 40) -> pd.DataFrame:
    """The four cells of three mediators on n pairs: columns mediator, pair, y00, y01, y10, y11."""
    tables = []
    for letter, place in places("00", code).items():
        rng = np.random.default_rng([code, place])
        base, rest, own = rng.normal(-3, 1, n), rng.uniform(1, 3, n), rng.uniform(1, 3, n)
        noise = rng.normal(0, 0.3, (2, n))
        y01, y10 = [(own, rest), (0 * own, 0 * rest), (own + rest, own + rest)][place]
        found = {"y00": base, "y01": base + y01 + noise[0], "y10": base + y10 + noise[1], "y11": base + own + rest}
        tables.append(pd.DataFrame({"mediator": letter, "pair": range(n), **found}))
    return pd.concat(tables, ignore_index=True).round(2)


def prompt_sets(code: int = 1) -> dict[str, list[Pair]]:
    """Three versions of the embedded T2 pairs; at most one of them is fit for use."""
    pairs = [pair for pair in load_set("embedded").pairs if pair.treatment == "T2"]
    rng = np.random.default_rng(code)
    dealt = rng.permutation([pair.split for pair in pairs]).tolist()
    turned = rng.random(len(pairs)) < 0.5
    made: Sequence[list[Pair]] = (
        pairs,
        [replace(pair, split=split) for pair, split in zip(pairs, dealt, strict=True)],
        [_exchanged(pair) if turn else pair for pair, turn in zip(pairs, turned, strict=True)],
    )
    return {letter: made[place] for letter, place in places("01", code).items()}


def _exchanged(pair: Pair) -> Pair:
    spans = {"control": pair.spans["treated"], "treated": pair.spans["control"]}
    return replace(pair, control=pair.treated, treated=pair.control, spans=spans)


def vectors(study: Study, code: int = 1) -> dict[str, torch.Tensor]:
    """Three vectors of one length for the last residual stream of a study's model."""
    pairs = [pair for pair in study.of("T2") if pair.pair.split == "discover"][:64]
    parts = [estimands.run_clean(study.subject, part) for part in estimands.batches(pairs, study.subject)]
    gaps = [(one.control.resid_post[-1] - one.treated.resid_post[-1])[:, -1] for one in parts]
    refusal = torch.cat(gaps).mean(0)
    random = torch.from_numpy(np.random.default_rng([code, 6]).normal(size=len(refusal))).to(refusal)
    made = (refusal, -refusal, random * refusal.norm() / random.norm())
    return {letter: made[place] for letter, place in places("06", code).items()}


def plants(code: int = 1) -> dict[str, pd.DataFrame]:
    """Where the effects lie that training added to three real models (T1): shares of the whole, places by effects.

    "whole" is the same for a model in which everything could change.
    """
    table = trained_places(read_shipped("real_plants"))
    wide = table.pivot(index=["kind", "place"], columns="effect", values="estimate").round(2)
    made = {kind: wide.loc[kind].drop("framed, together") for kind in (*NATURES["07"], "everything")}
    return {letter: made[NATURES["07"][place]] for letter, place in places("07", code).items()} | {
        "whole": made["everything"]
    }


def evidence(code: int = 1) -> dict[str, pd.DataFrame]:
    """Three evidence tables for C1, all made from the shipped model's; two were tampered with."""
    table = files.read_table(results_dir("embedded") / "02_evidence.csv", files.EVIDENCE)
    table = table[table.model.isin(["embedded", "embedded (untrained)"]) & table.claim.isin(["gate", "C1"])]
    made = (table, _set(table, table.variant.unique()), _set(table, ["norm frozen"]))
    return {letter: made[place].reset_index(drop=True) for letter, place in places("08", code).items()}


def _set(table: pd.DataFrame, variants: Sequence[str]) -> pd.DataFrame:
    row = (table.model == "embedded") & (table.quantity == "late share") & table.variant.isin(variants)
    new = table.copy()
    new.loc[row, ["estimate", "ci_low", "ci_high"]] = [0.31, 0.28, 0.34]
    return new


def verdict(table: pd.DataFrame) -> str:
    """What the ledger says of C1, for a table of `evidence`."""
    return next(one.verdict for one in ledger.ledger(table, ["embedded"]) if one.claim == "C1")


if __name__ == "__main__":
    for number, found in keys(int(sys.argv[1]) if len(sys.argv) > 1 else 1).items():
        print(number, *(f"{letter}: {nature}" for letter, nature in found.items()), sep="  ")
