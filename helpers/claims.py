"""What the evidence says: `judge_run` asks the rules of a run's evidence; what it returns shows the answers in several ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from IPython.display import Markdown

from companion.base.display import NotDefined
from companion.base.files import write_json, write_table, write_text
from companion.base.paths import results_dir
from companion.calibration.rates import claim_rates, draws_like, held_out_draws, main_draws, with_held_out
from companion.claims import ledger, page
from companion.claims.verdict import Verdict
from companion.prompts.pairs import load_set
from companion.run.overview import notebook_table, run_evidence, shape_of
from companion.run.overview import verdict_table as answers_so_far

__all__ = ["Judged", "answers_so_far", "judge_run", "notebook_table", "two_way_intervals", "write_claims"]


@dataclass(frozen=True)
class Judged:
    """A run's evidence, the answers to all claims, and the error rates of the rules that gave them."""

    slug: str
    evidence: pd.DataFrame
    answers: Sequence[ledger.Answer]  # also on the models that the run is compared with
    rates: ledger.Rates
    built: str  # which built models the rates are of
    verdicts: Sequence[Verdict]

    @property
    def own(self) -> list[ledger.Answer]:
        """The answers for the run's own model, in the order of the claims."""
        return [one for one in self.answers if one.verdict.model == self.slug]

    def page(self, *, invented: bool) -> Markdown:
        """The page, one line a claim: `results/SLUG/claims.md`. `invented` says that prompts are of the invented language."""
        text = page.to_markdown(self.slug, self.answers, self.evidence, self.built, invented=invented)
        write_text(text, results_dir(self.slug) / "claims.md")
        return Markdown(text)

    def evidence_of(self, claim: str) -> pd.DataFrame:
        """The evidence rows of one claim for the run's own model; a control or robustness check has another variant than main."""
        rows = self.evidence[(self.evidence.model == self.slug) & (self.evidence.claim == claim)]
        columns = ["quantity", "variant", "estimate", "ci_low", "ci_high", "n_pairs", "n_topics"]
        return rows[columns].reset_index(drop=True)

    def error_counts(self, claim: str) -> Mapping[str, str]:
        """How often the rule of a claim was right and wrong on built models, as "hits of n" by kind of answer."""
        found = self.rates.get(claim + ledger.CORRECTED) or self.rates.get(claim) or {}
        return {kind: f"{row['hits']} of {row['n']}" for kind, row in found.items()}

    def controls(self) -> pd.DataFrame:
        """The controls of each claim (columns): passed, failed, not run; blank where one does not belong to the claim."""
        return pd.DataFrame({v.claim: v.controls for one in self.own if (v := one.verdict).controls}).fillna("")

    def picture(self) -> pd.DataFrame:
        """Models by claims for a drawing: the number in the cell, the answer as its colour."""
        return page.picture_table(self.slug, self.answers)

    def opposites(self) -> pd.DataFrame:
        """For each claim its opposite, what would show it, and in how many built models it was shown."""
        return ledger.opposite_table(self.own, self.rates)


def judge_run(slug: str) -> Judged:
    """Ask every rule of the evidence that a run's notebooks left.

    Error rates come from built models like this one, or from all of them. Raises InputError where there is no evidence.
    """
    evidence = run_evidence(slug)
    draws, built = draws_like(main_draws(), shape_of(slug))
    rates = with_held_out(claim_rates(draws), held_out_draws())
    verdicts = ledger.ledger(evidence, [slug])
    return Judged(slug, evidence, ledger.answers(verdicts, rates), rates, built, verdicts)


def two_way_intervals(judged: Judged, prompts: str) -> pd.DataFrame | NotDefined:
    """Key numbers of C1 to C4 with two intervals: over topics, and over topics and wrapper families (or verbs) together.

    `wider` is the ratio of their widths; kept as `08_two_way.csv`. Not defined where a set has one family.
    """
    from companion.evidence.layers import read_effects, two_way_table  # only here: it imports torch

    found = two_way_table(read_effects(results_dir(judged.slug)), load_set(prompts).pairs)
    write_table(found, results_dir(judged.slug) / "08_two_way.csv")
    return found if isinstance(found, NotDefined) else found.round(2)


def write_claims(judged: Judged) -> pd.DataFrame:
    """Write every verdict of both kinds of rules to `claims.csv` and `claims.json`; returns those on the run's own model."""
    table = ledger.to_table(judged.verdicts, judged.rates)
    write_table(table, results_dir(judged.slug) / "claims.csv")
    write_json(ledger.to_records(judged.verdicts, judged.rates), results_dir(judged.slug) / "claims.json")
    return table[table.model == judged.slug].drop(columns=["model", "reason"]).astype(object).fillna("")
