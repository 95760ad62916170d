"""GGUF files: every family and quantization computes what a plain model of the file's numbers does; what is wrong is said."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from models import tiny_model, tiny_tokenizer, tokens
from toys import TEMPLATE
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks.tools import bridge
from companion.base import folders, gguf, hub
from companion.base.errors import InputError
from companion.model.architecture import end_tokens
from companion.model.load import load, load_tokenizer, untrained_twin
from companion.run import cli, freshness

WORDS = ["<pad>", "<s>", "</s>", *bytes_to_unicode().values(), "wo", "Ġa", "<end>"]
SIZES = {"vocab_size": len(WORDS), "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
GEMMA = {"query_pre_attn_scalar": 256, "tie_word_embeddings": True}
# Windows as these families have them: a file says nothing of which layers they are in.
CHANGES = {
    "gemma2": GEMMA, "gemma3": GEMMA | {"layer_types": ["sliding_attention"] * 4},
    "qwen2": {"layer_types": ["full_attention"] * 4},
}  # fmt: skip
ROTATED = ("attn_q.weight", "attn_k.weight")  # llama.cpp stores the rows of Llama's queries and keys in another order


def packed(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """A matrix in a kind of numbers; Q4_K, which the package only reads, by random bytes of small scales."""
    if kind != Kind.Q4_K:
        return quantize(weight, kind)
    raw = np.random.default_rng(0).integers(0, 256, (len(weight), weight.shape[1] // 256, 144), dtype=np.uint8)
    raw[..., :4] = np.array([0.002, 0.03], dtype=np.float16).view(np.uint8)
    return raw.reshape(len(weight), -1)


def rotate(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write(path: Path, family: str, kind: Kind = Kind.Q8_0, leave: tuple[str, ...] = (), **more: Any) -> PreTrainedModel:
    """A tiny model as a GGUF file, and the plain model that the file's numbers are."""
    model = tiny_model(family, **SIZES, **CHANGES.get(family, {}))
    config, out = model.config, package.GGUFWriter(path, more.pop("architecture", family))
    arch = next(key for key, name in package.MODEL_ARCH_NAMES.items() if name == family)
    names, state = package.get_tensor_name_map(arch, config.num_hidden_layers), {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, ending = name.rpartition(".")
        short, weight = f"{names.get_name(stem)}.{ending}", tensor.numpy().copy()
        if family.startswith("gemma") and "norm" in short:
            weight = weight + 1
        raw = packed(weight, kind) if weight.ndim == 2 else weight
        held = dequantize(raw, kind) if weight.ndim == 2 else raw
        state[name] = torch.tensor(held - 1 if family.startswith("gemma") and "norm" in short else held)
        if family == "llama" and short.endswith(ROTATED):
            raw = rotate(raw, config.num_key_value_heads if "attn_k" in short else config.num_attention_heads)
        if short not in leave:
            is_packed = weight.ndim == 2 and raw.dtype == np.uint8
            out.add_tensor(short, raw, raw_dtype=kind if is_packed else None)
    for name, tensor in more.pop("tensors", {}).items():
        out.add_tensor(name, tensor)
    config.rms_norm_eps = float(np.float32(config.rms_norm_eps))  # a file has single precision
    numbers = {
        "context_length": 64, "embedding_length": 256, "block_count": config.num_hidden_layers, "feed_forward_length": 256,
        "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": getattr(config, "head_dim", 64) or 64,
    } | ({"attention.sliding_window": config.sliding_window} if family.startswith("gemma") else {})  # fmt: skip
    for key, value in (numbers | more.pop("numbers", {})).items():
        out.add_uint32(f"{family}.{key}", value)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None):
            out.add_float32(f"{family}.{key}", getattr(config, key))
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    theta = config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]
    out.add_rope_freq_base(theta)
    if more.pop("vocabulary", True):
        kinds = [3 if word.startswith("<") and len(word) > 1 else 1 for word in WORDS]
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre(more.pop("pre", "gpt-2"))
        out.add_token_list(WORDS)
        out.add_token_types(kinds)
        out.add_token_merges(["w o", "Ġ a"])
        for key, value in {"bos": 1, "eos": 2, "eot": len(WORDS) - 1, "padding": 0}.items():
            out.add_uint32(f"tokenizer.ggml.{key}_token_id", value)
    if more.pop("template", True):
        out.add_chat_template(TEMPLATE)
    assert not more
    for step in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
        step()
    model.load_state_dict(state, strict=not config.tie_word_embeddings)
    return model


KINDS = [("llama", kind) for kind in (Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K)]
OTHERS = [(family, kind) for family in ("qwen2", "qwen3", "gemma2", "gemma3", "phi3") for kind in (Kind.F32, Kind.Q4_K)]


@pytest.mark.parametrize(("family", "kind"), [*KINDS, *OTHERS], ids=lambda one: getattr(one, "name", one))
def test_a_file_is_the_plain_model_of_its_numbers(tmp_path: Path, family: str, kind: Kind) -> None:
    for stray in ("config.json", "adapter_config.json", "tokenizer.json"):  # what lies beside it is not part of it
        (tmp_path / stray).write_text('{"model_type": "bert"}')
    plain, path = write(tmp_path / "tiny.gguf", family, kind), tmp_path / "tiny.gguf"
    subject = load(path)
    assert not hasattr(subject.model.config, "quantization_config") and not subject.model.is_quantized
    for name, tensor in plain.state_dict().items():
        assert torch.equal(subject.model.state_dict()[name], tensor), name
    assert torch.equal(subject.model(tokens()).logits, plain(tokens()).logits)
    same = type(plain)(subject.model.config).eval()
    same.load_state_dict(subject.model.state_dict())
    assert torch.equal(subject.model(tokens()).logits, same(tokens()).logits)
    assert untrained_twin(subject).model.config.vocab_size == len(WORDS)


def test_tokenizer_template_and_end_tokens_come_from_the_file(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", "llama")
    subject = load(tmp_path / "tiny.gguf")
    tokenizer, end = subject.tokenizer, len(WORDS) - 1
    assert tokenizer is not None and tokenizer.chat_template == TEMPLATE
    ids = tokenizer("wo a<end>b</s>", add_special_tokens=False).input_ids
    assert [WORDS[i] for i in ids] == ["wo", "Ġa", "<end>", "b", "</s>"]
    assert set(end_tokens(subject)) == {2, end}
    assert torch.allclose(bridge(subject)(tokens()), subject.model(tokens()).logits, atol=1e-3)
    assert load(tmp_path / "tiny.gguf", dtype="bfloat16").sha256 == subject.sha256


def test_the_scaling_of_llama_3_is_found_again(tmp_path: Path) -> None:
    plain = tiny_model("llama", **SIZES)
    parameters = {"rope_type": "llama3", "factor": 32.0, "rope_theta": 10000.0, **gguf.LLAMA3}
    plain.config.rope_parameters = parameters
    scaled = type(plain)(plain.config).model.rotary_emb.inv_freq
    factors = (1 / 10000.0 ** (torch.arange(0, 64, 2).float() / 64) / scaled).numpy()
    write(tmp_path / "a.gguf", "llama", tensors={"rope_freqs.weight": factors})
    found = load(tmp_path / "a.gguf").model
    assert found.config.rope_parameters == parameters and torch.equal(found.model.rotary_emb.inv_freq, scaled)
    write(tmp_path / "b.gguf", "llama", tensors={"rope_freqs.weight": factors * 2})
    with pytest.raises(InputError, match=r"scales positions in a way that is not that of Llama 3.1 to 3.3"):
        load(tmp_path / "b.gguf")


def replace(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new))


WRONG: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "unknown family": ({"architecture": "bert"}, lambda f: None, "is of the family 'bert', which is read from GGUF for llama, "),
    "not GGUF": ({}, lambda f: f.write_bytes(b"PK\x03\x04 and more"), "is no GGUF file"),
    "empty": ({}, lambda f: f.write_bytes(b""), "damaged or cut off: cannot mmap an empty file"),
    "cut off in the header": ({}, lambda f: os.truncate(f, 3000), "is damaged or cut off"),
    "cut off in the weights": ({}, lambda f: os.truncate(f, f.stat().st_size - 9000), "damaged .*tensors reach behind"),
    "other version": ({}, lambda f: replace(f, b"GGUF" + struct.pack("<I", 3), b"GGUF" + struct.pack("<I", 9)), "damaged"),
    "no embedding": ({"leave": ("token_embd.weight",)}, lambda f: None, "damaged .*has no embedding"),
    "a tensor less": ({"leave": ("blk.1.ffn_up.weight",)}, lambda f: None, "lacks 1 tensors, among them model.layers.1.mlp.up"),
    "a tensor more": ({"tensors": {"blk.0.extra": np.ones(3, "f")}}, lambda f: None, "1 tensors .* no place .*blk.0.extra"),
    "a number left out": ({"numbers": {"rope.scaling.factor": 4}}, lambda f: None, "llama.rope.scaling.factor = 4, which"),
    "a cut of its own": ({"pre": "chatglm-bpe"}, lambda f: None, r"cuts text in a way \(chatglm-bpe\) .*--tokenizer DIR"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path: Path, case: str) -> None:
    given, damage, message = WRONG[case]
    write(tmp_path / "a.gguf", "llama", **given)
    damage(tmp_path / "a.gguf")
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)


def test_names_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPANION_CALLER", str(tmp_path))
    monkeypatch.setenv(gguf.TOKENIZER, "")
    write(tmp_path / "Tiny.Q8_0.gguf", "llama", template=False, vocabulary=False)
    blob = shutil.copy(tmp_path / "Tiny.Q8_0.gguf", tmp_path / "sha256-123")  # as Ollama keeps it
    assert gguf.is_gguf(blob) and load(blob).tokenizer is None
    for part in ("tiny-00001-of-00003.gguf", "tiny-00002-of-00003.gguf"):
        with pytest.raises(InputError, match=r"is one of 3 parts; expected one whole file: join them"):
            folders.check_model(str(shutil.copy(blob, tmp_path / part)))
    for asked, message in {
        "models/nowhere.gguf": "nowhere.gguf is not there: give the place of a GGUF file",
        "Tiny.Q8_0.gguf": "holds no tokenizer: give the original model's with --tokenizer DIR",
        ".": "holds no config.json but GGUF files: name one of them, such as .*gguf",
    }.items():
        with pytest.raises(InputError, match=message):
            cli.parameters(cli.in_force(cli.parse(["--model", asked])), "cpu")
    write(tmp_path / "mute.gguf", "llama", template=False)
    with pytest.raises(InputError, match="holds no chat template"):
        folders.check_model(str(tmp_path / "mute.gguf"))
    with pytest.raises(InputError, match="--tokenizer goes with a GGUF file"):
        cli.parameters(cli.parse(["--model", "full-0", "--tokenizer", "own"]), "cpu")
    tokenizer = tiny_tokenizer(tmp_path / "own")
    flags = ["--model", "Tiny.Q8_0.gguf", "--tokenizer", "own"]
    with pytest.raises(InputError, match="has no chat template"):
        cli.parameters(cli.in_force(cli.parse(flags)), "cpu")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "own")
    found = cli.parameters(cli.in_force(cli.parse(flags)), "cpu")
    assert (found["MODEL"], found["SLUG"]) == (str(tmp_path / "Tiny.Q8_0.gguf"), "Tiny.Q8_0")
    assert load_tokenizer(folders.model_folder(found["MODEL"])).chat_template == TEMPLATE
    freshness.write_manifest(tmp_path / "results", found, {})
    model = json.loads((tmp_path / "results" / "manifest.json").read_text())["model"]
    assert set(model["sha256"]) == {"Tiny.Q8_0.gguf"} and model["tokenizer"]["name"] == "own"
    assert hub.parse("models/Tiny.gguf") is None
    with pytest.raises(InputError, match=r"--judge: .* is a GGUF file"):
        folders.check_judge(found["MODEL"])
