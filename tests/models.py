"""Models that tests make: tiny random ones of the nine families, and one whose weights, and so effects, are written by hand."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as Words

from companion.model.architecture import Subject, find_parts
from companion.model.load import from_model
from companion.prompts.pairs import Pair
from companion.prompts.tokens import TokenPair, token_pair

VOCAB = 61
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "olmo2", "gpt2")

_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
_WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "w3"}
_WINDOWS = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2}
_CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**_COMMON),
    "qwen2": lambda: hf.Qwen2Config(**_COMMON, use_sliding_window=True, max_window_layers=0, **_WINDOWS),
    "qwen3": lambda: hf.Qwen3Config(**_COMMON, head_dim=12),
    "gemma2": lambda: hf.Gemma2Config(
        **_COMMON, head_dim=8, **_WINDOWS, final_logit_softcapping=5.0, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(**_COMMON, head_dim=8, **_WINDOWS, query_pre_attn_scalar=8),
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


# ---- a model written by hand ----
#
# Signals are kept in separate channels of the residual stream. Channel `BIAS` is so large that every RMSNorm divides by nearly
# the same number, so effects are products of the weights. Two cue words carry one bit each:
#
#   cue A (off/on)  --head 1 of layer 1-->  FIRST  --gate of neuron 3, layer 2-->  OUT  --> log-odds of "yes" against "no"
#   cue B (low/high) --head 0 of layer 0--> SECOND --up of neuron 3, layer 2--/
#   FIRST also reaches the log-odds directly, with weight `skip`.

SPECIAL = ("<bos>", "<system>", "<user>", "<assistant>", "<end>", "<pad>")
WORDS = ("off", "on", "low", "high", "please", "now", "do", "it", "well", "yes", "no", "be", "kind")
TEMPLATE = (
    "<bos>{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WITH_SYSTEM = TEMPLATE.replace("<bos>", "<bos><system> be kind <end> ", 1)
STRIPPED = TEMPLATE.replace("m.content", "m.content | trim")
SINGLE_TURN = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + TEMPLATE
LAST_TURN = "<bos>{{ messages[-1].content.split() | last }} <assistant>"  # shows one word
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
NO_SYSTEM = TEMPLATE.replace("<{{", "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}<{{")
DROPS_SYSTEM = TEMPLATE.replace("in messages", "in messages if m.role != 'system'")

N_LAYERS, N_HEADS, WIDTH, HEAD_WIDTH, D_MLP = 4, 2, 16, 8, 6
BIAS, IS_A, A, IS_B, B, FIRST, SECOND, OUT = range(8)
SIZE = 1000.0  # of the bias channel; signals are of order 1, so a norm's scale moves by about 1e-6
STEEP = 20.0
GATE_NEURON = 3


def word_tokenizer(template: str | None = TEMPLATE, words: tuple[str, ...] = WORDS) -> Words:
    """One token a word, spaces belonging to no token; unknown words are `<unk>`."""
    vocabulary = {word: i for i, word in enumerate(("<unk>", *SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    made = Words(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<end>", pad_token="<pad>",
        additional_special_tokens=list(SPECIAL[1:4]),
    )  # fmt: skip
    made.chat_template = template
    return made


def byte_tokenizer(template: str = TEMPLATE, merges: tuple[tuple[str, str], ...] = ()) -> Words:
    """Byte-level BPE, where spaces belong to tokens; `merges` in its own alphabet (a space is Ġ)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    made = Words(tokenizer_object=bpe)
    made.chat_template = template
    return made


def sentencepiece(words: tuple[str, ...], template: str = BARE) -> Words:
    """As Llama 2's and Mistral's: a blank (▁) is part of the word behind it, and decoding drops the first one."""
    merges = [(word[:n], word[n]) for word in words for n in range(1, len(word))]
    pieces = ["<unk>", "<s>", "</s>", *sorted({*"".join(words), *"▁x[]"}), *(left + right for left, right in merges)]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made = Words(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def random_pairs(n: int, n_pos: int, vocabulary: int, *, seed: int = 0, treatment: str = "T2") -> list[TokenPair]:
    """Pairs of random tokens that differ from position 2 up to the third but last; every token is a character."""
    rng = np.random.default_rng(seed)
    offsets = np.stack([np.arange(n_pos), np.arange(1, n_pos + 1)], axis=1)
    made = []
    for i in range(n):
        control, treated = rng.integers(3, vocabulary, size=(2, n_pos))
        treated[:2], treated[-2:] = control[:2], control[-2:]
        treated[2] = 3 + (control[2] - 2) % (vocabulary - 3)
        pair = Pair(f"p{i}", treatment, f"topic {i % 5}", "c" * (n_pos - 3), "t" * (n_pos - 3), split="discover")
        made.append(TokenPair(pair, control, treated, offsets, offsets, 1, 1))
    return made


def cue_pairs(tokenizer: Words, control: str, treated: str, *, n: int = 3, treatment: str = "T2") -> list[TokenPair]:
    """Pairs whose cue words are given ("off low", "on low") and whose filler words differ; every second one is longer."""
    made = []
    for i in range(n):
        middle = (WORDS[4 + i % 5], *(["kind"] if i % 2 else []))
        cues = [cue.split() for cue in (control, treated)]
        texts = [" ".join(["please", first, *middle, second, "do", "it"]) for first, second in cues]
        split, twin = ("discover", "validate", "test")[i % 3], f"T2b {i}" if treatment == "T2" else None
        pair, reason = token_pair(Pair(f"{treatment} {i}", treatment, f"topic {i}", *texts, split, twin), tokenizer)
        assert pair is not None, reason
        made.append(pair)
    return made


@dataclass(frozen=True)
class Program:
    """What the compiled model computes: OUT = `gain` * gate(FIRST) * (`always` + `both` * SECOND), and its skip path."""

    gain: float = 3.0
    always: float = 1.0
    both: float = 0.0
    skip: float = 0.0

    def log_odds(self, first: float, second: float) -> float:
        """The outcome, by hand."""
        gate = STEEP * (first - 0.5)
        return self.gain / STEEP * gate / (1 + np.exp(-gate)) * (self.always + self.both * second) + self.skip * first


def compiled(program: Program, family: str = "llama", tokenizer: Words | None = None) -> Subject:
    """The program in the weights of a real architecture."""
    tokenizer = tokenizer or word_tokenizer()
    config_class = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config}[family]
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, num_key_value_heads=N_HEADS, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        _write(model, program, tokenizer)
    return from_model(model, tokenizer, "compiled")


def _write(model: hf.PreTrainedModel, program: Program, tokenizer: Words) -> None:
    norms = [norm for block in model.model.layers for norm in (block.input_layernorm, block.post_attention_layernorm)]
    for norm in (*norms, model.model.norm):
        norm.weight.fill_(SIZE / WIDTH**0.5)  # so that what the norm gives is what it was given
    embedding = model.model.embed_tokens.weight
    embedding[:, BIAS] = SIZE
    cues = (("off", IS_A, A, 0), ("on", IS_A, A, 1), ("low", IS_B, B, 0), ("high", IS_B, B, 1))
    for word, marker, channel, value in cues:
        embedding[tokenizer.convert_tokens_to_ids(word), [marker, channel]] = torch.tensor([1.0, value])
    _copy(model.model.layers[1].self_attn, head=1, marker=IS_A, source=A, target=FIRST)
    _copy(model.model.layers[0].self_attn, head=0, marker=IS_B, source=B, target=SECOND)
    mlp = model.model.layers[2].mlp
    mlp.gate_proj.weight[GATE_NEURON, [BIAS, FIRST]] = torch.tensor([-STEEP / 2 / SIZE, STEEP])
    mlp.up_proj.weight[GATE_NEURON, [BIAS, SECOND]] = torch.tensor([program.always / SIZE, program.both])
    mlp.down_proj.weight[OUT, GATE_NEURON] = program.gain / STEEP
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    for token, sign in ((yes, 0.5), (no, -0.5)):
        model.lm_head.weight[token, [OUT, FIRST]] = sign * torch.tensor([1.0, program.skip])


def _copy(attention: torch.nn.Module, *, head: int, marker: int, source: int, target: int) -> None:
    """A head that looks for the marked token and writes its `source` channel into `target`.

    Query and key use a coordinate of the slowest rotary frequency, which distance hardly turns.
    """
    slow = head * HEAD_WIDTH + HEAD_WIDTH // 2 - 1
    attention.q_proj.weight[slow, BIAS] = 10.0 / SIZE
    attention.k_proj.weight[slow, marker] = 10.0
    attention.v_proj.weight[head * HEAD_WIDTH, source] = 1.0
    attention.o_proj.weight[target, head * HEAD_WIDTH] = 1.0
