"""Training batches: token ids, per-token loss weights, and the soft target of the first answer token."""

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .recipe import MAX_TOKENS, Recipe
from .sampling import BASE_MIX, TUNE_MIX, Example, draw_example
from .tokenizer import chat_text


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
