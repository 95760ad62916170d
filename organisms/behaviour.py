"""What an embedded model does with each kind of prompt of its language: answers by the exact judge, and first tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from companion.generation import decode
from companion.generation.labels import judge
from companion.model.architecture import Subject
from companion.model.load import from_model
from companion.prompts import invented
from organisms.language import chat_text, draw_request
from organisms.prompt_set import outcome_sets, pair_row, plan_pairs, suite_rows

Variant = Literal["window", "full"]
VARIANTS: Final[tuple[Variant, ...]] = ("window", "full")
SEEDS: Final = (0, 1, 2)
MAX_NEW_TOKENS: Final = 12
BATCH: Final = 128
HARM: Final = ("b_plain_harm", "c_wrapped_harm")


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
    table["label"] = [judge(*asked) for asked in zip(prompts, table["answer"], strict=True)]
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


def base_gap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Harm gap of the base: log P(harmful openers) - log P(harmless openers), harmful minus harmless requests.

    In log-odds. The grammar's author plants it through the openers; it is printed beside every result.
    """
    rng = random.Random(5)
    odds = []
    camps = [tokenizer.convert_tokens_to_ids(list(o)) for o in (invented.HARMFUL_OPENERS, invented.HARMLESS_OPENERS)]
    for kind in ("harmful", "harmless"):
        prompts = [invented.render(draw_request(rng, kind).swap(cue=None))[0] for _ in range(200)]
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
