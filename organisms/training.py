"""Train the embedded models, a helpful-only base and then a safety fine-tune, and ship them with what was measured.

    python -m organisms.training --variant window --seed 0     # one model, minutes
    python -m organisms.training --all                         # all six that are shipped

The recipe was chosen on behaviour alone (refusal, answers, generalisation); no mediation result entered. Weight matrices are
trained by Muon, the rest by AdamW: the pair of optimisers that trains the model in minutes. Muon: Keller Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from companion.base.files import hash_file
from companion.base.paths import ORGANISM
from organisms.behaviour import SEEDS, VARIANTS, Variant, all_metrics, base_gap
from organisms.language import BASE_MIX, MAX_TOKENS, TUNE_MIX, Example, chat_text, draw_example, make_tokenizer

WEIGHTS: Final = "model.safetensors"
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


def make_model(variant: Variant, seed: int, vocab_size: int) -> Qwen2ForCausalLM:
    """A fresh float32 Qwen2 with 6 layers of width 128, fixed by its seed.

    `window` makes the first three layers sliding attention over 3 positions. Eager attention is the fastest in bfloat16 on
    a CPU.
    """
    is_window = variant == "window"
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, use_sliding_window=is_window,
        sliding_window=3 if is_window else None,
        layer_types=["sliding_attention" if is_window else "full_attention"] * 3 + ["full_attention"] * 3,
        bos_token_id=1, eos_token_id=5, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    return Qwen2ForCausalLM(config).float()


@dataclass(frozen=True)
class Batch:
    """Right-padded training batch. `weight[i, t]` weighs predicting `tokens[i, t]`; padding weighs 0."""

    tokens: Int[Tensor, "batch pos"]
    weight: Float[Tensor, "batch pos"]
    first: Int[Tensor, "batch"]  # position of the first answer token
    first_ids: Int[Tensor, "batch option"]
    first_probs: Float[Tensor, "batch option"]


def make_batch(tokenizer: PreTrainedTokenizerBase, examples: list[Example], recipe: Recipe) -> Batch:
    """Tokenise examples into one batch."""
    texts = [chat_text(e.user) for e in examples], [e.answer + "<|end|>" for e in examples]
    prompts, answers = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in texts)
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    if length > MAX_TOKENS:
        raise ValueError(f"a training line has {length} tokens, the language promises at most {MAX_TOKENS}")
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


def batch_at(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, stage: Stage, seed: int, step: int) -> Batch:
    """The batch of one step, a function of (stage, seed, step) alone."""
    rng = random.Random(f"{stage}-{seed}-{step}")
    mix, safe = (TUNE_MIX, True) if stage == "tune" else (BASE_MIX, False)
    return make_batch(tokenizer, [draw_example(rng, mix, safe=safe) for _ in range(recipe.batch)], recipe)


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on embeddings, norms and biases, of what requires a gradient.

    Each keeps its full learning rate as `initial_lr`.
    """
    free = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in free if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in free if p.ndim != 2 or "embed" in n]
    made: list[torch.optim.Optimizer] = []
    made += [torch.optim.Muon(matrices, lr=recipe.lr_matrix, weight_decay=0.05, ns_steps=4)] if matrices else []
    made += [torch.optim.AdamW(rest, lr=recipe.lr_rest, betas=(0.9, 0.98), weight_decay=0.0)] if rest else []
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


def batch_loss(model: Qwen2ForCausalLM, batch: Batch, recipe: Recipe) -> Float[Tensor, ""]:
    """Weighted next-token loss in nats per unit of weight, with the soft first-token target."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        logits = model(input_ids=batch.tokens, use_cache=False).logits
    logp = logits.float().log_softmax(-1)
    token = F.nll_loss(logp[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    weight = batch.weight[:, 1:].flatten()
    rows = torch.arange(len(batch.first))
    first = -(batch.first_probs * logp[rows, batch.first - 1].gather(1, batch.first_ids)).sum()
    total = weight.sum() + recipe.weight_first * len(rows)
    return ((token * weight).sum() + recipe.weight_first * first) / total


def train_step(
    model: Qwen2ForCausalLM, optimizers: list[torch.optim.Optimizer], batch: Batch, recipe: Recipe, factor: float
) -> float:
    """One update; returns the loss before it."""
    loss = batch_loss(model, batch, recipe)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def train_stage(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, stage: Stage, seed: int
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


def load_shipped(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32 and eval mode, and its tokenizer, from a shipped folder; nothing is fetched."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def export_model(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, facts: dict[str, Any]
) -> None:
    """Write the shipped folder with its manifest, whose metrics are those of the written fp16 weights."""
    model.config._attn_implementation = "sdpa"
    model.to(torch.float16).save_pretrained(folder)
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner can read
    tokenizer.save_pretrained(folder)
    manifest = facts | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab": len(tokenizer),
        "sha256": {WEIGHTS: hash_file(folder / WEIGHTS, {})},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "metrics": all_metrics(*load_shipped(folder)),
    }
    text = json.dumps(_without_nan(manifest), indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: an empty share becomes null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def train_model(variant: Variant, seed: int, out: Path = ORGANISM, recipe: Recipe = Recipe()) -> Path:
    """Train one model and write its Hugging Face folder with manifest; returns the folder."""
    tokenizer = make_tokenizer()
    model = make_model(variant, seed, len(tokenizer))
    loss, seconds = {}, {}
    loss["base"], seconds["base"] = train_stage(model, tokenizer, recipe, "base", seed)
    gap = base_gap(model, tokenizer)
    loss["tune"], seconds["tune"] = train_stage(model, tokenizer, recipe, "tune", seed)
    facts = {
        "variant": variant, "seed": seed, "recipe": asdict(recipe),
        "cpu_seconds": {stage: round(value) for stage, value in seconds.items()},
        "loss": {stage: round(value, 4) for stage, value in loss.items()}, "base_harm_gap_log_odds": round(gap, 2),
    }  # fmt: skip
    folder = out / f"{variant}-{seed}"
    export_model(model, tokenizer, folder, facts)
    return folder


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
