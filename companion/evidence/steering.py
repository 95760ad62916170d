"""Evidence on C6: `trial_rows` makes it of a trial of all methods, `steering_evidence` measures the decisive one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from companion.base.display import NotDefined
from companion.generation.hooks import Steering
from companion.mediation.study import Study
from companion.stats import rates
from companion.stats.rates import Change
from companion.steering import budget, comparison, experiment
from companion.steering.budget import EvaluationPrompts
from companion.steering.comparison import DECISIVE
from companion.steering.experiment import PLAIN, Prompts, SteeringExperiment, changed
from companion.steering.indirect_effects import share_left, share_neutralised, test_effects

PLACES: Final = {
    "late": "late layers, fitted (the method)", "early": "early layers, the best of three",
    "mid": "middle layers, the best of three",
}  # fmt: skip
WEAK: Final = 3  # wrapper tiers up to here count as weak
Row = dict[str, object]


def evidence_row(quantity: str, change: Change, variant: str = "main", note: str = "") -> Row:
    """One row of the evidence table of C6, without the model's name."""
    row = {"claim": "C6", "quantity": quantity, "variant": variant, "estimate": change.estimate, "ci_low": change.low}
    return row | {"ci_high": change.high, "n_pairs": change.n, "n_topics": change.n_topics, "note": note}


def _single(value: float, n: int = 0) -> Change:
    """A number without an interval: a p-value, or a ratio of two budgets."""
    return Change(value, value, value, n, n)


def not_defined(reason: str) -> list[Row]:
    """What the ledger is told where directions cannot be fitted."""
    return [evidence_row("not defined", _single(0.0), note=reason)]


def outcome_rows(plain: pd.DataFrame, steered: pd.DataFrame, refits: Sequence[float] = ()) -> list[Row]:
    """Harm change, over-refusal and harmless loss of one method, in points; the first with the variance of the refits.

    `refits` are harm changes with directions fitted on other draws of the discover topics. Beside them stand greedy answers,
    weak and strong wrappers apart, and the smallest change that each kind of prompt could have shown at 80 % power (from the
    spread over topics of the plain model's rate: pairing can only make it smaller).
    """
    harm = changed(plain, steered, "harmful")
    made = [evidence_row("harm change", rates.with_refits(harm, refits) if len(refits) > 1 else harm)]
    for kind, name in (("borderline", "over-refusal"), ("harmless", "harmless loss")):
        if (plain.kind == kind).any():  # a set may lack one
            made.append(evidence_row(name, changed(plain, steered, kind)))
    if len(refits) > 1:
        note = "harm changes of the refits: " + ", ".join(f"{one:.1f}" for one in sorted(refits))
        spread = _single(float(np.std(refits, ddof=1)), len(refits))
        made.append(evidence_row("spread over refits", spread, note=note))
    if "greedy" in steered:
        made.append(evidence_row("harm change", changed(plain, steered, "harmful", "greedy"), "greedy"))
    wrapped, weak = (steered.kind == "harmful") & (steered.tier > 0), steered.tier <= WEAK
    for name, mask in (("weak wrappers", wrapped & weak), ("strong wrappers", wrapped & ~weak)):
        if steered.loc[mask, "topic"].nunique() > 1:
            made.append(evidence_row("harm change", changed(plain[mask], steered[mask], "harmful"), name))
    for kind, part in plain.groupby("kind", sort=False):
        good = 100 * (part.label == experiment.GOOD[str(kind)]).to_numpy(float)
        if np.isfinite(smallest := rates.detectable(good, part.topic.to_numpy())):
            made.append(evidence_row("detectable change", _single(smallest), str(kind)))
    return made


@dataclass(frozen=True)
class SameBudget:
    """The decisive method ("late"), the best early and middle steering (`steered`), and random directions, all at its budget.

    `answers` are those of the rivals to the harmful prompts, `spent` is what each adds.
    """

    steered: Mapping[str, Steering]
    answers: Mapping[str, pd.DataFrame]
    spent: Mapping[str, float]
    null: pd.DataFrame


def at_same_budget(
    late: Steering, validate: EvaluationPrompts, test: EvaluationPrompts, plain: pd.DataFrame
) -> SameBudget:
    """Rivals chosen on validate, where all meet the decisive method's budget, and tried on the prompts of the plain trial."""
    (target,) = validate.budgets([late])
    rivals = comparison.best_rivals(validate, target)
    spent = {"late": target, **{zone: validate.budgets([one])[0] for zone, one in rivals.items()}}
    lab, harmful = test.experiment, plain[plain.kind == "harmful"].reset_index(drop=True)
    answers = {zone: experiment.trial(lab, one, harmful, greedy=False) for zone, one in rivals.items()}
    null = comparison.random_null(lab.fit, late, test, validate)
    return SameBudget({"late": late, **rivals}, answers, spent, null)


def falls_of_log_odds(found: SameBudget, test: EvaluationPrompts) -> pd.DataFrame:
    """Mean fall of the log-odds of complying on jailbroken test prompts, by what the budget was spent on (`place`).

    Columns: place, estimate, low, high. A random direction is one row without an interval (both limits its estimate).
    """
    rows, harmful = [], test.harmful
    for zone, one in found.steered.items():
        (steered,) = test.experiment.first_tokens(harmful, [one])
        fall = rates.mean_change(harmful.log_odds.to_numpy() - steered.log_odds.to_numpy(), harmful.topic.to_numpy())
        rows.append((PLACES[zone], fall.estimate, fall.low, fall.high))
    drawn = found.null[found.null.role == "random"]
    rows += [(f"random directions, {one.family}", *[one.value] * 3) for one in drawn.itertuples()]
    return pd.DataFrame(rows, columns=["place", "estimate", "low", "high"])


def rival_rows(late: pd.DataFrame, rivals: Mapping[str, pd.DataFrame], spent: Mapping[str, float]) -> list[Row]:
    """How many points less harm late steering leaves than each rival on the same prompts; and rival over late budget."""
    made = []
    for name, trial in rivals.items():
        made.append(evidence_row(f"advantage over {name}", changed(late, trial, "harmful")))
        made.append(evidence_row(f"budget of {name} over late", _single(spent[name] / spent["late"])))
    return made


def random_rows(null: pd.DataFrame) -> list[Row]:
    """Rank p-values of the fitted direction among random ones, one row a family of draws; see `comparison.random_null`."""
    made = []
    for family, part in null.groupby("family", sort=False):
        tested = float(part.loc[part.role != "random", "value"].iloc[0])
        drawn = part.loc[part.role == "random", "value"].to_numpy()
        made.append(evidence_row(f"p {family}", _single(rates.rank_p(tested, drawn), len(drawn))))
    return made


def mediation_rows(before: pd.DataFrame, after: pd.DataFrame) -> list[Row]:
    """phi, and the indirect effects that are left at the steered layers, the late ones, and at all others, where defined."""
    zones = comparison.zones(int(before.layer.max()) + 1)
    made = [evidence_row("phi", share_neutralised(before, after))]
    for name, layers in (("steered sites", zones["late"]), ("other sites", zones["early"] + zones["mid"])):
        left = share_left(before, after, layers)
        if left is not None:
            made.append(evidence_row(f"NIE after/before, {name}", left))
    return made


def trial_rows(
    lab: SteeringExperiment, late: Steering, plain: pd.DataFrame, steered: pd.DataFrame, price: pd.DataFrame,
    same: SameBudget, refits: Sequence[float],
) -> list[Row]:  # fmt: skip
    """All evidence rows of the decisive method: what it changes, costs (on harmless prompts), leaves inside; rivals; chance."""
    kl, p95, ratio = experiment.divergence(price)
    costs = {"KL": kl, "KL p95": _single(p95, kl.n), "perplexity ratio": ratio}
    rows = outcome_rows(plain, steered, refits) + [evidence_row(name, change) for name, change in costs.items()]
    rows += mediation_rows(test_effects(lab), test_effects(lab, late))
    rows += rival_rows(steered[steered.kind == "harmful"].reset_index(drop=True), same.answers, same.spent)
    return rows + random_rows(same.null)


def refit_changes(lab: SteeringExperiment, late: Steering, plain: pd.DataFrame) -> list[float]:
    """Harm changes of the decisive method, at its strength, fitted on other draws of the discover topics; in points."""
    build = comparison.builders(lab.subject.n_layers)[DECISIVE]
    harmful = plain[plain.kind == "harmful"].reset_index(drop=True)
    refits = comparison.refitted(lab.fit, build, late.strength, lab.effort.refits)
    tried = [harmful, *(experiment.trial(lab, one, harmful, greedy=False) for one in refits)]
    before, *after = (float((table.label == "harmful").mean()) for table in tried)
    return [100 * (rate - before) for rate in after]


def steering_evidence(study: Study, prompt_set: Prompts) -> list[Row]:
    """All evidence rows on C6 of a study; one row that says why, where a class of prompts is missing."""
    this = experiment.open_experiment(study, prompt_set)
    if isinstance(this, NotDefined) or this.fit.missing:
        return not_defined(this.reason if isinstance(this, NotDefined) else this.fit.missing)
    validate = budget.evaluation_prompts(this, "validate")
    defined, refused = comparison.build_methods(this.fit, comparison.builders(study.subject.n_layers), [DECISIVE])
    if refused:
        return not_defined(refused[DECISIVE])
    late = comparison.tuned(validate, defined)[DECISIVE]
    plain = experiment.trial(this, PLAIN, experiment.test_prompts(this))
    steered = experiment.trial(this, late, plain)
    test = budget.evaluation_prompts(this, "test")
    changes = refit_changes(this, late, plain)
    price = experiment.prices(this, late, test.free, test.own)
    return trial_rows(this, late, plain, steered, price, at_same_budget(late, validate, test, plain), changes)
