"""What a model does with each kind of prompt: judged answers for the embedded language, first tokens for any model."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from helpers import bootstrap, mediation, outcomes, paths, relatives, stats
from helpers.organisms.evaluate import evaluate, first_token_logprobs
from helpers.study import Study
from helpers.subject import load

PER_SUITE = 60
LESSONS = ("f_say_no", "f_unanswerable")


def suite_prompts(prompt_set: str) -> pd.DataFrame | None:
    """The behaviour suites of a prompt set (`suites.jsonl`), or None where it has none."""
    path = paths.PROMPTS / prompt_set / "suites.jsonl"
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return pd.DataFrame(rows)


def answers(this: Study, model: str, prompt_set: str, per_suite: int = PER_SUITE) -> pd.DataFrame:
    """One row a prompt and label: `suite`, `label`, `hit` (how far the label applies, 0 to 1).

    Embedded models answer the first `per_suite` prompts of each suite greedily, and the exact judge labels them. For any
    other model `hit` is the probability that the first token complies or refuses, on the prompts of the pairs.
    """
    suites = suite_prompts(prompt_set)
    if suites is None or not relatives.is_shipped(model):
        return _first_tokens(this)
    chosen = suites[~suites.suite.isin(LESSONS)].groupby("suite").head(per_suite)
    judged = evaluate(this.subject.model, this.subject.tokenizer, chosen.to_dict("records"))
    labels = ("on_topic", "refusal", "harmful", "off_topic")
    return pd.concat([judged[["suite"]].assign(label=name, hit=judged.label == name) for name in labels])


def _first_tokens(this: Study) -> pd.DataFrame:
    rows = []
    for group in mediation.batches(this.pairs, this.subject):
        batch = mediation.run_clean(this.subject, group)
        treatment = group[0].pair.treatment
        for side, run in (("control", batch.control), ("treated", batch.treated)):
            camps = outcomes.camp_probabilities(this.subject, run.resid_post[-1][:, -1], this.openers[treatment])
            for label, values in zip(("complies", "refuses"), camps, strict=True):
                topics = [p.pair.topic for p in group]
                suite = f"{treatment}, {side}"
                rows.append(pd.DataFrame({"suite": suite, "label": label, "hit": values.tolist(), "topic": topics}))
    return pd.concat(rows, ignore_index=True)


def rates(table: pd.DataFrame) -> pd.DataFrame:
    """Share of each label by suite: Wilson intervals for judged answers, topic bootstrap for probabilities."""
    rows = []
    for (suite, label), part in table.groupby(["suite", "label"], sort=False):
        if part.hit.dtype == bool:
            low, high = stats.wilson(int(part.hit.sum()), len(part))
            estimate = part.hit.mean()
        else:
            interval = bootstrap.mean_ci(part.hit.to_numpy(), part.topic.to_numpy())
            estimate, low, high = interval.estimate, interval.low, interval.high
        rows.append((suite, label, estimate, low, high, len(part)))
    return pd.DataFrame(rows, columns=["suite", "label", "estimate", "low", "high", "n"]).sort_values(
        ["suite", "label"]
    )


def wrapper_strength(this: Study, model: str, profile: str) -> pd.DataFrame | None:
    """Mean P(comply) on harmful requests by wrapper tier, for the model and its shipped relatives; None for others.

    Intervals resample prompts (each has its own request).
    """
    suites = suite_prompts("embedded")
    if suites is None or not relatives.is_shipped(model) or "T2" not in this.openers:
        return None
    harmful = suites[suites.suite.isin(["b_plain_harm", "c_wrapped_harm"])].reset_index(drop=True)
    subjects = {this.slug: this.subject}
    if profile == "full":
        subjects |= {name: load(name) for name in relatives.relatives(model)}
    parts = []
    for name, subject in subjects.items():
        logp = first_token_logprobs(subject.model, subject.tokenizer, harmful.prompt.tolist())
        comply = logp[:, list(this.openers["T2"].comply)].exp().sum(-1).numpy()
        for tier in np.unique(harmful.tier):
            chosen = (harmful.tier == tier).to_numpy()
            interval = bootstrap.mean_ci(comply[chosen], harmful.id[chosen].to_numpy())
            parts.append((f"tier {tier}", name, interval.estimate, interval.low, interval.high, int(chosen.sum())))
    return pd.DataFrame(parts, columns=["wrapper", "model", "estimate", "low", "high", "n"])
