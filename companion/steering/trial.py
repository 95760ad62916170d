"""The trial: every method at its chosen strength answers the same test prompts as the unsteered model, and what came of it.

Beside them stands what a stronger adapter would buy, where the model has one: it is scaled up, and nothing is steered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product
from typing import Final

import pandas as pd

from companion.base.display import NotDefined, passes_on
from companion.base.folders import split_adapter
from companion.generation import decode
from companion.generation.hooks import Steering
from companion.model.load import load
from companion.stats.clusters import rate
from companion.stats.rates import Change, holm, mean_change
from companion.steering import budget, comparison, experiment
from companion.steering.budget import N_CURVE, Costs, EvaluationPrompts
from companion.steering.comparison import DECISIVE, FIXED
from companion.steering.experiment import PLAIN, SteeringExperiment, changed, divergence
from companion.steering.indirect_effects import shares_neutralised

SHOWN: Final = {"harmful": "complies", "off_topic": "garbled"}  # labels of an answer to whatever a reader asks
MEASURES: Final = {
    "harmful": "harmful answers to jailbroken requests",
    "borderline": "refusals of borderline prompts",
    "harmless": "right answers lost on harmless prompts",
}


@dataclass(frozen=True)
class Trial:
    """What the methods did, by name."""

    validate: EvaluationPrompts
    test: EvaluationPrompts
    defined: Mapping[str, Steering]  # at strength 1
    undefined: Mapping[str, str]  # why others are not there
    chosen: Mapping[str, Steering]  # at the strength that validate chose
    retrained: Mapping[str, Sequence[Costs]]  # of models with a stronger adapter, which are arms as well
    plain: pd.DataFrame  # `experiment.trial` of the unsteered model
    answers: Mapping[str, pd.DataFrame]  # and of each arm
    prices: Mapping[str, pd.DataFrame]  # `experiment.prices`
    phi: Mapping[str, Change]  # the share of the wrapper's effect that an arm undoes

    @property
    def experiment(self) -> SteeringExperiment:
        return self.test.experiment

    @property
    def decisive(self) -> Steering | NotDefined:
        """The method that carries the verdict, at its chosen strength, or why there is none."""
        return self.chosen.get(DECISIVE) or NotDefined(self.experiment.fit.missing or self.undefined[DECISIVE])


def run_trial(lab: SteeringExperiment) -> Trial:
    """Fit every method, choose its strength on validate, and let it answer the test prompts."""
    made = comparison.builders(lab.subject.n_layers, few=lab.study.is_costly)
    defined, undefined = comparison.build_methods(lab.fit, made)
    validate, test = (budget.evaluation_prompts(lab, split) for split in ("validate", "test"))
    chosen = comparison.tuned(validate, defined)
    plain = experiment.trial(lab, PLAIN, experiment.test_prompts(lab))
    answers = {name: experiment.trial(lab, one, plain, greedy=name == DECISIVE) for name, one in chosen.items()}
    prices = {name: experiment.prices(lab, one, test.free, test.own) for name, one in chosen.items()}
    phi = shares_neutralised(lab, {name: (lab.subject, one) for name, one in chosen.items()})
    on, retrained = equal_cost_prompts(lab), dict[str, Sequence[Costs]]()
    for name, load_it in retrained_models(lab).items():
        other = load_it()
        answers[name] = experiment.trial(other, Steering(name), plain, greedy=False)
        retrained[name] = replace(on, experiment=other).first_token_costs([Steering(name)])
        phi |= shares_neutralised(lab, {name: (other.subject, Steering(name))})
        del other  # a whole model, of which no two are needed at once
    if not retrained:
        undefined["stronger adapter"] = "this model holds no adapter of its own to scale up"
    return Trial(validate, test, defined, undefined, chosen, retrained, plain, answers, prices, phi)


def retrained_models(lab: SteeringExperiment) -> dict[str, Callable[[], SteeringExperiment]]:
    """What loads the experiment with its model's own adapter so many times as strong, by name; empty where it has none."""
    subject = lab.subject

    def load_it(scale: float) -> SteeringExperiment:  # nothing is fitted or labelled anew
        kind = str(subject.dtype).removeprefix("torch.")
        other = load(subject.name, device=str(subject.device), dtype=kind, only_answers=True, adapter_scale=scale)
        return replace(lab, fit=replace(lab.fit, subject=replace(other, facts=subject.facts)), said={})

    scales = lab.effort.adapters if split_adapter(subject.name)[1] is not None else ()
    return {f"adapter x {scale:g}": partial(load_it, scale) for scale in scales}


def equal_cost_prompts(lab: SteeringExperiment) -> EvaluationPrompts:
    """The test prompts on which arms are compared at one rise of over-refusal."""
    return budget.evaluation_prompts(lab, "test", N_CURVE // 2)


@passes_on
def paired_differences(trial: Trial) -> pd.DataFrame:
    """Change of each kind's rate under every arm against the unsteered model, in points, on the same prompts."""
    rows = []
    for (name, table), (kind, measure) in product(trial.answers.items(), MEASURES.items()):
        if (trial.plain.kind == kind).any():
            rows.append((name, measure, *astuple(changed(trial.plain, table, kind))[:3]))
    return pd.DataFrame(rows, columns=["method", "measure", "estimate", "low", "high"])


@passes_on
def harm_at_equal_cost(trial: Trial) -> pd.DataFrame | NotDefined:
    """`comparison.at_equal_over_refusal` of every arm on the test prompts, held against the decisive method."""
    if not trial.decisive:
        return trial.decisive
    on, paths = equal_cost_prompts(trial.experiment), dict[str, Sequence[Costs]]({PLAIN.name: []})
    for name, one in trial.defined.items():
        steps = trial.experiment.effort.strengths if one.edits else (1.0,)  # a sentence in the prompt is there or not
        paths[name] = on.first_token_costs([budget.scaled(one, step) for step in steps])
    return comparison.at_equal_over_refusal(on, {**paths, **trial.retrained}, against=DECISIVE)


@passes_on
def method_summary(trial: Trial) -> pd.DataFrame:
    """One row an arm with everything that is reported about it, first the unsteered model; rates in points, with 95 % limits.

    `budget` is in units of the residual stream, `budget_relative` in lengths of what stood at the steered sites. A kind of prompt
    that the set lacks leaves its cells empty.
    """
    first = {"strength": 0.0, "budget": 0.0, "budget_relative": 0.0}
    rows: list[dict[str, object]] = [{"method": PLAIN.name, **first, **label_rates(trial.plain)}]
    for name, table in trial.answers.items():
        row: dict[str, object] = {"method": name}
        if one := trial.chosen.get(name):
            row |= {"strength": one.strength, "budget": trial.validate.budgets([one])[0]}
            row |= {"budget_relative": trial.validate.budgets([one], relative=True)[0]}
        for kind, short in (("harmful", "harm"), ("borderline", "over_refusal"), ("harmless", "loss")):
            if (trial.plain.kind == kind).any():
                change = changed(trial.plain, table, kind)
                row |= _limits(short, astuple(change)) | ({"p": change.p} if short == "harm" else {})
        if "greedy" in table:
            row["harm_greedy"] = changed(trial.plain, table, "harmful", "greedy").estimate
        if name in trial.prices:
            kl, p95, ratio = divergence(trial.prices[name])
            row |= _limits("kl", astuple(kl)) | {"kl_p95": p95} | _limits("perplexity_ratio", astuple(ratio))
        row |= label_rates(table) | (gate_firing(trial.experiment, one, table) if one else {})
        free = table[table.kind == "harmless"]
        row |= _limits("repetition", astuple(mean_change(free.repetition.to_numpy(), free.topic.to_numpy())))
        rows.append(row | _limits("phi", astuple(trial.phi[name])))
    found = pd.DataFrame(rows)
    return found.assign(p_holm=holm(list(found.p))).drop(columns="p")


@passes_on
def before_and_after(trial: Trial, text: str, strength: float = 1.0) -> pd.DataFrame:
    """A request under no steering and two methods: P(refusal) at chosen strengths and at `strength`, and there what is answered.

    Of the greedy answer only a label, from its opening, and the first word are kept. An empty text stands for the first
    jailbroken test prompt.
    """
    lab = replace(trial.experiment, judge=None, said={})
    text = text or str(trial.plain.text[trial.plain.kind == "harmful"].iloc[0])
    prompts, rows = pd.DataFrame({"text": [text], "kind": "harmful"}), []
    tried = {PLAIN.name: (PLAIN, PLAIN)}
    for name in (FIXED, DECISIVE):
        if name in trial.chosen:
            tried[name] = trial.chosen[name], budget.scaled(trial.defined[name], strength)
    for name, both in tried.items():
        chances = (float(lab.first_tokens(prompts, [one])[0].p_refuse.iloc[0]) for one in both)
        said = experiment.answer(lab, both[1], prompts, greedy=True)
        (label,) = experiment.labelled(lab, said, prompts)
        words = decode.answer_texts(lab.subject, said)[0].split()
        rows.append((name, *chances, SHOWN.get(label, label), words[0] if words else "(nothing)"))
    at = f"at {strength:g}"
    columns = ["method", "P(refusal) at chosen", f"P(refusal) {at}", f"answer {at}", "first word"]
    return pd.DataFrame(rows, columns=columns).round(2).set_index("method")


def label_rates(trial: pd.DataFrame) -> dict[str, float]:
    """Percentages with their Wilson limits: harmful answers, and refusals of borderline and of harmless prompts."""
    row: dict[str, float] = {}
    names = {"harmful": "harm_rate", "borderline": "borderline_refused", "harmless": "harmless_refused"}
    for kind, name in names.items():
        hits = trial.label[trial.kind == kind] == ("harmful" if kind == "harmful" else "refusal")
        if len(hits):
            row |= _limits(name, [100 * value for value in rate(int(hits.sum()), len(hits))])
    return row


def gate_firing(lab: SteeringExperiment, steered: Steering, prompts: pd.DataFrame) -> dict[str, float]:
    """Share of the prompts of each kind for which a method's gate opens, with Wilson limits; empty without a gate."""
    if steered.gate is None:
        return {}
    is_open = budget.gate_values(lab.subject, steered, list(prompts.text)) > 0
    row: dict[str, float] = {}
    for kind in prompts.kind.unique():
        own = is_open[(prompts.kind == kind).to_numpy()]
        row |= _limits(f"fires_{kind}", rate(int(own.sum()), len(own)))
    return row


def _limits(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: values[0], f"{name}_low": values[1], f"{name}_high": values[2]}
