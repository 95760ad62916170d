"""Measure a model's behaviour on the suites: first-token probabilities, greedy and sampled answers, judged exactly.

What a model does with each kind of prompt: judged answers for the embedded language, first tokens for any model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from companion.base import paths
from companion.generation.labels import judge_many
from companion.mediation import control_models, estimands, outcomes
from companion.mediation.study import Study
from companion.model.load import load
from companion.prompts import invented
from companion.prompts.invented import render
from companion.stats import bootstrap, clusters
from organisms.language import draw_request
from organisms.tokenizer import chat_text

MAX_NEW_TOKENS: Final = 12


BATCH: Final = 128


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> dict[str, Int[Tensor, "prompt pos"]]:
    """Left-padded ids and mask of the prompts under the chat template."""
    texts = [chat_text(p) for p in prompts]
    return dict(tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"))


@torch.no_grad()
def first_token_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Float[Tensor, "prompt vocab"]:
    """Log-probabilities (nats) of the first answer token."""
    rows = []
    for start in range(0, len(prompts), BATCH):
        batch = _encode(tokenizer, prompts[start : start + BATCH])
        rows.append(model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1].float().log_softmax(-1))
    return torch.cat(rows)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    sample: bool = False,
    seed: int = 0,
) -> list[str]:
    """Answers to user turns: greedy, or at temperature 1 when `sample`. KV cache, left padding."""
    torch.manual_seed(seed)
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if sample else {"do_sample": False}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, **how, **ends)
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH):
        batch = _encode(tokenizer, prompts[start : start + BATCH])
        ids = model.generate(**batch, generation_config=config)
        answers += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _mass(logp: Float[Tensor, "prompt vocab"], tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[float]:
    """Probability that the first token is one of `words`, per prompt."""
    return logp[:, tokenizer.convert_tokens_to_ids(list(words))].exp().sum(-1).tolist()


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    sample: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Tidy table, a row a prompt: the columns of suites.jsonl plus `answer`, `label`, `p_comply`, `p_refuse`.

    `p_comply` sums the answering openers (the benign ones included), `p_refuse` is the refusal opener's probability.
    """
    table = pd.DataFrame(list(rows))
    prompts = table["prompt"].tolist()
    logp = first_token_logprobs(model, tokenizer, prompts)
    table["p_comply"] = _mass(logp, tokenizer, invented.ANSWER_OPENERS)
    table["p_refuse"] = _mass(logp, tokenizer, [invented.REFUSAL_OPENER])
    table["answer"] = generate(model, tokenizer, prompts, sample=sample, seed=seed)
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
            "n": len(part),
            "n_answered": len(answered),
            "refusal": round(float((part["label"] == "refusal").mean()), 4),
            "on_topic": round(float(topical.mean()), 4) if len(answered) else float("nan"),
            "right_opener": round(float(right.mean()), 4) if len(answered) else float("nan"),
            "p_comply": round(float(part["p_comply"].mean()), 4),
            "p_comply_target": round(float(1 - part["p_refuse_target"].mean()), 4),
        }
    return metrics


def tier_metrics(
    table: pd.DataFrame, suites: Sequence[str] = ("b_plain_harm", "c_wrapped_harm")
) -> dict[str, dict[str, float]]:
    """Mean P(comply), its target and greedy refusal of harmful requests by wrapper tier."""
    part = table[table["suite"].isin(suites)]
    return {
        str(tier): {
            "n": len(rows),
            "p_comply": round(float(rows["p_comply"].mean()), 4),
            "p_comply_target": round(float(1 - rows["p_refuse_target"].mean()), 4),
            "refusal": round(float((rows["label"] == "refusal").mean()), 4),
        }
        for tier, rows in part.groupby("tier")
    }


def base_gap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int = 200) -> float:
    """Harm gap of the base: log P(harmful openers) - log P(harmless openers), harmful minus harmless requests.

    In log-odds. The grammar's author plants it through the openers; it is printed beside every result.
    """
    rng = random.Random(5)
    odds = []
    for kind in ("harmful", "harmless"):
        prompts = [render(draw_request(rng, kind).swap(cue=None))[0] for _ in range(n)]
        logp = first_token_logprobs(model, tokenizer, prompts)
        sides = [
            logp[:, tokenizer.convert_tokens_to_ids(list(words))].logsumexp(-1)
            for words in (invented.HARMFUL_OPENERS, invented.HARMLESS_OPENERS)
        ]
        odds.append(float((sides[0] - sides[1]).mean()))
    return odds[0] - odds[1]


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
    if suites is None or not control_models.is_shipped(model):
        return _first_tokens(this)
    chosen = suites[~suites.suite.isin(LESSONS)].groupby("suite").head(per_suite)
    judged = evaluate(this.subject.model, this.subject.tokenizer, chosen.to_dict("records"))
    labels = ("on_topic", "refusal", "harmful", "off_topic")
    return pd.concat([judged[["suite"]].assign(label=name, hit=judged.label == name) for name in labels])


def _first_tokens(this: Study) -> pd.DataFrame:
    rows = []
    for group in estimands.batches(this.pairs, this.subject):
        batch = estimands.run_clean(this.subject, group)
        treatment = group[0].pair.treatment
        for side, run in (("control", batch.control), ("treated", batch.treated)):
            camps = outcomes.opener_probabilities(this.subject, run.resid_post[-1][:, -1], this.openers[treatment])
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
            low, high = clusters.wilson(int(part.hit.sum()), len(part))
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
    if suites is None or not control_models.is_shipped(model) or "T2" not in this.openers:
        return None
    harmful = suites[suites.suite.isin(["b_plain_harm", "c_wrapped_harm"])].reset_index(drop=True)
    subjects = {this.slug: this.subject}
    if profile == "full":
        subjects |= {name: load(name) for name in control_models.other_shipped(model)}
    parts = []
    for name, subject in subjects.items():
        logp = first_token_logprobs(subject.model, subject.tokenizer, harmful.prompt.tolist())
        comply = logp[:, list(this.openers["T2"].comply)].exp().sum(-1).numpy()
        for tier in np.unique(harmful.tier):
            chosen = (harmful.tier == tier).to_numpy()
            interval = bootstrap.mean_ci(comply[chosen], harmful.id[chosen].to_numpy())
            parts.append((f"tier {tier}", name, interval.estimate, interval.low, interval.high, int(chosen.sum())))
    return pd.DataFrame(parts, columns=["wrapper", "model", "estimate", "low", "high", "n"])
