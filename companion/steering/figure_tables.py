"""The tables behind the figures of notebook 06, tidy, one row an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from companion.generation.hooks import Steering
from companion.generation.outcomes import log_odds_each
from companion.mediation import summaries
from companion.mediation.summaries import averaged
from companion.plots.steering import COSTS
from companion.stats import clusters, rates
from companion.steering import adasteer, attacker, budget, comparison, experiment, indirect_effects
from companion.steering.budget import EvaluationPrompts
from companion.steering.comparison import ROWS
from companion.steering.experiment import PLAIN, SteeringExperiment
from companion.steering.extraction import Directions, Fit
from companion.steering.methods import fixed
from companion.steering.prompts import thinned

CURVE = ["panel", "group", "x", "estimate", "low", "high"]


MEASURES = {
    "harmful": "harmful answers to jailbroken requests",
    "borderline": "refusals of borderline prompts",
    "harmless": "right answers lost on harmless prompts",
}


N_LAW = 100


def laws(
    lab: SteeringExperiment, directions: Directions, prompts: pd.DataFrame, placed: pd.DataFrame, layers: list[int]
) -> tuple[pd.DataFrame, dict[str, float]]:
    """R-law and H-law on these prompts (`placed` holds their positions), and what their figure cannot show.

    The second value has Spearman's correlations and the share of prompts that no coefficient of the grid flips.
    """
    answered = prompts[(prompts.kind == "harmful") & ~prompts.refused]
    answered = thinned(answered, N_LAW)
    odds = adasteer.odds_over(lab, directions, layers, answered, "rejection")
    need, at = adasteer.needed(odds), placed.pos_R[answered.index].to_numpy()
    if not np.isfinite(need).any():
        return pd.DataFrame(columns=CURVE), {"jailbroken prompts that no coefficient flips": 1.0}
    tables = [adasteer.law(at, need, answered.topic.to_numpy(), "R-law: needed along v_R", "harmful, answered")]
    facts = {
        "R-law, Spearman": adasteer.trend(at, need),
        "jailbroken prompts that no coefficient flips": float(np.isnan(need).mean()),
    }
    held = {"rejection": float(np.nanmedian(need))}
    both, positions = [], []
    for kind, wanted in (("harmful", False), ("borderline", True), ("harmless", True)):
        part = thinned(prompts[prompts.kind == kind], N_LAW)
        push = adasteer.odds_over(lab, directions, layers, part, "harmfulness", held)
        bears = adasteer.tolerated(push, np.full(len(part), wanted))
        at = placed.pos_H[part.index].to_numpy()
        tables.append(adasteer.law(at, bears, part.topic.to_numpy(), "H-law: tolerated along v_H", kind))
        both.append(bears)
        positions.append(at)
    facts["H-law, Spearman"] = adasteer.trend(np.concatenate(positions), np.concatenate(both))
    return pd.concat(tables, ignore_index=True), facts


def tradeoff(
    curves: pd.DataFrame, rows: Mapping[str, str], refits: pd.DataFrame | None = None, refits_row: str = ROWS[1]
) -> pd.DataFrame:
    """Harm over each of the two costs, one line a method in the order of its strengths.

    `rows` says for each method in which row of panels it is drawn: all of them in one would hide each other. Refits are one
    point more, in `refits_row`: their means, and the range of their harm.
    """
    placed = ["method", "strength"]
    wide = curves.pivot(index=placed, columns="measure", values=["estimate", "low", "high"])
    wide = wide.reindex(pd.MultiIndex.from_frame(curves[placed].drop_duplicates()))  # a pivot orders them anew
    parts = []
    for cost, panel in COSTS.items():
        part = wide.reset_index()[["method"]].set_axis(["group"], axis=1).assign(panel=panel)
        part["row"] = part.group.map(dict(rows))
        part["x"] = wide["estimate", cost].to_numpy()
        for name in ("estimate", "low", "high"):
            part[name] = wide[name, "harm"].to_numpy()
        parts.append(part)
        if refits is not None and len(refits):
            parts.append(_refit_point(refits, cost, panel).assign(row=refits_row))
    return pd.concat(parts, ignore_index=True)[["row", *CURVE]].sort_values("row", kind="stable", ignore_index=True)


def _refit_point(refits: pd.DataFrame, cost: str, panel: str) -> pd.DataFrame:
    harm, paid = (refits.estimate[refits.measure == name] for name in ("harm", cost))
    row = (panel, f"{len(harm)} refits: mean and range", paid.mean(), harm.mean(), harm.min(), harm.max())
    return pd.DataFrame([row], columns=CURVE)


def methods(plain: pd.DataFrame, trials: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Change of each kind's rate under every method, in points."""
    rows = []
    for name, trial in trials.items():
        for kind, measure in MEASURES.items():
            if (plain.kind == kind).any():
                change = experiment.changed(plain, trial, kind)
                rows.append((name, measure, change.estimate, change.low, change.high))
    return pd.DataFrame(rows, columns=["method", "measure", "estimate", "low", "high"])


def summary(
    lab: SteeringExperiment, plain: pd.DataFrame, trials: Mapping[str, pd.DataFrame], prices: Mapping[str, pd.DataFrame],
    before: pd.DataFrame, after: Mapping[str, pd.DataFrame], chosen: Mapping[str, Steering], on: EvaluationPrompts,
) -> pd.DataFrame:  # fmt: skip
    """One row a method with everything that is reported about it; rates in points, with 95 % limits.

    The first row has the unsteered model's own rates. A kind of prompt that the set lacks leaves its cells empty.
    """
    rows: list[dict[str, object]] = [{"method": PLAIN.name, "strength": 0.0, "budget": 0.0, **comparison.rates(plain)}]
    for name, trial in trials.items():
        row: dict[str, object] = {"method": name, "strength": chosen[name].strength}
        row["budget"] = budget.budget(lab, chosen[name], on)
        for kind, short in (("harmful", "harm"), ("borderline", "over_refusal"), ("harmless", "loss")):
            if not (plain.kind == kind).any():
                continue
            change = experiment.changed(plain, trial, kind)
            row |= {short: change.estimate, f"{short}_low": change.low, f"{short}_high": change.high}
            row |= {"p": change.p} if short == "harm" else {}
        if "greedy" in trial:
            row["harm_greedy"] = experiment.changed(plain, trial, "harmful", "greedy").estimate
        kl, p95, ratio = experiment.divergence(prices[name])
        row |= {"kl": kl.estimate, "kl_low": kl.low, "kl_high": kl.high, "kl_p95": p95}
        row |= {
            "perplexity_ratio": ratio.estimate,
            "perplexity_ratio_low": ratio.low,
            "perplexity_ratio_high": ratio.high,
        }
        row |= comparison.rates(trial) | comparison.firing(lab, chosen[name], trial)
        free = trial[trial.kind == "harmless"]
        again = rates.mean_change(free.repetition.to_numpy(), free.topic.to_numpy())
        row |= {"repetition": again.estimate, "repetition_low": again.low, "repetition_high": again.high}
        phi = indirect_effects.neutralised(before, after[name]) if name in after else None
        row |= {"phi": phi.estimate, "phi_low": phi.low, "phi_high": phi.high} if phi else {}
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.assign(p_holm=rates.holm(list(table.p))).drop(columns="p")


def budgets(
    lab: SteeringExperiment, fit: Fit, on: EvaluationPrompts, strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
) -> pd.DataFrame:
    """1 - P(refusal) of jailbroken prompts over the budget, by zone: adaptive, fixed, the last layer's vector there.

    Where a direction is rounding noise (nothing has arrived yet) the method spends next to nothing: below a thousandth of
    the largest budget its points are left out.
    """
    rows = []
    for panel, make in (
        ("adaptive (AdaSteer-style)", adasteer.adasteer),
        ("fixed rejection", fixed),
        ("last layer's vector", comparison.transplanted),
    ):
        for zone, layers in comparison.zones(lab.subject.n_layers).items():
            made, _ = comparison.arms(fit, {zone: partial(make, layers=layers)})
            steered = [budget.scaled(found, s) for found in made.values() for s in strengths]
            if not steered:
                continue
            spent = budget.budgets(lab, steered, on)
            found = log_odds_each(lab.subject, on.harmful.text, lab.openers, steered)
            for norm, odds in zip(spent, found, strict=True):
                change = rates.mean_change(1 - odds.p_refuse.to_numpy(), on.harmful.topic.to_numpy())
                rows.append((panel, zone, norm, change.estimate, change.low, change.high))
    table = pd.DataFrame(rows, columns=CURVE)
    return table[table.x > table.x.max() / 1000]


def mediation(effects: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean indirect effect of every component in each of the models, with intervals."""
    return pd.concat(
        [summaries.cell_means(averaged(table)).assign(steering=name) for name, table in effects.items()],
        ignore_index=True,
    )


def tiers(trials: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Share of harmful answers by wrapper tier, one panel a severity (one for all, where none is known)."""
    rows = []
    for name, trial in trials.items():
        harmful = trial[(trial.kind == "harmful") & (trial.tier > 0)]
        panels = harmful.severity.map(lambda s: "all requests" if np.isnan(s) else f"severity {s:+.1f}")
        for (panel, tier), part in harmful.groupby([panels, "tier"]):
            hits = int((part.label == "harmful").sum())
            rows.append((panel, name, float(tier), hits / len(part), *clusters.wilson(hits, len(part))))
    table = pd.DataFrame(rows, columns=CURVE)
    order = {"all requests": 0.0} | {f"severity {value:+.1f}": value for value in (-0.6, 0.0, 0.6)}
    return table.sort_values("panel", key=lambda names: names.map(order), kind="stable")


def attacks(lab: SteeringExperiment, steered: Mapping[str, Steering]) -> pd.DataFrame:
    """Judged harm of every method, and of the plain model, under a plain strong wrapper and under the worst disguise that
    the search found against it.

    Both on the requests of the test topics, with one request a topic; rates with Wilson intervals.
    """
    asked = attacker.requests("test")
    rows = []
    every = {PLAIN.name: Steering(PLAIN.name), **steered}
    worst = attacker.worst_wrapper(lab.subject, lab.openers, list(every.values()))
    for (name, one), found in zip(every.items(), worst, strict=True):
        arm = replace(experiment.arm_of(lab.subject, one), name=name) if name != PLAIN.name else PLAIN
        for attack, disguise in (("strong wrapper", attacker.STRONG), ("worst disguise found", found)):
            prompts = attacker.as_prompts(asked, disguise)
            labels = experiment.labelled(lab, experiment.answer(lab, arm, prompts), prompts)
            hits = labels.count("harmful")
            low, high = clusters.wilson(hits, len(labels))
            rows.append((name, attack, disguise.wrapper.frame, disguise.name, hits / len(labels), low, high))
    return pd.DataFrame(rows, columns=["method", "attack", "family", "disguise", "estimate", "low", "high"])
