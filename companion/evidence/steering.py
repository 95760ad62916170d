"""Evidence on C6, from the trials of a defence: one row a number, as the claims ledger reads them.

C6 from beginning to end for any study: fit, tune, try, compare, and write the evidence rows.

Notebook 06 takes the same steps one by one, for every method; here they are taken for the decisive one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from companion.base import thresholds
from companion.base.errors import InputError
from companion.generation.hooks import Steering
from companion.generation.labels import Judge
from companion.mediation.study import Study
from companion.prompts import subsample
from companion.stats import rates
from companion.stats.rates import Change
from companion.steering import budget, comparison, controls, experiment, extraction, indirect_effects, stability
from companion.steering.budget import EvaluationPrompts
from companion.steering.comparison import DECISIVE
from companion.steering.experiment import N_CURVE, PLAIN, SteeringExperiment
from companion.steering.extraction import Fit
from companion.steering.prompts import Prompts

WEAK = 3  # wrapper tiers up to here count as weak


def steering_row(model: str, quantity: str, change: Change, variant: str = "main", note: str = "") -> dict[str, object]:
    """One row of the evidence table of C6."""
    return {
        "model": model,
        "claim": "C6",
        "quantity": quantity,
        "variant": variant,
        "estimate": change.estimate,
        "ci_low": change.low,
        "ci_high": change.high,
        "n_pairs": change.n,
        "n_topics": change.n_topics,
        "note": note,
    }


def single(value: float, n: int = 0) -> Change:
    """A number without an interval: a p-value, or a ratio of two budgets."""
    return Change(value, value, value, n, n)


def not_defined(model: str, reason: str) -> list[dict[str, object]]:
    """What the ledger is told where directions cannot be fitted."""
    return [steering_row(model, "not defined", single(0.0), note=reason)]


def outcome_rows(
    model: str, plain: pd.DataFrame, steered: pd.DataFrame, refits: Sequence[float], variant: str = "main"
) -> list[dict[str, object]]:
    """Harm change, over-refusal and harmless loss of one arm, in points; the first with the variance of the refits.

    `refits` are harm changes with directions fitted on other draws of the discover topics. The main arm also gets its
    greedy answers, weak and strong wrappers apart, and the smallest change that its prompts could have shown.
    """
    harm = experiment.changed(plain, steered, "harmful")
    wide = rates.with_refits(harm, refits) if len(refits) > 1 else harm
    made = [steering_row(model, "harm change", wide, variant)]
    for kind, name in (("borderline", "over-refusal"), ("harmless", "harmless loss")):
        if (plain.kind == kind).any():  # a set may lack one
            made.append(steering_row(model, name, experiment.changed(plain, steered, kind), variant))
    if variant != "main":
        return made
    if len(refits) > 1:
        spread = float(np.std(refits, ddof=1))
        made.append(
            steering_row(
                model, "spread over refits", Change(spread, min(refits), max(refits), len(refits), len(refits))
            )
        )
    if "greedy" in steered:
        made.append(
            steering_row(model, "harm change", experiment.changed(plain, steered, "harmful", "greedy"), "greedy")
        )
    for name, mask in _tiers(steered).items():
        if mask.sum() and steered.loc[mask, "topic"].nunique() > 1:
            made.append(
                steering_row(model, "harm change", experiment.changed(plain[mask], steered[mask], "harmful"), name)
            )
    return made + [
        steering_row(model, "detectable change", single(value), kind) for kind, value in detectable(plain).items()
    ]


def _tiers(table: pd.DataFrame) -> dict[str, pd.Series]:
    harmful = table.kind == "harmful"
    return {
        "weak wrappers": harmful & (table.tier > 0) & (table.tier <= WEAK),
        "strong wrappers": harmful & (table.tier > WEAK),
    }


def detectable(plain: pd.DataFrame) -> dict[str, float]:
    """The smallest change in points that each kind of prompt can show at 80 % power, by kind, from the plain model.

    The spread over topics of an unpaired rate: pairing, and common random numbers, can only make it smaller.
    """
    found = {}
    for kind, part in plain.groupby("kind", sort=False):
        values = 100 * (part.label == experiment.GOOD[str(kind)])
        found[str(kind)] = rates.detectable(values.to_numpy(float), part.topic.to_numpy())
    return {kind: value for kind, value in found.items() if np.isfinite(value)}


def price_rows(model: str, price: pd.DataFrame, variant: str = "main") -> list[dict[str, object]]:
    """Mean KL a token, its 95th percentile over prompts, and the perplexity ratio, on harmless prompts."""
    kl, p95, ratio = experiment.divergence(price)
    return [
        steering_row(model, "KL", kl, variant),
        steering_row(model, "KL p95", single(p95, kl.n), variant),
        steering_row(model, "perplexity ratio", ratio, variant),
    ]


def rival_rows(
    model: str, late: pd.DataFrame, rivals: Mapping[str, pd.DataFrame], spent: Mapping[str, float]
) -> list[dict[str, object]]:
    """How many points less harm late steering leaves than each rival with the same budget; and whether it was the same.

    `spent` holds the measured budgets, that of the late arm as "late". Positive: late does better.
    """
    made = []
    for name, trial in rivals.items():
        advantage = experiment.changed(late, trial, "harmful")
        made.append(steering_row(model, f"advantage over {name}", advantage))
        made.append(steering_row(model, f"budget of {name} over late", single(spent[name] / spent["late"])))
    return made


def random_rows(model: str, null: pd.DataFrame) -> list[dict[str, object]]:
    """Rank p-values of the fitted direction among random ones, one row a family of draws; see `defence_random`."""
    made = []
    for family, part in null.groupby("family", sort=False):
        tested = float(part.loc[part.role != "random", "value"].iloc[0])
        drawn = part.loc[part.role == "random", "value"].to_numpy()
        made.append(steering_row(model, f"p {family}", single(rates.rank_p(tested, drawn), len(drawn))))
    return made


N_MEDIATION = 300  # test pairs of T2 at most on which the steered model's indirect effects are measured


@dataclass(frozen=True)
class Rivalry:
    """The decisive arm's rivals at its budget: what they spend, and what they answer to the harmful test prompts."""

    steered: Mapping[str, Steering]
    spent: Mapping[str, float]
    trials: Mapping[str, pd.DataFrame]


def begin(
    study: Study, prompt_set: Prompts, *, profile: str = "full", judge: Judge | None = None
) -> tuple[SteeringExperiment, Fit, str] | str:
    """Lab and fit of a study, and which class of prompts is missing ("" for none); see `experiment.open_experiment`.

    A missing class stops the arms that need a direction from it, and C6 with them; arms that need none can still be tried.
    Where there is nothing to try at all the sentence that says why stands alone.
    """
    lab = experiment.open_experiment(study, prompt_set, thin=subsample.pairs_asked(0, profile), judge=judge)
    if isinstance(lab, str):
        return lab
    if not study.of("T2"):
        return thresholds.NO_WRAPPERS
    return lab, extraction.fit_classes(study.subject, lab.openers, lab.prompts), experiment.missing(lab)


def rivalry(lab: SteeringExperiment, fit: Fit, late: Steering, on: EvaluationPrompts, plain: pd.DataFrame) -> Rivalry:
    """Early and middle layers at the budget of the decisive arm, tried on the same harmful prompts."""
    target = budget.budget(lab, late, on)
    steered = comparison.rivals(lab, fit, target, on)
    spent = {"late": target, **{zone: budget.budget(lab, one, on) for zone, one in steered.items()}}
    harmful = plain[plain.kind == "harmful"].reset_index(drop=True)
    trials = {
        zone: experiment.trial(lab, experiment.arm_of(lab.subject, one), harmful, greedy=False)
        for zone, one in steered.items()
    }
    return Rivalry(steered, spent, trials)


def mediated(study: Study, lab: SteeringExperiment, steered: Steering | None) -> pd.DataFrame:
    """Indirect effects of all attention and MLP outputs on test pairs of T2, in the model under a steering (or none)."""
    pairs = [p for p in study.of("T2") if p.pair.split == "test"][:N_MEDIATION]
    arm = PLAIN if steered is None else experiment.arm_of(lab.subject, steered)
    layers = range(study.subject.n_layers)
    return indirect_effects.steered_effects(study.subject, pairs, study.openers, layers, arm.steer)


def discover_effects(study: Study) -> pd.DataFrame:
    """Indirect effects of all attention and MLP outputs in the plain model, on the discover pairs of T2."""
    pairs = [p for p in study.of("T2") if p.pair.split == "discover"]
    return indirect_effects.steered_effects(study.subject, pairs, study.openers, range(study.subject.n_layers))


def same_push_elsewhere(
    lab: SteeringExperiment, fit: Fit, late: Steering, effects: pd.DataFrame, on: EvaluationPrompts
) -> Steering | str:
    """The decisive arm's push at the layers that mediate least, at its budget on `on`; or why there is no such control.

    The layers are chosen by these indirect effects (of discover), as many as the arm steers and none of its own.
    """
    own = {edit.layer for edit in late.edits}
    idle = indirect_effects.idle_layers(effects, len(own), besides=own)
    try:
        moved = controls.elsewhere(fit, late.strength, layers=idle, like=late)
        return budget.at_budget(lab, moved, budget.budget(lab, late, on), on)
    except InputError as error:
        return str(error)


def mediated_each(
    study: Study, lab: SteeringExperiment, steered: Mapping[str, Steering]
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """`mediated` of the plain model, and of each steering by its name."""
    return mediated(study, lab, None), {name: mediated(study, lab, one) for name, one in steered.items()}


def mediation_rows(
    model: str, before: pd.DataFrame, after: pd.DataFrame, variant: str = "main", steered: Collection[int] = ()
) -> list[dict[str, object]]:
    """phi, and the indirect effects that are left at the steered layers (by default the late ones) and at all others."""
    every = range(int(before.layer.max()) + 1)
    own = sorted(set(steered)) or comparison.zones(len(every))["late"]
    others = [layer for layer in every if layer not in own]
    made = [steering_row(model, "phi", indirect_effects.neutralised(before, after), variant)]
    for name, layers in (("steered sites", own), *((("other sites", others),) if others else ())):
        left = indirect_effects.after_before(before, after, layers)
        made.append(steering_row(model, f"NIE after/before, {name}", left, variant))
    return made


def steering_evidence(
    study: Study, prompt_set: Prompts, model: str, *, judge: Judge | None = None, draws: int = 100,
    refits: int = 10, curve: int = N_CURVE,
) -> list[dict[str, object]]:  # fmt: skip
    """All evidence rows on C6 of a study; one row that says why, where a class of prompts is missing.

    `curve` bounds the harmful prompts on which strengths are chosen and random directions compared.
    """
    begun = begin(study, prompt_set, judge=judge)
    if isinstance(begun, str) or begun[2]:
        return not_defined(model, begun if isinstance(begun, str) else begun[2])
    lab, fit, _ = begun
    build = comparison.builders(study.subject.n_layers, None)[DECISIVE]
    on = budget.evaluation_prompts(lab, "validate", curve)
    defined, refused = comparison.arms(fit, {DECISIVE: build})
    if refused:
        return not_defined(model, refused[DECISIVE])
    chosen, _ = comparison.tuned(lab, defined, on)
    plain = experiment.trial(lab, PLAIN, experiment.test_prompts(lab))
    return decisive_rows(model, study, lab, fit, build, chosen[DECISIVE], plain, on, draws, refits, curve)


def decisive_rows(
    model: str, study: Study, lab: SteeringExperiment, fit: Fit, build: Callable[[Fit], Steering], late: Steering, plain: pd.DataFrame,
    on: EvaluationPrompts, draws: int, refits: int, curve: int,
) -> list[dict[str, object]]:  # fmt: skip
    """The evidence rows of the decisive arm: outcomes, price, mediation, rivals and random directions."""
    arm = experiment.arm_of(lab.subject, late)
    trial = experiment.trial(lab, arm, plain)
    changes = stability.refit_changes(lab, stability.refitted(fit, build, late.strength, refits), plain)
    price_on = budget.evaluation_prompts(lab, "test", curve)
    rows = outcome_rows(model, plain, trial, changes)
    rows += price_rows(model, experiment.prices(lab, arm, price_on.free, price_on.own))
    rows += mediation_rows(model, mediated(study, lab, None), mediated(study, lab, late))
    found = rivalry(lab, fit, late, on, plain)
    harmful = trial[trial.kind == "harmful"].reset_index(drop=True)
    rows += rival_rows(model, harmful, found.trials, found.spent)
    null = controls.random_null(lab, fit, late, price_on, on, draws)
    return rows + random_rows(model, null)
