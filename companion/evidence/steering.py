"""Evidence on C6, from the trials of a defence: one row a number, as the claims ledger reads them.

Notebook 06 takes the steps one by one, for every method; `steering_evidence` takes them for the decisive one alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd

from companion.base.display import NotDefined
from companion.generation.hooks import Steering
from companion.mediation.study import Study
from companion.stats import rates
from companion.stats.rates import Change
from companion.steering import budget, comparison, experiment, robustness
from companion.steering.budget import N_CURVE, EvaluationPrompts
from companion.steering.comparison import DECISIVE
from companion.steering.experiment import PLAIN, changed
from companion.steering.indirect_effects import idle_layers, share_left, share_neutralised, split_effects
from companion.steering.prompts import Prompts

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


def outcome_rows(
    plain: pd.DataFrame, steered: pd.DataFrame, refits: Sequence[float] = (), variant: str = "main"
) -> list[Row]:
    """Harm change, over-refusal and harmless loss of one method, in points; the first with the variance of the refits.

    `refits` are harm changes with directions fitted on other draws of the discover topics. The main method also gets its
    greedy answers, weak and strong wrappers apart, and the smallest change that its prompts could have shown.
    """
    harm = changed(plain, steered, "harmful")
    made = [evidence_row("harm change", rates.with_refits(harm, refits) if len(refits) > 1 else harm, variant)]
    for kind, name in (("borderline", "over-refusal"), ("harmless", "harmless loss")):
        if (plain.kind == kind).any():  # a set may lack one
            made.append(evidence_row(name, changed(plain, steered, kind), variant))
    if variant != "main":
        return made
    if len(refits) > 1:
        spread = Change(float(np.std(refits, ddof=1)), min(refits), max(refits), len(refits), len(refits))
        made.append(evidence_row("spread over refits", spread))
    if "greedy" in steered:
        made.append(evidence_row("harm change", changed(plain, steered, "harmful", "greedy"), "greedy"))
    wrapped = (steered.kind == "harmful") & (steered.tier > 0)
    weak = steered.tier <= WEAK
    for name, mask in (("weak wrappers", wrapped & weak), ("strong wrappers", wrapped & ~weak)):
        if steered.loc[mask, "topic"].nunique() > 1:
            made.append(evidence_row("harm change", changed(plain[mask], steered[mask], "harmful"), name))
    return made + [evidence_row("detectable change", _single(value), kind) for kind, value in detectable(plain).items()]


def detectable(plain: pd.DataFrame) -> dict[str, float]:
    """The smallest change in points that each kind of prompt can show at 80 % power, by kind, from the plain model.

    The spread over topics of an unpaired rate: pairing, and common random numbers, can only make it smaller.
    """
    found = {}
    for kind, part in plain.groupby("kind", sort=False):
        values = 100 * (part.label == experiment.GOOD[str(kind)])
        found[str(kind)] = rates.detectable(values.to_numpy(float), part.topic.to_numpy())
    return {kind: value for kind, value in found.items() if np.isfinite(value)}


def price_rows(price: pd.DataFrame) -> list[Row]:
    """Mean KL a token, its 95th percentile over prompts, and the perplexity ratio, on harmless prompts."""
    kl, p95, ratio = experiment.divergence(price)
    found = {"KL": kl, "KL p95": _single(p95, kl.n), "perplexity ratio": ratio}
    return [evidence_row(name, change) for name, change in found.items()]


def rival_trials(
    late: Steering, evaluation: EvaluationPrompts, plain: pd.DataFrame
) -> tuple[dict[str, pd.DataFrame], dict[str, float]]:
    """Early and middle layers at the budget of the decisive method ("late"): answers to the same harmful prompts, budgets."""
    (target,) = evaluation.budgets([late])
    rivals = comparison.best_rivals(evaluation, target)
    spent = {"late": target, **{zone: evaluation.budgets([one])[0] for zone, one in rivals.items()}}
    harmful = plain[plain.kind == "harmful"].reset_index(drop=True)
    trials = {zone: experiment.trial(evaluation.experiment, one, harmful, greedy=False) for zone, one in rivals.items()}
    return trials, spent


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


def same_push_elsewhere(late: Steering, effects: pd.DataFrame, evaluation: EvaluationPrompts) -> Steering | NotDefined:
    """The decisive method's push, at its budget, at as many other layers that mediate least on discover; or why there is none."""
    own = {edit.layer for edit in late.edits}
    moved = comparison.elsewhere(late, idle_layers(effects, len(own), besides=own))
    if isinstance(moved, NotDefined):
        return moved
    return budget.to_budgets(evaluation.experiment.subject, moved, evaluation.mixed, evaluation.budgets([late]))[0]


def mediation_rows(
    before: pd.DataFrame, after: pd.DataFrame, variant: str = "main", steered: Collection[int] = ()
) -> list[Row]:
    """phi, and the indirect effects that are left at the steered layers (by default the late ones) and at all others."""
    n_layers = int(before.layer.max()) + 1
    own = sorted(set(steered)) or comparison.zones(n_layers)["late"]
    others = [layer for layer in range(n_layers) if layer not in own]
    made = [evidence_row("phi", share_neutralised(before, after), variant)]
    for name, layers in (("steered sites", own), ("other sites", others)):
        if layers:
            made.append(evidence_row(f"NIE after/before, {name}", share_left(before, after, layers), variant))
    return made


def steering_evidence(
    study: Study, prompt_set: Prompts, *, draws: int = 100, refits: int = 10, curve: int = N_CURVE
) -> list[Row]:
    """All evidence rows on C6 of a study; one row that says why, where a class of prompts is missing.

    `curve` bounds the harmful prompts on which strengths are chosen and random directions compared.
    """
    this = experiment.open_experiment(study, prompt_set)
    if isinstance(this, NotDefined) or this.fit.missing:
        return not_defined(this.reason if isinstance(this, NotDefined) else this.fit.missing)
    made = comparison.builders(study.subject.n_layers, None)
    evaluation = budget.evaluation_prompts(this, "validate", curve)
    defined, refused = comparison.build_methods(this.fit, made, [DECISIVE])
    if refused:
        return not_defined(refused[DECISIVE])
    late = comparison.tuned(evaluation, defined)[0][DECISIVE]
    plain = experiment.trial(this, PLAIN, experiment.test_prompts(this))
    trial = experiment.trial(this, late, plain)
    refitted = robustness.refitted(this.fit, made[DECISIVE], late.strength, refits)
    tested_on = budget.evaluation_prompts(this, "test", curve)
    rows = outcome_rows(plain, trial, robustness.refit_changes(this, refitted, plain))
    rows += price_rows(experiment.prices(this, late, tested_on.free, tested_on.own))
    rows += mediation_rows(split_effects(study, "test"), split_effects(study, "test", late))
    rows += rival_rows(trial[trial.kind == "harmful"].reset_index(drop=True), *rival_trials(late, evaluation, plain))
    return rows + random_rows(comparison.random_null(this.fit, late, tested_on, evaluation, draws))
