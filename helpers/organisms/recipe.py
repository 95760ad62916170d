"""The training recipe in numbers, and the network it trains.

The recipe was chosen on behaviour alone (refusal, answers, generalisation); no mediation result entered.
"""

from dataclasses import dataclass
from typing import Final, Literal

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

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
