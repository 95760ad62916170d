"""The embedded model's byte-level BPE tokenizer and chat template, trained deterministically on the grammar's words."""

from __future__ import annotations

import json
from typing import Final

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from companion.prompts.invented import SUFFIXES, word_pieces

MAX_TOKENS: Final = 52  # of a prompt with its answer
SPECIAL_TOKENS: Final = ("<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SYSTEM_TURN: Final = "be helpful"
CHAT_TEMPLATE: Final = (
    "{{ '<|bos|>' }}"
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\\n" + SYSTEM_TURN + "<|end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>' }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"
)


def train_bpe() -> Tokenizer:
    """Train byte-level BPE until each piece of `invented.word_pieces` is one token.

    Suffixes weigh most, so their merges rank first and an object always splits into stem + suffix.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = qwen.normalizer, qwen.pre_tokenizer, qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=1, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    weighted = [piece for piece in word_pieces() for _ in range(1000 if piece in SUFFIXES else 1)]
    bpe.train_from_iterator(weighted, trainer)
    return bpe


def make_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer, of the class that `AutoTokenizer` loads for this architecture, chat template included."""
    model = json.loads(train_bpe().to_str())["model"]
    pad, bos, *roles, end = SPECIAL_TOKENS
    return Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]],
        unk_token=pad,  # never produced; without a name the class would add a token of its own
        bos_token=bos, eos_token=end, pad_token=pad, padding_side="left", extra_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def chat_text(user: str) -> str:
    """The prompt text that the chat template makes of one user turn, generation prompt included."""
    return f"<|bos|><|system|>\n{SYSTEM_TURN}<|end|>\n<|user|>\n{user}<|end|>\n<|assistant|>\n"
