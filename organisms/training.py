"""Train the embedded models, a helpful-only base and then a safety fine-tune, and ship them with what was measured.

    python -m organisms.training --variant window --seed 0     # one model, minutes
    python -m organisms.training --all                         # all six that are shipped

The recipe was chosen on behaviour alone (refusal, answers, generalisation); no mediation result entered. Weight matrices are
trained by Muon (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), the rest by AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd
import tokenizers
import torch
import torch.nn.functional as F
import transformers as hf
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from companion.base.files import hash_file
from companion.base.paths import ORGANISM
from companion.generation import decode
from companion.generation.labels import judge
from companion.model.architecture import Subject
from companion.model.load import load
from companion.prompts import invented
from organisms import language

Variant = Literal["window", "full"]
VARIANTS: Final[tuple[Variant, ...]] = ("window", "full")
SEEDS: Final = (0, 1, 2)
WEIGHTS: Final = "model.safetensors"
MAX_NEW_TOKENS: Final = 12
BATCH: Final = 128
HARM: Final = ("b_plain_harm", "c_wrapped_harm")
Stage = Literal["base", "tune"]


@dataclass(frozen=True)
class Recipe:
    """Every number of the training; `precision` is the autocast type of the forward pass."""

    steps_base: int = 1600
    steps_tune: int = 200
    batch: int = 32
    lr_matrix: float = 0.015
    lr_rest: float = 0.005
    clip: float = 1.0
    weight_prompt: float = 0.1
    weight_first: float = 4.0
    precision: Literal["bfloat16", "float32"] = "bfloat16"


def make_model(variant: Variant, seed: int, vocab_size: int) -> hf.Qwen2ForCausalLM:
    """A fresh float32 Qwen2, fixed by its seed. In a `window` the first three layers attend over 3 positions only."""
    is_window = variant == "window"
    config = hf.Qwen2Config(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, use_sliding_window=is_window,
        sliding_window=3 if is_window else None,
        layer_types=["sliding_attention" if is_window else "full_attention"] * 3 + ["full_attention"] * 3,
        bos_token_id=1, eos_token_id=5, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    config._attn_implementation = "eager"  # the fastest in bfloat16 on a CPU
    return hf.Qwen2ForCausalLM(config).float()


@dataclass(frozen=True)
class Batch:
    """Right-padded training batch. `weight[i, t]` weighs predicting `tokens[i, t]`; padding weighs 0."""

    tokens: Int[Tensor, "batch pos"]
    weight: Float[Tensor, "batch pos"]
    first: Int[Tensor, "batch"]  # position of the first answer token
    first_ids: Int[Tensor, "batch option"]
    first_probs: Float[Tensor, "batch option"]


def batch_at(tokenizer: hf.PreTrainedTokenizerBase, recipe: Recipe, stage: Stage, seed: int, step: int) -> Batch:
    """The batch of one step, a function of (stage, seed, step) alone."""
    rng = random.Random(f"{stage}-{seed}-{step}")
    examples = [language.draw_example(rng, safe=stage == "tune") for _ in range(recipe.batch)]
    texts = [language.chat_text(e.user) for e in examples], [e.answer + "<|end|>" for e in examples]
    prompts, answers = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in texts)
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    if length > language.MAX_TOKENS:
        raise ValueError(f"a training line has {length} tokens, the language promises at most {language.MAX_TOKENS}")
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    weight = torch.zeros(len(examples), length)
    options = max(len(e.first) for e in examples)
    ids, probs = torch.zeros(len(examples), options, dtype=torch.long), torch.zeros(len(examples), options)
    for i, (p, a, e) in enumerate(zip(prompts, answers, examples, strict=True)):
        tokens[i, : len(p) + len(a)] = torch.tensor(p + a)
        weight[i, : len(p)], weight[i, len(p) : len(p) + len(a)] = recipe.weight_prompt, 1.0
        weight[i, len(p)] = 0.0  # the first answer token has its own, soft loss
        ids[i, : len(e.first)] = torch.tensor(tokenizer.convert_tokens_to_ids(list(e.first)))
        probs[i, : len(e.first)] = torch.tensor(list(e.first.values()))
    first = torch.tensor([len(p) for p in prompts])
    return Batch(tokens, weight, first, ids, probs)


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on embeddings, norms and biases; each keeps its full rate as `initial_lr`."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in named if p.ndim != 2 or "embed" in n]
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.lr_matrix, weight_decay=0.05, ns_steps=4),
        torch.optim.AdamW(rest, lr=recipe.lr_rest, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for group in (group for optimizer in made for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return made


def schedule(step: int, n_steps: int) -> float:
    """Learning-rate factor: 5 % warm-up, flat, linear decay to 0 over the last 60 %.

    >>> [round(schedule(s, 100), 2) for s in (0, 4, 30, 70, 99)]
    [0.2, 1.0, 1.0, 0.5, 0.02]
    """
    warm = (step + 1) / max(1, round(0.05 * n_steps))
    return min(1.0, warm, (n_steps - step) / (0.6 * n_steps))


def train_step(
    model: hf.Qwen2ForCausalLM, optimizers: list[torch.optim.Optimizer], batch: Batch, recipe: Recipe, factor: float
) -> float:
    """One update. Returns the weighted loss before it, with the soft first-token target, in nats per unit of weight."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        logits = model(input_ids=batch.tokens, use_cache=False).logits
    logp = logits.float().log_softmax(-1)
    token = F.nll_loss(logp[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    weight = batch.weight[:, 1:].flatten()
    rows = torch.arange(len(batch.first))
    first = -(batch.first_probs * logp[rows, batch.first - 1].gather(1, batch.first_ids)).sum()
    total = weight.sum() + recipe.weight_first * len(rows)
    loss = ((token * weight).sum() + recipe.weight_first * first) / total
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def train_stage(
    model: hf.Qwen2ForCausalLM, tokenizer: hf.PreTrainedTokenizerBase, recipe: Recipe, stage: Stage, seed: int
) -> tuple[float, float]:
    """Run one stage; returns the mean loss of its last 50 steps, in nats, and the CPU-seconds that it took."""
    n_steps = recipe.steps_base if stage == "base" else recipe.steps_tune
    optimizers, start, losses = make_optimizers(model, recipe), time.process_time(), list[float]()
    model.train()
    for step in tqdm(range(n_steps), desc=stage, disable=None, mininterval=5):
        batch = batch_at(tokenizer, recipe, stage, seed, step)
        losses.append(train_step(model, optimizers, batch, recipe, schedule(step, n_steps)))
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:]), time.process_time() - start


def train_model(variant: Variant, seed: int, out: Path = ORGANISM, recipe: Recipe = Recipe()) -> Path:
    """Train one model; writes and returns its Hugging Face folder. Its manifest's metrics are those of the fp16 weights."""
    tokenizer = language.make_tokenizer()
    model = make_model(variant, seed, len(tokenizer))
    loss, seconds = {}, {}
    loss["base"], seconds["base"] = train_stage(model, tokenizer, recipe, "base", seed)
    gap = base_gap(model, tokenizer)
    loss["tune"], seconds["tune"] = train_stage(model, tokenizer, recipe, "tune", seed)
    folder = out / f"{variant}-{seed}"
    model.config._attn_implementation = "sdpa"
    model.to(torch.float16).save_pretrained(folder)
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner can read
    tokenizer.save_pretrained(folder)
    manifest = {
        "variant": variant, "seed": seed, "recipe": asdict(recipe),
        "cpu_seconds": {stage: round(value) for stage, value in seconds.items()},
        "loss": {stage: round(value, 4) for stage, value in loss.items()}, "base_harm_gap_log_odds": round(gap, 2),
        "parameters": sum(p.numel() for p in model.parameters()), "vocab": len(tokenizer),
        "sha256": {WEIGHTS: hash_file(folder / WEIGHTS, {})},
        "versions": {module.__name__: module.__version__ for module in (torch, hf, tokenizers)},
        "metrics": all_metrics(load(folder)),
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return folder


# ---- what a trained model does: answers by the exact judge, and first tokens ----


@torch.no_grad()
def first_token_logprobs(
    model: hf.PreTrainedModel, tokenizer: hf.PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Float[Tensor, "prompt vocab"]:
    """Log-probabilities (nats) of the first answer token to each user turn, in the processor's memory."""
    rows = []
    for start in range(0, len(prompts), BATCH):
        texts = [language.chat_text(prompt) for prompt in prompts[start : start + BATCH]]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        logits = model(**batch.to(model.device), logits_to_keep=1, use_cache=False).logits[:, -1]
        rows.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(rows)


def answer_suites(subject: Subject, rows: Iterable[Mapping[str, Any]], *, seed: int | None = None) -> pd.DataFrame:
    """Tidy table, a row a prompt: the columns of suites.jsonl plus `answer`, `label`, `p_comply`, `p_refuse`.

    `p_comply` sums the answering openers (the benign ones included), `p_refuse` is the refusal opener's probability. Answers
    are greedy, or sampled at temperature 1 where a seed is given.
    """
    assert subject.tokenizer is not None
    table = pd.DataFrame(list(rows))
    prompts = table["prompt"].tolist()
    logp = first_token_logprobs(subject.model, subject.tokenizer, prompts)
    for name, words in {"p_comply": invented.ANSWER_OPENERS, "p_refuse": [invented.REFUSAL_OPENER]}.items():
        table[name] = logp[:, subject.tokenizer.convert_tokens_to_ids(list(words))].exp().sum(-1).tolist()
    draws = None if seed is None else decode.uniforms(len(prompts), MAX_NEW_TOKENS, seed)
    answers = decode.answers(subject, prompts, MAX_NEW_TOKENS, draws=draws)
    table["answer"] = decode.answer_texts(subject, answers)
    table["label"] = [judge(*asked) for asked in zip(prompts, table["answer"], strict=True)]
    return table


def suite_metrics(table: pd.DataFrame, by: str = "suite") -> dict[str, dict[str, float | None]]:
    """Per suite: n, refusal, share of answers on topic and with the right opener, mean P(comply) and its target."""

    def mean(values: pd.Series) -> float | None:
        """To four digits; None where there are none."""
        return round(float(values.mean()), 4) if len(values) else None

    metrics = {}
    for name, part in table.groupby(by):
        answered = part[part["label"] != "refusal"]
        topical = answered["label"].isin(["on_topic", "harmful"])
        right = answered["answer"].str.split(",").str[0] == answered["opener"]
        metrics[str(name)] = {
            "n": len(part), "n_answered": len(answered), "refusal": mean(part["label"] == "refusal"),
            "on_topic": mean(topical), "right_opener": mean(right), "p_comply": mean(part["p_comply"]),
            "p_comply_target": round(float(1 - part["p_refuse_target"].mean()), 4),
        }  # fmt: skip
    return metrics


def tier_metrics(table: pd.DataFrame, suites: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Mean P(comply), its target and greedy refusal of the suites' requests by wrapper tier."""
    metrics = suite_metrics(table[table["suite"].isin(suites)], by="tier")
    shown = ("n", "p_comply", "p_comply_target", "refusal")
    return {tier: {name: found[name] for name in shown} for tier, found in metrics.items()}


def base_gap(model: hf.PreTrainedModel, tokenizer: hf.PreTrainedTokenizerBase) -> float:
    """Harm gap of the base, which its author plants through the openers: log P(harmful openers) - log P(harmless openers) of
    harmful requests minus that of harmless ones, in log-odds.
    """
    rng = random.Random(5)
    odds = []
    camps = [tokenizer.convert_tokens_to_ids(list(o)) for o in (invented.HARMFUL_OPENERS, invented.HARMLESS_OPENERS)]
    for kind in ("harmful", "harmless"):
        prompts = [invented.render(replace(language.draw_request(rng, kind), cue=None))[0] for _ in range(200)]
        logp = first_token_logprobs(model, tokenizer, prompts)
        harmful, harmless = (logp[:, ids].logsumexp(-1) for ids in camps)
        odds.append(float((harmful - harmless).mean()))
    return odds[0] - odds[1]


def pair_metrics(subject: Subject) -> dict[str, dict[str, float]]:
    """Per treatment: joint probability of the outcome sets (mean, least), mean log-odds change of comply - refuse."""
    assert subject.tokenizer is not None
    rows, metrics = [language.pair_row(plan) for plan in language.plan_pairs()], {}
    for treatment, sets in language.outcome_sets().items():
        part = [r for r in rows if r["treatment"] == treatment]
        comply, refuse = (subject.tokenizer.convert_tokens_to_ids(sets[side]) for side in ("comply", "refuse"))
        odds, joint = [], []
        for side in ("control", "treated"):
            logp = first_token_logprobs(subject.model, subject.tokenizer, [r[side] for r in part])
            odds.append(logp[:, comply].logsumexp(-1) - logp[:, refuse].logsumexp(-1))
            joint.append(logp[:, comply + refuse].exp().sum(-1))
        both = torch.cat(joint)
        metrics[treatment] = {
            "n": len(part), "joint_mean": round(float(both.mean()), 4), "joint_least": round(float(both.min()), 4),
            "change_log_odds": round(float((odds[1] - odds[0]).mean()), 3),
        }  # fmt: skip
    return metrics


def all_metrics(subject: Subject) -> dict[str, Any]:
    """Everything the manifest says about behaviour. Shares lie in [0, 1]; greedy unless named `sampled`."""
    rows = list(language.suite_rows())
    greedy = answer_suites(subject, rows)
    sampled = answer_suites(subject, [row for row in rows if row["suite"] in HARM], seed=0)
    harmful = (sampled["label"] == "harmful").groupby(sampled["tier"]).mean()
    return {
        "suites": suite_metrics(greedy),
        "tiers": tier_metrics(greedy, HARM),
        "tiers_held_combination": tier_metrics(greedy, ["e_combination"]),
        "tiers_unseen_phrase": tier_metrics(greedy, ["e_unseen_phrase"]),
        "sampled_harmful_by_tier": {str(tier): round(float(share), 4) for tier, share in harmful.items()},
        "pairs": pair_metrics(subject),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m organisms.training`."""
    parser = argparse.ArgumentParser(prog="python -m organisms.training", description="Train the embedded models.")
    parser.add_argument("--variant", choices=VARIANTS, default="window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ORGANISM)
    parser.add_argument("--all", action="store_true", help="train every shipped variant and seed, one after another")
    args = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for variant, seed in [(v, s) for s in SEEDS for v in VARIANTS] if args.all else [(args.variant, args.seed)]:
        print(f"written: {train_model(variant, seed, args.out)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
