"""The tables behind the figures of notebook 06, tidy, one row an estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import partial
from typing import Final

import numpy as np
import pandas as pd

from companion.generation.hooks import Steering
from companion.mediation import summaries
from companion.mediation.summaries import averaged
from companion.plots.steering import COSTS
from companion.stats.clusters import wilson
from companion.stats.rates import holm, mean_change
from companion.steering import adasteer, budget, comparison, methods
from companion.steering.budget import EvaluationPrompts
from companion.steering.comparison import ROWS
from companion.steering.experiment import PLAIN, changed, divergence, share
from companion.steering.indirect_effects import share_neutralised

CURVE: Final = ("panel", "group", "x", "estimate", "low", "high")
MEASURES: Final = {
    "harmful": "harmful answers to jailbroken requests",
    "borderline": "refusals of borderline prompts",
    "harmless": "right answers lost on harmless prompts",
}


def tradeoff(curves: pd.DataFrame, rows: Mapping[str, str], refits: pd.DataFrame | None = None) -> pd.DataFrame:
    """Harm over each of the two costs, one line a method in the order of its strengths, in its row of panels (`rows`).

    Refits are one point more, in the second row: their means, and the range of their harm.
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
            harm, paid = (refits.estimate[refits.measure == name] for name in ("harm", cost))
            point = (panel, f"{len(harm)} refits: mean and range", paid.mean(), harm.mean(), harm.min(), harm.max())
            parts.append(pd.DataFrame([point], columns=list(CURVE)).assign(row=ROWS[1]))
    return pd.concat(parts, ignore_index=True)[["row", *CURVE]].sort_values("row", kind="stable", ignore_index=True)


def rate_changes(plain: pd.DataFrame, trials: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Change of each kind's rate under every method, in points."""
    rows = [
        (name, measure, *astuple(changed(plain, trial, kind))[:3])
        for name, trial in trials.items()
        for kind, measure in MEASURES.items()
        if (plain.kind == kind).any()
    ]
    return pd.DataFrame(rows, columns=["method", "measure", "estimate", "low", "high"])


def method_summary(
    evaluation: EvaluationPrompts, chosen: Mapping[str, Steering], plain: pd.DataFrame, trials: Mapping[str, pd.DataFrame],
    prices: Mapping[str, pd.DataFrame], before: pd.DataFrame, after: Mapping[str, pd.DataFrame],
) -> pd.DataFrame:  # fmt: skip
    """One row a method with everything that is reported about it; rates in points, with 95 % limits.

    `before` and `after` are indirect effects in the plain model and under some of the methods. The first row has the unsteered
    model's own rates. A kind of prompt that the set lacks leaves its cells empty.
    """
    rows: list[dict[str, object]] = [{"method": PLAIN.name, "strength": 0.0, "budget": 0.0, **label_rates(plain)}]
    for name, trial in trials.items():
        (spent,) = evaluation.budgets([chosen[name]])
        row: dict[str, object] = {"method": name, "strength": chosen[name].strength, "budget": spent}
        for kind, short in (("harmful", "harm"), ("borderline", "over_refusal"), ("harmless", "loss")):
            if (plain.kind == kind).any():
                change = changed(plain, trial, kind)
                row |= _limits(short, astuple(change)) | ({"p": change.p} if short == "harm" else {})
        if "greedy" in trial:
            row["harm_greedy"] = changed(plain, trial, "harmful", "greedy").estimate
        kl, p95, ratio = divergence(prices[name])
        row |= _limits("kl", astuple(kl)) | {"kl_p95": p95} | _limits("perplexity_ratio", astuple(ratio))
        row |= label_rates(trial) | gate_firing(evaluation, chosen[name], trial)
        free = trial[trial.kind == "harmless"]
        row |= _limits("repetition", astuple(mean_change(free.repetition.to_numpy(), free.topic.to_numpy())))
        row |= _limits("phi", astuple(share_neutralised(before, after[name]))) if name in after else {}
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(list(table.p))).drop(columns="p")


def label_rates(trial: pd.DataFrame) -> dict[str, float]:
    """Percentages with their Wilson limits: harmful answers, and refusals of borderline and of harmless prompts."""
    row: dict[str, float] = {}
    names = {"harmful": "harm_rate", "borderline": "borderline_refused", "harmless": "harmless_refused"}
    for kind, name in names.items():
        labels = trial.label[trial.kind == kind]
        if len(labels):
            hits = int((labels == ("harmful" if kind == "harmful" else "refusal")).sum())
            low, high = wilson(hits, len(labels))
            row |= _limits(name, (100 * hits / len(labels), 100 * low, 100 * high))
    return row


def gate_firing(evaluation: EvaluationPrompts, steered: Steering, prompts: pd.DataFrame) -> dict[str, float]:
    """Share of the prompts of each kind for which a method's gate opens, with Wilson limits; empty without a gate."""
    if steered.gate is None:
        return {}
    is_open = budget.gate_values(evaluation.experiment.subject, steered, list(prompts.text)) > 0
    row: dict[str, float] = {}
    for kind in prompts.kind.unique():
        row |= _limits(f"fires_{kind}", share(is_open[(prompts.kind == kind).to_numpy()]))
    return row


def _limits(name: str, values: Sequence[float]) -> dict[str, float]:
    """An estimate and its limits as three columns."""
    return {name: values[0], f"{name}_low": values[1], f"{name}_high": values[2]}


def harm_by_zone(evaluation: EvaluationPrompts, strengths: Sequence[float] = (0.5, 1.0, 2.0)) -> pd.DataFrame:
    """1 - P(refusal) of jailbroken prompts over the budget, by zone: adaptive, fixed, the last layer's vector there.

    Where a direction is rounding noise (nothing has arrived yet) the method spends next to nothing: below a thousandth of
    the largest budget its points are left out.
    """
    rows, fit = [], evaluation.experiment.fit
    for panel, make in (
        ("adaptive (AdaSteer-style)", adasteer.adasteer),
        ("fixed rejection", methods.fixed),
        ("last layer's vector", comparison.transplanted),
    ):
        for zone, layers in comparison.zones(fit.subject.n_layers).items():
            made, _ = comparison.build_methods(fit, {zone: partial(make, layers=layers)})
            if steered := [budget.scaled(found, s) for found in made.values() for s in strengths]:
                for spent, values in zip(evaluation.budgets(steered), evaluation.harmful_left(steered), strict=True):
                    change = mean_change(values, evaluation.harmful.topic.to_numpy())
                    rows.append((panel, zone, spent, *astuple(change)[:3]))
    table = pd.DataFrame(rows, columns=list(CURVE))
    return table[table.x > table.x.max() / 1000]


def component_effects(effects: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean indirect effect of every component in each of the models, with intervals."""
    tables = [summaries.cell_means(averaged(table)).assign(steering=name) for name, table in effects.items()]
    return pd.concat(tables, ignore_index=True)


def harm_by_tier(trials: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Share of harmful answers by wrapper tier, one panel a severity (one for all, where none is known)."""
    rows = []
    for name, trial in trials.items():
        harmful = trial[(trial.kind == "harmful") & (trial.tier > 0)]
        panels = harmful.severity.map(lambda s: "all requests" if np.isnan(s) else f"severity {s:+.1f}")
        for (panel, tier), part in harmful.groupby([panels, "tier"]):
            rows.append((panel, name, float(tier), *share(part.label == "harmful")))
    table = pd.DataFrame(rows, columns=list(CURVE))
    order = {"all requests": 0.0} | {f"severity {value:+.1f}": value for value in (-0.6, 0.0, 0.6)}
    return table.sort_values("panel", key=lambda names: names.map(order), kind="stable")
