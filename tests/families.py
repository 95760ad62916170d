"""Tiny random models of the nine families, for tests: two or three seconds each would be far too slow on real ones."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from companion.model.architecture import Subject, find_parts

VOCAB = 61
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "olmo2", "gpt2")

_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
_WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "w3"}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**_COMMON),
    "qwen2": lambda: hf.Qwen2Config(
        **_COMMON, use_sliding_window=True, sliding_window=3, layer_types=_WINDOWS, max_window_layers=0
    ),
    "qwen3": lambda: hf.Qwen3Config(**_COMMON, head_dim=12),
    "gemma2": lambda: hf.Gemma2Config(
        **_COMMON, head_dim=8, sliding_window=3, layer_types=_WINDOWS, final_logit_softcapping=5.0,
        attn_logit_softcapping=2.0, query_pre_attn_scalar=8,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_COMMON, head_dim=8, sliding_window=3, layer_types=_WINDOWS, query_pre_attn_scalar=8
    ),
    "mistral": lambda: hf.MistralConfig(**_COMMON, head_dim=8, sliding_window=5),
    "phi3": lambda: hf.Phi3Config(**_COMMON),
    "olmo2": lambda: hf.Olmo2Config(**_COMMON),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_inner=48, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}  # fmt: skip


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, attention: str | None = None, **changes: int
) -> PreTrainedModel:
    """A random model with weights large enough that effects are far above rounding; the same one each time."""
    torch.manual_seed(0)
    config = _CONFIGS[family]()
    config.update(changes)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.1))
    return model.to(dtype).eval()


def tiny_subject(family: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Subject:
    """The same with its parts found, unchecked."""
    return find_parts(tiny_model(family, dtype, attention), None, f"tiny {family}")


def tokens(n_pairs: int = 3, n_pos: int = 9, seed: int = 0) -> torch.Tensor:
    """Random token ids, no specials."""
    return torch.randint(3, VOCAB, (n_pairs, n_pos), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer(folder: Path, named: Mapping[int, str] | None = None) -> PreTrainedTokenizerBase:
    """One word a token (`<pad> <s> </s> w3 w4 ...`, or what is `named`), saved to a folder and loaded from it."""
    words = [(named or {}).get(i, word) for i, word in enumerate(_WORDS)]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = hf.PreTrainedTokenizerFast(tokenizer_object=plain, **_SPECIAL)
    made.save_pretrained(folder)
    return hf.AutoTokenizer.from_pretrained(folder)


def tiny_qwen_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The same words in Qwen's own class: for a folder of type qwen2 the library loads no other, whatever is saved there."""
    made = hf.Qwen2Tokenizer(vocab={word: i for i, word in enumerate(_WORDS)}, merges=[], **_SPECIAL)
    made.add_tokens([AddedToken(word, lstrip=True, single_word=True, normalized=False) for word in _WORDS[3:]])
    made.save_pretrained(folder)
    return hf.AutoTokenizer.from_pretrained(folder)


def edit_json(file: Path, **fields: object) -> None:
    """Other values of some fields of a file, as of a config."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
