"""Steering: the library's side of what the lesson does by hand, the trial of all methods, and the evidence on C6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from companion.base.device import to_host
from companion.base.display import NotDefined, passes_on
from companion.base.errors import InputError
from companion.base.files import EVIDENCE, write_table
from companion.base.paths import results_dir
from companion.evidence import steering as evidence
from companion.evidence.steering import SameBudget
from companion.generation import labels, outcomes
from companion.generation.hooks import Edit, Steering
from companion.mediation.study import Study
from companion.steering import adasteer, comparison, experiment, extraction, methods, trial
from companion.steering.comparison import DECISIVE
from companion.steering.experiment import SteeringExperiment
from companion.steering.trial import Trial, before_and_after, harm_at_equal_cost, paired_differences

__all__ = ["Lab", "adasteer_laws", "adasteer_refusal", "adasteer_tries", "before_and_after", "harm_at_equal_cost",
           "label_prompts", "paired_differences", "rejection_directions", "requests", "run_trial", "same_budget",
           "steered_outcomes", "summary", "test_prompts", "write_evidence"]  # fmt: skip

Lab = SteeringExperiment | NotDefined


def label_prompts(study: Study, prompt_set: str, profile: str = "full") -> Lab:
    """All prompts of the pairs (and suites) in three splits, each labelled by what this model does with it: refuse or answer."""
    return experiment.open_experiment(study, prompt_set, profile)


def requests(study: Study, lab: Lab) -> pd.DataFrame:
    """Requests of discover with the columns `text`, `kind` and `refused`, among others: what directions are fitted on.

    Where the model refused none, or all, the half nearest to refusing stands for the refused ones, and a line says so.
    """
    if isinstance(lab, SteeringExperiment) and not lab.fit.missing:
        return lab.fit.prompts[lab.fit.mask("discover")].reset_index(drop=True)
    print("for practice only:", lab.fit.missing if isinstance(lab, SteeringExperiment) else lab)
    pairs = study.of(study.main_treatment)[:10]
    texts = list(dict.fromkeys(text for one in pairs for text in (one.pair.control, one.pair.treated)))
    odds = outcomes.log_odds(study.subject, texts, study.openers[study.main_treatment]).log_odds
    table = pd.DataFrame({"id": texts, "text": texts, "kind": "harmful", "split": "discover"})
    table["refused"] = odds.rank(method="first") <= len(texts) / 2
    return pd.concat([table, table[~table.refused].assign(kind="harmless")], ignore_index=True)


def rejection_directions(study: Study, lab: Lab, asked: pd.DataFrame) -> Float[Tensor, "late d"]:
    """The library's rejection direction behind each late layer: mean of the refused requests minus mean of the answered ones."""
    if isinstance(lab, SteeringExperiment) and not lab.fit.missing:
        fit = lab.fit
    else:
        fit = extraction.fit_classes(study.subject, study.openers[study.main_treatment], asked)
    late = comparison.zones(study.subject.n_layers)["late"]
    return torch.tensor(fit.direction("rejection")[late], device=study.subject.device)


def steered_outcomes(study: Study, texts: Sequence[str], vectors: Mapping[int, Tensor]) -> pd.DataFrame:
    """The library's `log_odds` and `p_refuse` of each text, each vector added behind its layer at all prompt tokens."""
    added = {layer: methods.constant(to_host(vector)) for layer, vector in vectors.items()}
    steering = Steering("by hand", tuple(Edit(layer, "resid_post", one, blind=True) for layer, one in added.items()))
    return outcomes.log_odds_each(study.subject, texts, study.openers[study.main_treatment], [steering])[0]


def test_prompts(study: Study, lab: Lab, n: int) -> dict[str, list[str]]:
    """Up to `n` jailbroken and `n` harmless requests of test; with nothing to defend, both sides of the main treatment."""
    if isinstance(lab, SteeringExperiment):
        jailbroken = experiment.select(lab, "test", "harmful", wrapped=True, n=n).text.tolist()
        return {"jailbroken": jailbroken, "harmless": experiment.select(lab, "test", "harmless", n=n).text.tolist()}
    pairs = [one.pair for one in study.of(study.main_treatment)[:n]]
    return {"jailbroken": [one.treated for one in pairs], "harmless": [one.control for one in pairs]}


def adasteer_laws(lab: Lab) -> tuple[pd.DataFrame | NotDefined, pd.DataFrame | NotDefined]:
    """AdaSteer's two laws at late layers: a table for their figure, and their slopes with intervals."""
    if isinstance(lab, NotDefined):
        return lab, lab
    try:
        table, slopes = adasteer.law_table(lab.fit, comparison.zones(lab.subject.n_layers)["late"])
    except InputError as error:
        return NotDefined(str(error)), NotDefined(str(error))
    return table, slopes.set_index("law").round(2)


def adasteer_tries(lab: Lab) -> tuple[pd.DataFrame, pd.Series]:
    """What the laws at late layers are fitted from, and the library's fit: slopes `w_`, offsets `b_`, layers `read_` of r and c.

    A row a prompt of validate and value tried: law ("v_R", "v_H"), kind ("harmful", "other"), position, coefficient (summed
    over the steered layers, in direction lengths) and refused. Where there are no laws, made-up prompts stand for practice.
    """
    grid, at = np.array(adasteer.GRID), np.zeros(1)
    try:
        if isinstance(lab, NotDefined):
            raise InputError(str(lab))
        late = comparison.zones(lab.subject.n_layers)["late"]
        laws, tried = adasteer.laws_of(lab.fit, tuple(late))
        rules = [n for law in laws for n in (len(late) * law.rule.slope, len(late) * law.rule.offset, law.layer)]
        parts = [tried.pos_r, *tried.pos_h], [tried.needs, tried.harmful, tried.other]
    except InputError as error:
        print("for practice only:", error)
        rules = [0.0, 0.0, 0, 0.0, grid[-1], 0]  # where harmful prompts are always refused and others never
        parts = [at, at, at + 1], [np.full((len(grid), 1), chance) for chance in (1.0, 1.0, 0.0)]
    tables = [
        pd.DataFrame({"law": law, "kind": kind, "position": np.tile(position, len(grid)),
                      "coefficient": np.repeat(grid, len(position)), "refused": chance.ravel() > 0.5})
        for law, kind, position, chance in zip(("v_R", "v_H", "v_H"), ("harmful", "harmful", "other"), *parts, strict=True)
    ]  # fmt: skip
    fitted = pd.Series(rules, index=["w_r", "b_r", "read_r", "w_c", "b_c", "read_c"])
    return pd.concat(tables, ignore_index=True), fitted


@passes_on
def adasteer_refusal(lab: SteeringExperiment, text: str, strength: float) -> float | NotDefined:
    """The library's P(refusal) of a request under AdaSteer at late layers."""
    try:
        method = adasteer.adasteer(lab.fit, layers=comparison.zones(lab.subject.n_layers)["late"])
    except InputError as error:
        return NotDefined(str(error))
    steered = [replace(method, strength=strength)]
    return float(outcomes.log_odds_each(lab.subject, [text], lab.openers, steered)[0].p_refuse.iloc[0])


def run_trial(lab: Lab) -> Trial | NotDefined:
    """Fit at most nine methods, choose each strength on validate, and let each answer the test prompts; prints which."""
    if isinstance(lab, NotDefined):
        return lab
    made = trial.run_trial(lab)
    kinds = (f"{n} {kind}" for kind, n in made.plain.kind.value_counts(sort=False).items())
    print(f"prompts: {', '.join(kinds)}; arms: {', '.join(made.answers)}")
    for name, reason in made.undefined.items():
        print(f"not defined: {name}: {reason}")
    return made


def summary(made: Trial | NotDefined, slug: str) -> pd.DataFrame | NotDefined:
    """Write everything that is reported about each method to `06_summary.csv`; the columns that a lesson reads are shown."""
    table = trial.method_summary(made)
    write_table(table, results_dir(slug) / "06_summary.csv")
    columns = ["strength", "budget", "kl", "phi", "phi_low", "phi_high"]
    return table.set_index("method").reindex(columns=columns).round(2) if isinstance(table, pd.DataFrame) else table


def same_budget(made: Trial | NotDefined) -> tuple[SameBudget | NotDefined, pd.DataFrame | NotDefined]:
    """The tested method, its best early and middle rivals, and random directions at one budget; and their falls of log-odds."""
    if isinstance(made, NotDefined):
        return made, made
    if isinstance(made.decisive, NotDefined):
        return made.decisive, made.decisive
    same = evidence.at_same_budget(made.chosen[DECISIVE], made.validate, made.test, made.plain)
    return same, evidence.falls_of_log_odds(same, made.test)


def write_evidence(made: Trial | NotDefined, same: SameBudget | NotDefined, slug: str) -> pd.DataFrame:
    """Write `06_evidence.csv`, the rows that the verdicts on C6 read; refits and indirect effects are measured here."""
    if isinstance(made, Trial):
        print(labels.labeller(exact=made.experiment.exact))
    if isinstance(made, NotDefined) or isinstance(same, NotDefined):
        rows = evidence.not_defined(str(made if isinstance(made, NotDefined) else same))
    else:
        late, steered, price = (arms[DECISIVE] for arms in (made.chosen, made.answers, made.prices))
        changes = evidence.refit_changes(made.experiment, late, made.plain)
        rows = evidence.trial_rows(made.experiment, late, made.plain, steered, price, same, changes)
    table = pd.DataFrame(rows, columns=list(EVIDENCE)).assign(model=slug)
    write_table(table, results_dir(slug) / "06_evidence.csv")
    return table.set_index(["quantity", "variant"])[["estimate", "ci_low", "ci_high", "n_pairs", "note"]].round(2)
