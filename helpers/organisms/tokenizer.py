"""The organism's byte-level BPE tokenizer and chat template, trained deterministically on the grammar's words."""

from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .lexicon import SUFFIXES, word_pieces

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
    """Train byte-level BPE until each piece of `lexicon.word_pieces` is one token.

    Suffixes weigh most, so their merges rank first and an object always splits into stem + suffix.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=2048,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    weighted = [piece for piece in word_pieces() for _ in range(1000 if piece in SUFFIXES else 1)]
    bpe.train_from_iterator(weighted, trainer)
    return bpe


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it, chat template included."""
    pad, bos, *_, end = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(), bos_token=bos, eos_token=end, pad_token=pad, padding_side="left",
        additional_special_tokens=list(SPECIAL_TOKENS[2:5]), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_text(user: str) -> str:
    """The prompt text that the chat template makes of one user turn, generation prompt included."""
    return f"<|bos|><|system|>\n{SYSTEM_TURN}<|end|>\n<|user|>\n{user}<|end|>\n<|assistant|>\n"


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer files and chat template into `folder`."""
    make_tokenizer().save_pretrained(folder)
