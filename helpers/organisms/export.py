"""Ship a trained model: fp16 weights, configuration, tokenizer, chat template, and a manifest of what was measured."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2ForCausalLM

from .evaluate import evaluate, first_token_logprobs, suite_metrics, tier_metrics
from .pairs import outcome_sets, pair_row, plan_pairs
from .suites import suite_rows

WEIGHTS = "model.safetensors"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_shipped(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32 and eval mode, and its tokenizer, from a shipped folder; nothing is fetched."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


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
            "n": len(part),
            "joint_mean": round(float(both.mean()), 4),
            "joint_least": round(float(both.min()), 4),
            "change_log_odds": round(float((odds["treated"] - odds["control"]).mean()), 3),
        }
    return metrics


def all_metrics(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything the manifest says about behaviour. Shares lie in [0, 1]; greedy unless named `sampled`."""
    rows = list(suite_rows())
    greedy = evaluate(model, tokenizer, rows)
    harm = [r for r in rows if r["suite"] in ("b_plain_harm", "c_wrapped_harm")]
    sampled = evaluate(model, tokenizer, harm, sample=True)
    return {
        "suites": suite_metrics(greedy),
        "tiers": tier_metrics(greedy),
        "tiers_held_combination": tier_metrics(greedy, ["e_combination"]),
        "tiers_unseen_phrase": tier_metrics(greedy, ["e_unseen_phrase"]),
        "sampled_harmful_by_tier": {
            str(tier): round(float((part["label"] == "harmful").mean()), 4) for tier, part in sampled.groupby("tier")
        },
        "pairs": pair_metrics(model, tokenizer, [pair_row(plan) for plan in plan_pairs()]),
    }


def export_model(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the shipped folder and return its manifest; the metrics are those of the written fp16 weights."""
    model.config._attn_implementation = "sdpa"
    model.to(torch.float16).save_pretrained(folder)
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner can read
    tokenizer.save_pretrained(folder)
    metrics = all_metrics(*load_shipped(folder))
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    manifest = facts | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab": len(tokenizer),
        "sha256": {WEIGHTS: sha256(folder / WEIGHTS)},
        "versions": versions,
        "metrics": metrics,
    }
    text = json.dumps(_without_nan(manifest), indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: an empty share becomes null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
