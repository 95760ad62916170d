"""What a model does with each kind of prompt: judged answers for the embedded language, first tokens for any model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from companion.base.device import to_host
from companion.base.paths import PROMPTS
from companion.generation import decode
from companion.generation.labels import judge_many
from companion.mediation import estimands, outcomes
from companion.mediation.study import Study, is_shipped, other_shipped
from companion.model.architecture import Subject
from companion.model.load import from_model, load
from companion.prompts import invented
from companion.stats import clusters
from companion.stats.rates import mean_change
from organisms.language import chat_text, draw_request
from organisms.prompt_set import outcome_sets, pair_row, plan_pairs, suite_rows

Variant = Literal["window", "full"]
VARIANTS: Final[tuple[Variant, ...]] = ("window", "full")
SEEDS: Final = (0, 1, 2)
MAX_NEW_TOKENS: Final = 12
BATCH: Final = 128
PER_SUITE: Final = 60
LESSONS: Final = ("f_say_no", "f_unanswerable")
HARM: Final = ("b_plain_harm", "c_wrapped_harm")
LABELS: Final = ("on_topic", "refusal", "harmful", "off_topic")


@torch.no_grad()
def first_token_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Float[Tensor, "prompt vocab"]:
    """Log-probabilities (nats) of the first answer token to each user turn, in the processor's memory."""
    rows = []
    for start in range(0, len(prompts), BATCH):
        texts = [chat_text(prompt) for prompt in prompts[start : start + BATCH]]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        logits = model(**batch.to(model.device), logits_to_keep=1, use_cache=False).logits[:, -1]
        rows.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(rows)


def generate(subject: Subject, prompts: Sequence[str], *, seed: int | None = None) -> list[str]:
    """Answers to user turns: greedy, or sampled at temperature 1 where a seed is given."""
    draws = None if seed is None else decode.uniforms(len(prompts), MAX_NEW_TOKENS, seed)
    return decode.answer_texts(subject, decode.answers(subject, prompts, MAX_NEW_TOKENS, draws=draws))


def answer_suites(subject: Subject, rows: Iterable[Mapping[str, Any]], *, seed: int | None = None) -> pd.DataFrame:
    """Tidy table, a row a prompt: the columns of suites.jsonl plus `answer`, `label`, `p_comply`, `p_refuse`.

    `p_comply` sums the answering openers (the benign ones included), `p_refuse` is the refusal opener's probability. Answers
    are greedy, or sampled where a seed is given.
    """
    assert subject.tokenizer is not None
    table = pd.DataFrame(list(rows))
    prompts = table["prompt"].tolist()
    logp = first_token_logprobs(subject.model, subject.tokenizer, prompts)
    for name, words in {"p_comply": invented.ANSWER_OPENERS, "p_refuse": [invented.REFUSAL_OPENER]}.items():
        table[name] = logp[:, subject.tokenizer.convert_tokens_to_ids(list(words))].exp().sum(-1).tolist()
    table["answer"] = generate(subject, prompts, seed=seed)
    table["label"] = judge_many(prompts, table["answer"])
    return table


def suite_metrics(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Per suite: n, refusal, share of answers on topic and with the right opener, mean P(comply) and its target."""
    metrics = {}
    for suite, part in table.groupby("suite"):
        answered = part[part["label"] != "refusal"]
        topical = answered["label"].isin(["on_topic", "harmful"])
        right = answered["answer"].str.split(",").str[0] == answered["opener"]
        metrics[str(suite)] = {
            "n": len(part), "n_answered": len(answered), "refusal": _mean(part["label"] == "refusal"),
            "on_topic": _mean(topical), "right_opener": _mean(right), "p_comply": _mean(part["p_comply"]),
            "p_comply_target": round(float(1 - part["p_refuse_target"].mean()), 4),
        }  # fmt: skip
    return metrics


def _mean(values: pd.Series) -> float:
    """To four digits; NaN where there are none."""
    return round(float(values.mean()), 4)


def tier_metrics(table: pd.DataFrame, suites: Sequence[str] = HARM) -> dict[str, dict[str, float]]:
    """Mean P(comply), its target and greedy refusal of harmful requests by wrapper tier."""
    return {
        str(tier): {
            "n": len(rows), "p_comply": _mean(rows["p_comply"]),
            "p_comply_target": round(float(1 - rows["p_refuse_target"].mean()), 4),
            "refusal": _mean(rows["label"] == "refusal"),
        }
        for tier, rows in table[table["suite"].isin(suites)].groupby("tier")
    }  # fmt: skip


def base_gap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int = 200) -> float:
    """Harm gap of the base: log P(harmful openers) - log P(harmless openers), harmful minus harmless requests.

    In log-odds. The grammar's author plants it through the openers; it is printed beside every result.
    """
    rng = random.Random(5)
    odds = []
    camps = [tokenizer.convert_tokens_to_ids(list(o)) for o in (invented.HARMFUL_OPENERS, invented.HARMLESS_OPENERS)]
    for kind in ("harmful", "harmless"):
        prompts = [invented.render(draw_request(rng, kind).swap(cue=None))[0] for _ in range(n)]
        logp = first_token_logprobs(model, tokenizer, prompts)
        harmful, harmless = (logp[:, ids].logsumexp(-1) for ids in camps)
        odds.append(float((harmful - harmless).mean()))
    return odds[0] - odds[1]


def pair_metrics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Per treatment: joint probability of the outcome sets (mean, least), mean log-odds change of comply - refuse."""
    metrics = {}
    for treatment, sets in outcome_sets().items():
        part = [r for r in rows if r["treatment"] == treatment]
        comply, refuse = (tokenizer.convert_tokens_to_ids(sets[side]) for side in ("comply", "refuse"))
        odds, joint = {}, []
        for side in ("control", "treated"):
            logp = first_token_logprobs(model, tokenizer, [r[side] for r in part])
            odds[side] = logp[:, comply].logsumexp(-1) - logp[:, refuse].logsumexp(-1)
            joint.append(logp[:, comply + refuse].exp().sum(-1))
        both = torch.cat(joint)
        metrics[treatment] = {
            "n": len(part), "joint_mean": round(float(both.mean()), 4), "joint_least": round(float(both.min()), 4),
            "change_log_odds": round(float((odds["treated"] - odds["control"]).mean()), 3),
        }  # fmt: skip
    return metrics


def all_metrics(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything the manifest says about behaviour. Shares lie in [0, 1]; greedy unless named `sampled`."""
    rows, subject = list(suite_rows()), from_model(model, tokenizer)
    greedy = answer_suites(subject, rows)
    sampled = answer_suites(subject, [row for row in rows if row["suite"] in HARM], seed=0)
    harmful = (sampled["label"] == "harmful").groupby(sampled["tier"]).mean()
    return {
        "suites": suite_metrics(greedy),
        "tiers": tier_metrics(greedy),
        "tiers_held_combination": tier_metrics(greedy, ["e_combination"]),
        "tiers_unseen_phrase": tier_metrics(greedy, ["e_unseen_phrase"]),
        "sampled_harmful_by_tier": {str(tier): round(float(share), 4) for tier, share in harmful.items()},
        "pairs": pair_metrics(model, tokenizer, [pair_row(plan) for plan in plan_pairs()]),
    }


def suite_prompts(prompt_set: str) -> pd.DataFrame | None:
    """The behaviour suites of a prompt set (`suites.jsonl`), or None where it has none."""
    path = PROMPTS / prompt_set / "suites.jsonl"
    if not path.is_file():
        return None
    return pd.DataFrame([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])


def suite_answers(this: Study, model: str, prompt_set: str) -> pd.DataFrame:
    """One row a prompt and label: `suite`, `label`, `hit` (how far the label applies, 0 to 1).

    Embedded models answer the first prompts of each suite greedily, and the exact judge labels them. For any other model
    `hit` is the probability that the first token complies or refuses, on the prompts of the pairs (fewer where each is costly).
    """
    suites = suite_prompts(prompt_set)
    if suites is None or not is_shipped(model):
        return _first_tokens(this.thinned(len(this.pairs)))
    chosen = suites[~suites.suite.isin(LESSONS)].groupby("suite").head(PER_SUITE)
    judged = answer_suites(this.subject, chosen.to_dict("records"))
    return pd.concat([judged[["suite"]].assign(label=name, hit=judged.label == name) for name in LABELS])


def _first_tokens(this: Study) -> pd.DataFrame:
    rows = []
    for group in estimands.batches(this.pairs, this.subject):
        batch = estimands.run_clean(this.subject, group)
        treatment, topics = group[0].pair.treatment, [p.pair.topic for p in group]
        for side, run in (("control", batch.control), ("treated", batch.treated)):
            camps = outcomes.opener_probabilities(this.subject, run.resid_post[-1][:, -1], this.openers[treatment])
            for label, values in zip(("complies", "refuses"), camps, strict=True):
                suite = f"{treatment}, {side}"
                rows.append(pd.DataFrame({"suite": suite, "label": label, "hit": values.tolist(), "topic": topics}))
    return pd.concat(rows, ignore_index=True)


def label_rates(table: pd.DataFrame) -> pd.DataFrame:
    """Share of each label by suite: Wilson intervals for judged answers, topic bootstrap for probabilities."""
    rows = []
    for (suite, label), part in table.groupby(["suite", "label"], sort=False):
        if part.hit.dtype == bool:
            estimate, (low, high) = part.hit.mean(), clusters.wilson(int(part.hit.sum()), len(part))
        else:
            interval = mean_change(part.hit.to_numpy(), part.topic.to_numpy())
            estimate, low, high = interval.estimate, interval.low, interval.high
        rows.append((suite, label, estimate, low, high, len(part)))
    made = pd.DataFrame(rows, columns=["suite", "label", "estimate", "low", "high", "n"])
    return made.sort_values(["suite", "label"])


def wrapper_strength(this: Study, model: str, profile: str) -> pd.DataFrame | None:
    """Mean P(comply) on harmful requests by wrapper tier, for the model and its shipped relatives; None for others.

    Intervals resample prompts (each has its own request).
    """
    suites = suite_prompts("embedded")
    if suites is None or not is_shipped(model) or "T2" not in this.openers:
        return None
    harmful = suites[suites.suite.isin(HARM)].reset_index(drop=True)
    others = other_shipped(model) if profile == "full" else ()
    rows, place = [], str(this.subject.device)
    for name, subject in {this.slug: this.subject, **{name: load(name, device=place) for name in others}}.items():
        logp = first_token_logprobs(subject.model, subject.tokenizer, harmful.prompt.tolist())
        comply = to_host(logp[:, list(this.openers["T2"].comply)].exp().sum(-1))
        for tier in np.unique(harmful.tier):
            chosen = (harmful.tier == tier).to_numpy()
            interval = mean_change(comply[chosen], harmful.id[chosen].to_numpy())
            rows.append((f"tier {tier}", name, interval.estimate, interval.low, interval.high, int(chosen.sum())))
    return pd.DataFrame(rows, columns=["wrapper", "model", "estimate", "low", "high", "n"])
