"""Built models, whose weights were written by hand, and how often the method is wrong about them.

`built_model` gives one with what is true of it; the others read stored draws: many such models, measured and judged.
"""

from __future__ import annotations

import pandas as pd

from companion.base.display import NotDefined
from companion.calibration import plants, rates
from companion.calibration.campaign import read_shipped
from companion.calibration.plants import trained_places
from companion.calibration.rates import interval_coverage
from companion.calibration.truths import agreement
from companion.calibration.truths import built as built_model
from companion.claims import ledger
from companion.claims.corrected_rules import STATEMENTS
from companion.claims.page import NAMES

__all__ = ["agreement", "built_model", "draws", "error_rates", "found_deciders", "grades", "held_out", "interval_coverage",
           "power", "read_shipped", "support_curve", "trained_places"]  # fmt: skip

EFFECTS = {"direct": plants.MEANING["direct"], "total": plants.MEANING["total"], "computed": "computed (notebook 02)"}


def found_deciders() -> pd.DataFrame:
    """In how many built models the component with the largest effect is the one that decides, by kind of effect.

    `computed` is what a component's output holds beyond the sum of its inputs (notebook 02); `n` counts models.
    """
    found = read_shipped("localisation").query("what == 'decision found'").groupby("estimator").value
    return found.agg(hits="sum", n="size").astype(int).loc[list(EFFECTS)].rename(EFFECTS)


def draws(rules: str = "answering") -> pd.DataFrame:
    """Stored draws in which a rule could be asked: one row a built model and claim, with its truth and the verdict.

    "answering": each claim by the rule that answers today, the corrected one where there is one. "registered": by the first.
    """
    table = rates.testable(rates.main_draws())
    if rules == "answering":
        return _answering(table)
    return table.assign(claim=table.claim.str.removesuffix(ledger.CORRECTED))[table.rule == "registered"]


def _answering(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the rule that answers each claim today, under the claim's plain name."""
    plain = table.claim.str.removesuffix(ledger.CORRECTED)
    corrected = set(plain[table.rule == "corrected"])
    return table.assign(claim=plain)[(table.rule == "corrected") | ~plain.isin(corrected) & plain.isin(STATEMENTS)]


def held_out() -> pd.DataFrame:
    """What the rules that answer today said of held-out kinds, whose builder knew the claims and not the rules.

    A row is a kind and a claim, `truth` whether the kind makes it true; the other columns count verdicts.
    """
    table = _answering(rates.held_out_draws())
    counts = table.groupby(["kind", "claim", "truth"], sort=False).verdict.value_counts().unstack(fill_value=0)
    return counts.reindex(columns=["supported", "inconclusive", "contradicted"], fill_value=0)


def error_rates(table: pd.DataFrame) -> pd.DataFrame:
    """False support, false contradiction and power to support of every claim, with Wilson intervals: one row a rate.

    `upper` is the exact one-sided 95 % bound, which a target is held against. Rates of no draw are left out.
    """
    found = rates.error_rates(table).query("n > 0 and error != 'power to contradict'")
    return found.assign(claim=found.claim.map(_in_words)).drop(columns="lower")


def _in_words(claim: str) -> str:
    plain = claim.removesuffix(ledger.CORRECTED)
    return f"{plain} {NAMES.get(plain, '')}".strip()


def grades(table: pd.DataFrame) -> pd.DataFrame:
    """What "supported" and "contradicted" of each claim (row) are worth: "strong", "weak", "cannot tell" or "not calibrated"."""
    own = rates.with_held_out(rates.claim_rates(table), _answering(rates.held_out_draws()))
    said = {one: [ledger.grade(one, rates_of)[0] for rates_of in own.values()] for one in ("supported", "contradicted")}
    return pd.DataFrame(said, index=pd.Index(own, name="claim"))


def power(by: str) -> pd.DataFrame:
    """Right verdicts of all, as text, against the number of "topics" or the "effect": a row a claim and truth.

    Each model is there with every number, so what differs along a row is that number alone. A star marks a corrected rule.
    """
    table = rates.power_draws()
    replaced = table.claim.isin(table.claim[table.rule == "corrected"].str.removesuffix(ledger.CORRECTED))
    table = table[(table.pairs == 1) & ~replaced]
    alike = table.effect == table.effect.max() if by == "topics" else table.topics == table.topics.min()
    found = rates.power_curve(table[alike], by)
    found["right"] = found.hits.astype(str) + " of " + found.n.astype(str)
    return found.pivot(index=["claim", "truth"], columns=by, values="right")


def support_curve() -> pd.DataFrame | NotDefined:
    """How often each rule says "supported", by claim and bin of true values near its threshold; `value` is the bin's centre."""
    near = rates.threshold_draws()
    if near.empty:
        return NotDefined("No draw near a threshold is stored yet: `./run_all.sh --recalibrate` measures them.")
    found = rates.support_curve(near)
    return found.assign(claim=found.claim.map(_in_words))
