"""GGUF files, as Ollama and LM Studio keep them: what a file holds, and whether it can be used; then its model, exactly.

Weights become plain float tensors: the model computes what its file says. The header is read with the standard library alone.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.base.errors import InputError, explained

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER = "COMPANION_TOKENIZER"  # the folder of a tokenizer that takes the place of the file's, if one was given
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")  # Mistral calls itself llama
PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
ORIGINAL = "take the original model, as a folder or as ORG/MODEL"
TOKENS, TEMPLATE, PRE = "tokenizer.ggml.tokens", "tokenizer.chat_template", "tokenizer.ggml.pre"
# What the library leaves out, by the name that its config has for it; a value that the config lacks must be its default.
READ_HERE = {
    "attention.key_length": "head_dim", "attention.value_length": "head_dim", "rope.dimension_count": "head_dim",
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "rope.scaling.original_context_length": "max_position_embeddings",
}  # fmt: skip
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SPLITS = ("gpt-2", "smollm")  # ways to cut text that are those of the library's plain byte-level tokenizer
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _LONG = 8, 9, 1000


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    values: Mapping[str, Any]  # of a list its length, as a `range`
    tensors: Mapping[str, tuple[int, int, int]]  # kind of number, how many, first byte behind `start`
    start: int

    @property
    def family(self) -> str:
        """The architecture by llama.cpp's name."""
        return str(self.values.get("general.architecture"))


def is_gguf(path: Path | str) -> bool:
    """Whether this is a GGUF file by its name, or one without that name by its first bytes (as Ollama keeps them)."""
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """The header of a file; `InputError` where it is not there, no GGUF file, or damaged."""
    if not path.is_file():
        raise InputError(f"{path} is not there: give the place of a GGUF file")
    with _whole(path), path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.read(4) != b"GGUF":
            raise InputError(f"{path} is no GGUF file (its first bytes are not GGUF): download it again")
        return _parsed(data)


def _whole(path: Path) -> AbstractContextManager[None]:
    return explained(f"{path} is damaged or cut off", "expected a whole GGUF file: download it again")


def _parsed(data: mmap.mmap) -> Header:
    def numbers(kinds: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{kinds}", data.read(struct.calcsize(f"<{kinds}")))

    def text() -> str:
        return data.read(*numbers("Q")).decode()

    def value() -> Any:
        (kind,) = numbers("I")
        if kind == _STRING:
            return text()
        if kind != _ARRAY:
            return numbers(_SCALARS[kind])[0]
        inner, length = numbers("IQ")
        data.seek(_behind(data, data.tell(), inner, length))
        return range(length)

    version, n_tensors, n_values = numbers("IQQ")
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    values = {text(): value() for _ in range(n_values)}
    tensors = {}
    for _ in range(n_tensors):
        name = text()
        *shape, kind, offset = numbers(f"{numbers('I')[0]}QIQ")
        tensors[name] = (kind, math.prod(shape), offset)
    align = int(values.get("general.alignment", 32))
    return Header(values, tensors, -(-data.tell() // align) * align)


def _behind(data: Any, at: int, kind: int, length: int) -> int:
    """The place behind a list."""
    if kind != _STRING:
        return at + length * struct.calcsize(_SCALARS[kind])
    for _ in range(length):
        at += 8 + struct.unpack_from("<Q", data, at)[0]
    return at


def check_file(path: Path) -> Header:
    """The header of a file that can be used as a model, as far as it tells; `InputError` in one sentence for any other."""
    header, part = read_header(path), PART.search(path.name)
    parts = int(part[1]) if part else header.values.get("split.count", 1)
    if parts > 1:
        raise InputError(
            f"{path} is one of {parts} parts; expected one whole file: join them (llama-gguf-split --merge FIRST WHOLE.gguf)"
        )
    if header.family not in FAMILIES:
        only = f"which is read from GGUF for {', '.join(FAMILIES)} only"
        raise InputError(f"{path} is of the family {header.family!r}, {only}; {ORIGINAL}")
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:  # the command line asks before any package is installed, and again after
        return header
    sizes = {kind.value: size for kind, size in GGML_QUANT_SIZES.items()}
    if strange := next((name for name, (kind, *_) in header.tensors.items() if kind not in sizes), None):
        raise InputError(f"{path}: its tensor {strange} is of a kind that the package gguf does not know; {ORIGINAL}")
    with _whole(path):
        if "token_embd.weight" not in header.tensors:
            raise ValueError("it has no embedding")
        ends = [at + n // sizes[kind][0] * sizes[kind][1] for kind, n, at in header.tensors.values()]
        if path.stat().st_size < header.start + max(ends):
            raise ValueError("its tensors reach behind its end")
    return header


def check_chat_file(path: Path) -> None:
    """`check_file`, and `InputError` if the file has no tokenizer or no chat template and no `--tokenizer` was given."""
    values, instead = check_file(path).values, "give the original model's with --tokenizer DIR"
    if tokenizer_folder() is not None:
        return  # checked where it was typed
    if TOKENS not in values:
        raise InputError(f"{path} holds no tokenizer: {instead}")
    if not values.get(TEMPLATE):
        raise InputError(f"{path} holds no chat template: {instead}, or take the file of a chat model")


def tokenizer_folder() -> Path | None:
    """The folder that `--tokenizer` named, if it was given."""
    return Path(os.environ[TOKENIZER]) if os.environ.get(TOKENIZER) else None


@contextmanager
def _alone(path: Path) -> Iterator[dict[str, str]]:
    """How the library is told of a file: in a folder of its own, as it would read what lies beside it, and fast.

    It reads each of a hundred thousand tokens several times, and makes its table of names anew for each module: a minute.
    """
    from unittest.mock import patch

    import gguf

    class Quick(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            data: Any = self.data
            kind, length = struct.unpack_from("<IQ", data, orig_offs) if raw_type == _ARRAY else (0, 0)
            if length < _LONG:
                return super()._get_field_parts(orig_offs, raw_type)
            return _behind(data, orig_offs + 12, kind, length) - orig_offs, [], [], [gguf.GGUFValueType(_ARRAY), kind]

    quick: dict[str, Any] = {"GGUFReader": Quick, "get_tensor_name_map": lru_cache(gguf.get_tensor_name_map)}
    with tempfile.TemporaryDirectory() as folder, patch.multiple(gguf, **quick):
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}


def read_config(path: Path) -> PreTrainedConfig:
    """The library's config of a file's model, with what the library leaves out; `InputError` for what neither can follow."""
    from transformers import AutoConfig
    from transformers.integrations import GGUF_CONFIG_MAPPING

    header = check_file(path)
    family = header.family
    with _alone(path) as named:
        config = AutoConfig.from_pretrained(**named)
    known = {key for key, name in GGUF_CONFIG_MAPPING[family].items() if name is not None}
    own = {key.removeprefix(f"{family}."): v for key, v in header.values.items() if key.startswith(f"{family}.")}
    if own.get("rope.scaling.type") == "none":
        del own["rope.scaling.type"]
    for key in [key for key in own if key not in known]:
        name = READ_HERE.get(key, "")
        if key.startswith("rope.") or not hasattr(config, name):
            default = config.hidden_size // config.num_attention_heads if name == "head_dim" else math.nan
            if own[key] != getattr(config, name, default):
                raise InputError(f"{path} sets {family}.{key} = {own[key]}, which would be left out; {ORIGINAL}")
        else:
            setattr(config, name, own[key])
    if family == "gemma2" and config.num_hidden_layers == 46:  # the 27B alone scales by the heads' share of the width
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    if "rope_freqs.weight" in header.tensors:
        config.rope_parameters = {**config.rope_parameters, **_llama3(path, config)}
    config.vocab_size = header.tensors["token_embd.weight"][1] // config.hidden_size
    return config


def _llama3(path: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """The scaling of Llama 3.1 to 3.3, of which a file keeps the divisor of each frequency alone."""
    import torch
    from gguf import GGUFReader
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kept = next(tensor.data for tensor in GGUFReader(path).tensors if tensor.name == "rope_freqs.weight")
    plain, steps = config.rope_parameters, torch.arange(0, config.head_dim, 2).float() / config.head_dim
    for factor in (8.0, 32.0):
        config.rope_parameters = tried = {**plain, "rope_type": "llama3", "factor": factor, **LLAMA3}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
        if torch.allclose(1 / plain["rope_theta"] ** steps / scaled, torch.tensor(kept), rtol=1e-4):
            return tried
    raise InputError(f"{path} scales positions in a way that is not that of Llama 3.1 to 3.3; {ORIGINAL}")


def read_model(path: Path, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A plain model with a file's weights, and the library's report on them; whatever the library raises reaches the caller."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    header, config = read_header(path), read_config(path)
    with _alone(path) as named:
        model, report = AutoModelForCausalLM.from_pretrained(
            **named, config=config, dtype=dtype, output_loading_info=True, **options
        )
        processor = TENSOR_PROCESSORS.get(header.family, TensorProcessor)(config=config.to_dict())
        placed = {*get_gguf_hf_weights_map(model, processor), "rope_freqs.weight"}
    for name in ("quantization_method", "hf_quantizer"):
        delattr(model, name)
    del model.config.quantization_config
    model.is_quantized = False
    model.config.name_or_path = str(path)
    ends = {header.values.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")} - {None}
    model.generation_config.eos_token_id = sorted(ends) or None
    return model, {**report, "unexpected_keys": [*report["unexpected_keys"], *(header.tensors.keys() - placed)]}


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a file with its chat template; `InputError` for one that cuts text in a way unknown to the library."""
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    values = check_file(path).values
    cut = values.get(PRE, "not named")
    if values.get("tokenizer.ggml.model") == "gpt2" and cut not in (*SPLITS, *GGUF_PRE_TOKENIZER_SPLITS):
        raise InputError(
            f"{path} cuts text in a way ({cut}) that would not be followed: give the original model's tokenizer "
            "with --tokenizer DIR"
        )
    with _alone(path) as named:
        tokenizer = AutoTokenizer.from_pretrained(**named)
    tokenizer.name_or_path = str(path)
    return tokenizer
