"""The training recipe in numbers, and the network it trains.

The recipe was chosen on behaviour alone (refusal, answers, generalisation); no mediation result entered.

Training batches: token ids, per-token loss weights, and the soft target of the first answer token.

Muon for the weight matrices, AdamW for the rest: the optimiser pair that trains the organism in minutes.

Muon: Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from organisms.language import BASE_MIX, TUNE_MIX, Example, draw_example
from organisms.tokenizer import chat_text

Variant = Literal["window", "full"]
VARIANTS: Final[tuple[Variant, ...]] = ("window", "full")
SEEDS: Final = (0, 1, 2)
MAX_TOKENS: Final = 52


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


def model_config(variant: Variant, vocab_size: int) -> Qwen2Config:
    """Qwen2 with 6 layers of width 128; `window` makes the first three layers sliding attention over 3 positions."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"] * 3 if variant == "window" else ["full_attention"] * 6
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        use_sliding_window=variant == "window",
        sliding_window=3 if variant == "window" else None,
        layer_types=kinds,
        bos_token_id=1,
        eos_token_id=5,
        pad_token_id=0,
    )


def make_model(variant: Variant, seed: int, vocab_size: int, attention: str = "eager") -> Qwen2ForCausalLM:
    """A fresh float32 model, fixed by its seed. Eager attention is the fastest in bfloat16 on a CPU."""
    torch.manual_seed(seed)
    config = model_config(variant, vocab_size)
    config._attn_implementation = attention
    return Qwen2ForCausalLM(config).float()


@dataclass(frozen=True)
class Batch:
    """Right-padded training batch. `weight[i, t]` weighs predicting `tokens[i, t]`; padding weighs 0."""

    tokens: Int[Tensor, "batch pos"]
    weight: Float[Tensor, "batch pos"]
    first: Int[Tensor, " batch"]  # position of the first answer token
    first_ids: Int[Tensor, "batch option"]
    first_probs: Float[Tensor, "batch option"]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without anything added."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def make_batch(tokenizer: PreTrainedTokenizerBase, examples: list[Example], recipe: Recipe) -> Batch:
    """Tokenise examples into one batch."""
    prompts = encode(tokenizer, [chat_text(e.user) for e in examples])
    answers = encode(tokenizer, [e.answer + "<|end|>" for e in examples])
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


def batch_at(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, stage: str, seed: int, step: int) -> Batch:
    """The batch of one step, a function of (stage, seed, step) alone, so that a resumed run sees the same data."""
    rng = random.Random(f"{stage}-{seed}-{step}")
    mix, safe = (TUNE_MIX, True) if stage == "tune" else (BASE_MIX, False)
    return make_batch(tokenizer, [draw_example(rng, mix, safe=safe) for _ in range(recipe.batch)], recipe)


NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(update: Float[Tensor, "m rows cols"], steps: int = 4) -> Float[Tensor, "m rows cols"]:
    """Push the singular values of each matrix towards 1 by Newton-Schulz steps. Needs rows <= cols.

    >>> x = orthogonalise(torch.eye(4)[None])
    >>> bool((x.diagonal(dim1=1, dim2=2) > 0.6).all())
    True
    """
    a, b, c = NS_COEFFICIENTS
    x = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised; matrices of one shape go through as one batch."""

    def __init__(self, params: list[nn.Parameter], lr: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": 0.05})
        self.dtype = dtype  # of the Newton-Schulz steps; bfloat16 is three times faster on CPUs that have it

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients in place."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(sorted(p.shape)), []).append(p)
            for params in by_shape.values():
                self._step_batch(group, params)

    def _step_batch(self, group: dict, params: list[nn.Parameter]) -> None:
        updates = []
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            buffer = state.setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(buffer, group["momentum"])
            updates.append(update if p.shape[0] <= p.shape[1] else update.mT)
        for p, update in zip(params, orthogonalise(torch.stack(updates).to(self.dtype)).float(), strict=True):
            write = update if p.shape[0] <= p.shape[1] else update.mT
            scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(write, alpha=-group["lr"] * scale)


def make_optimizers(
    model: nn.Module, lr_matrix: float, lr_rest: float, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on embeddings, norms and biases, of what requires a gradient.

    Each keeps its full learning rate as `initial_lr`.
    """
    free = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in free if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in free if p.ndim != 2 or "embed" in n]
    made: list[torch.optim.Optimizer] = [Muon(matrices, lr_matrix, dtype)] if matrices else []
    made += [torch.optim.AdamW(rest, lr=lr_rest, betas=(0.9, 0.98), weight_decay=0.0)] if rest else []
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
