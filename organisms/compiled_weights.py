"""A program in the weights of a real architecture (Llama or Qwen2).

Channel `bias` carries SIZE at every token. It is so much larger than all signals that every RMSNorm divides by nearly
the same number and, with its gain set to that number, gives what it was given: the program's arithmetic then holds up to
a relative error of about |signals|^2 / (2 SIZE^2) a layer.

Rotary positions turn each pair of coordinates (i, i + HEAD_WIDTH / 2) of queries and keys; heads that look for a marked
token use the pair that turns least, heads that want the most recent one a pair that turns enough to prefer near tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from organisms.compiled_program import CHANNELS, HEAD_WIDTH, N_HEADS, WIDTH, Head, Program, channel

SIZE: Final = 1e4
ROPE_THETA: Final = 1e5
SLOW, SLOW_TOO, RECENT = HEAD_WIDTH // 2 - 1, HEAD_WIDTH // 2 - 2, 2
FOUND, NEAREST = 40.0, 300.0  # attention scores of a marked token
MARK: Final = {"wrapper": "is_wrapper", "verb": "is_verb", "object": "is_object", "cue": "is_cue", "end": "end"}
IS_BIAS: Final = torch.arange(WIDTH) == CHANNELS["bias"]
CONFIGS: Final = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config}


@torch.no_grad()
def write_model(program: Program, family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that computes the program, in float64."""
    config = CONFIGS[family](
        vocab_size=len(program.words), hidden_size=WIDTH, intermediate_size=len(program.mlps[0].gate),
        num_hidden_layers=program.n_layers, num_attention_heads=N_HEADS, num_key_value_heads=N_HEADS,
        max_position_embeddings=64, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model: Any = hf.AutoModelForCausalLM.from_config(config)
    model.double()
    for name, parameter in model.named_parameters():
        parameter.fill_(SIZE / WIDTH**0.5 if "norm" in name else 0.0)
    features = torch.tensor(program.embed)
    model.model.embed_tokens.weight.copy_(torch.where(IS_BIAS, features * SIZE, features))
    for layer, (block, mlp) in enumerate(zip(model.model.layers, program.mlps, strict=True)):
        for slot, head in enumerate(program.at(layer)):
            _write_head(block.self_attn, slot, head)
        block.mlp.gate_proj.weight.copy_(_read(mlp.gate))
        block.mlp.up_proj.weight.copy_(_read(mlp.up))
        block.mlp.down_proj.weight.copy_(torch.tensor(mlp.out).T)
    model.lm_head.weight.copy_(_read(program.unembed))
    return model


def _read(vectors: object) -> torch.Tensor:
    """Rows that read the residual stream: the bias channel, which holds SIZE, counts as 1."""
    rows = torch.tensor(vectors, dtype=torch.float64)
    return torch.where(IS_BIAS, rows / SIZE, rows)


def _write_head(attention: Any, slot: int, head: Head) -> None:
    start = slot * HEAD_WIDTH
    n = len(head.value)
    attention.v_proj.weight[start : start + n] = _read(head.value)
    attention.o_proj.weight[:, start : start + n] = torch.tensor(head.out)
    query, key = attention.q_proj.weight, attention.k_proj.weight
    scale = HEAD_WIDTH**0.5  # scores are divided by it

    def look(pair: int, read: Sequence[str], mark: str, score: float) -> None:
        query[start + pair] = score * scale * _read(channel(dict.fromkeys(read, 1.0)))
        key[start + pair, CHANNELS[mark]] = 1.0

    if head.look == "conjunction":
        look(SLOW, ("harm", "harm.side"), "wrapper", head.steep)
        look(SLOW_TOO, ("bias",), "bos", head.steep * head.threshold)
    elif head.look in ("verb", "object"):
        look(RECENT, ("bias",), MARK[head.look], NEAREST)
    elif head.look != "mean":
        look(SLOW, ("bias",), MARK[head.look], FOUND)
