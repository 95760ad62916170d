"""C6 from beginning to end for any study: fit, tune, try, compare, and write the evidence rows.

Notebook 06 takes the same steps one by one, for every method; here they are taken for the decisive one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import pandas as pd

from helpers import (
    defence,
    defence_arms,
    defence_evidence,
    defence_mediation,
    defence_random,
    defence_refits,
    defence_tradeoff,
    steering_controls,
    steering_fit,
    thinning,
    wrappers,
)
from helpers.defence import N_CURVE, PLAIN, Lab
from helpers.defence_arms import DECISIVE
from helpers.defence_outcomes import Judge
from helpers.defence_prompts import Prompts
from helpers.defence_tradeoff import Bench
from helpers.errors import InputError
from helpers.steering import Steering
from helpers.steering_fit import Fit
from helpers.study import Study

N_MEDIATION = 300  # test pairs of T2 at most on which the steered model's indirect effects are measured


@dataclass(frozen=True)
class Rivalry:
    """The decisive arm's rivals at its budget: what they spend, and what they answer to the harmful test prompts."""

    steered: Mapping[str, Steering]
    spent: Mapping[str, float]
    trials: Mapping[str, pd.DataFrame]


def begin(
    study: Study, prompt_set: Prompts, *, profile: str = "full", judge: Judge | None = None
) -> tuple[Lab, Fit, str] | str:
    """Lab and fit of a study, and which class of prompts is missing ("" for none); see `defence.open_lab`.

    A missing class stops the arms that need a direction from it, and C6 with them; arms that need none can still be tried.
    Where there is nothing to try at all the sentence that says why stands alone.
    """
    lab = defence.open_lab(study, prompt_set, thin=thinning.asked(0, profile), judge=judge)
    if isinstance(lab, str):
        return lab
    if not study.of("T2"):
        return wrappers.NONE
    return lab, steering_fit.fit(study.subject, lab.openers, lab.prompts), defence.missing(lab)


def rivalry(lab: Lab, fit: Fit, late: Steering, on: Bench, plain: pd.DataFrame) -> Rivalry:
    """Early and middle layers at the budget of the decisive arm, tried on the same harmful prompts."""
    target = defence_tradeoff.budget(lab, late, on)
    steered = defence_arms.rivals(lab, fit, target, on)
    spent = {"late": target, **{zone: defence_tradeoff.budget(lab, one, on) for zone, one in steered.items()}}
    harmful = plain[plain.kind == "harmful"].reset_index(drop=True)
    trials = {
        zone: defence.trial(lab, defence.arm_of(lab.subject, one), harmful, greedy=False)
        for zone, one in steered.items()
    }
    return Rivalry(steered, spent, trials)


def mediated(study: Study, lab: Lab, steered: Steering | None) -> pd.DataFrame:
    """Indirect effects of all attention and MLP outputs on test pairs of T2, in the model under a steering (or none)."""
    pairs = [p for p in study.of("T2") if p.pair.split == "test"][:N_MEDIATION]
    arm = PLAIN if steered is None else defence.arm_of(lab.subject, steered)
    layers = range(study.subject.n_layers)
    return defence_mediation.steered_effects(study.subject, pairs, study.openers, layers, arm.steer)


def discover_effects(study: Study) -> pd.DataFrame:
    """Indirect effects of all attention and MLP outputs in the plain model, on the discover pairs of T2."""
    pairs = [p for p in study.of("T2") if p.pair.split == "discover"]
    return defence_mediation.steered_effects(study.subject, pairs, study.openers, range(study.subject.n_layers))


def same_push_elsewhere(lab: Lab, fit: Fit, late: Steering, effects: pd.DataFrame, on: Bench) -> Steering | str:
    """The decisive arm's push at the layers that mediate least, at its budget on `on`; or why there is no such control.

    The layers are chosen by these indirect effects (of discover), as many as the arm steers and none of its own.
    """
    own = {edit.layer for edit in late.edits}
    idle = defence_mediation.idle_layers(effects, len(own), besides=own)
    try:
        moved = steering_controls.elsewhere(fit, late.strength, layers=idle, like=late)
        return defence_tradeoff.at_budget(lab, moved, defence_tradeoff.budget(lab, late, on), on)
    except InputError as error:
        return str(error)


def mediated_each(
    study: Study, lab: Lab, steered: Mapping[str, Steering]
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """`mediated` of the plain model, and of each steering by its name."""
    return mediated(study, lab, None), {name: mediated(study, lab, one) for name, one in steered.items()}


def mediation_rows(
    model: str, before: pd.DataFrame, after: pd.DataFrame, variant: str = "main", steered: Collection[int] = ()
) -> list[dict[str, object]]:
    """phi, and the indirect effects that are left at the steered layers (by default the late ones) and at all others."""
    every = range(int(before.layer.max()) + 1)
    own = sorted(set(steered)) or defence_arms.zones(len(every))["late"]
    others = [layer for layer in every if layer not in own]
    made = [defence_evidence.row(model, "phi", defence_mediation.neutralised(before, after), variant)]
    for name, layers in (("steered sites", own), *((("other sites", others),) if others else ())):
        left = defence_mediation.after_before(before, after, layers)
        made.append(defence_evidence.row(model, f"NIE after/before, {name}", left, variant))
    return made


def evidence(
    study: Study, prompt_set: Prompts, model: str, *, judge: Judge | None = None, draws: int = 100,
    refits: int = 10, curve: int = N_CURVE,
) -> list[dict[str, object]]:  # fmt: skip
    """All evidence rows on C6 of a study; one row that says why, where a class of prompts is missing.

    `curve` bounds the harmful prompts on which strengths are chosen and random directions compared.
    """
    begun = begin(study, prompt_set, judge=judge)
    if isinstance(begun, str) or begun[2]:
        return defence_evidence.not_defined(model, begun if isinstance(begun, str) else begun[2])
    lab, fit, _ = begun
    build = defence_arms.builders(study.subject.n_layers, None)[DECISIVE]
    on = defence_tradeoff.bench(lab, "validate", curve)
    defined, refused = defence_arms.arms(fit, {DECISIVE: build})
    if refused:
        return defence_evidence.not_defined(model, refused[DECISIVE])
    chosen, _ = defence_arms.tuned(lab, defined, on)
    plain = defence.trial(lab, PLAIN, defence.test_prompts(lab))
    return decisive_rows(model, study, lab, fit, build, chosen[DECISIVE], plain, on, draws, refits, curve)


def decisive_rows(
    model: str, study: Study, lab: Lab, fit: Fit, build: Callable[[Fit], Steering], late: Steering, plain: pd.DataFrame,
    on: Bench, draws: int, refits: int, curve: int,
) -> list[dict[str, object]]:  # fmt: skip
    """The evidence rows of the decisive arm: outcomes, price, mediation, rivals and random directions."""
    arm = defence.arm_of(lab.subject, late)
    trial = defence.trial(lab, arm, plain)
    changes = defence_refits.refit_changes(lab, defence_refits.refitted(fit, build, late.strength, refits), plain)
    price_on = defence_tradeoff.bench(lab, "test", curve)
    rows = defence_evidence.outcome_rows(model, plain, trial, changes)
    rows += defence_evidence.price_rows(model, defence.prices(lab, arm, price_on.free, price_on.own))
    rows += mediation_rows(model, mediated(study, lab, None), mediated(study, lab, late))
    found = rivalry(lab, fit, late, on, plain)
    harmful = trial[trial.kind == "harmful"].reset_index(drop=True)
    rows += defence_evidence.rival_rows(model, harmful, found.trials, found.spent)
    null = defence_random.null(lab, fit, late, price_on, on, draws)
    return rows + defence_evidence.random_rows(model, null)
