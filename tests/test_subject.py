"""Loading: names, folders, precisions, and every mistake a reader can make with a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import FAMILIES, tiny_model, tiny_subject, tiny_tokenizer, tokens
from safetensors.torch import load_file, save_file

from companion.base import paths
from companion.base.errors import InputError
from companion.model import activations, readout
from companion.model.architecture import find_parts, written_vectors
from companion.model.load import from_model, load, untrained_twin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Qwen2, half precision, with a tokenizer, as `save_pretrained` writes it."""
    place = tmp_path / "tiny"
    tiny_tokenizer(place)
    tiny_model("qwen2").half().save_pretrained(place)
    return place


def settings(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_half_precision_folder_is_computed_in_float32(folder: Path) -> None:
    subject = load(folder)
    assert subject.dtype == torch.float32
    assert subject.tokenizer is not None
    assert (subject.n_layers, subject.n_heads, subject.d_model, subject.d_mlp) == (4, 4, 32, 48)
    assert not subject.model.training
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    plain = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    run = activations.clean_run(subject, tokens())
    torch.testing.assert_close(readout.logits(subject, run.resid_post[-1]), plain(tokens()).logits)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_precisions(folder: Path, dtype: str) -> None:
    assert load(folder, dtype=dtype).dtype == getattr(torch, dtype)


def test_the_hash_is_of_the_weights(folder: Path) -> None:
    first = load(folder)
    assert len(first.sha256) == 64
    assert load(folder, dtype="float64").sha256 == first.sha256
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).sha256 != first.sha256
    assert from_model(tiny_model("llama")).sha256 == from_model(tiny_model("llama")).sha256
    assert from_model(tiny_model("llama")).sha256 != from_model(tiny_model("phi3")).sha256


def test_names_of_shipped_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "ORGANISM", folder.parent)
    shutil.copytree(folder, folder.parent / "window-0")
    shutil.copytree(folder, folder.parent / "full-2")
    assert load("embedded").sha256 == load("window-0").sha256 == load("full-2").sha256
    with pytest.raises(
        InputError, match="no model 'window-7': neither a folder nor one of embedded, full-2, tiny, window-0"
    ):
        load("window-7")


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{\n"a": 1,,\n}')


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_config, "has no config.json; expected a model folder"),
        (break_config, "config.json is not valid JSON .line 2"),
        (pickle_weights, r"pickled \(pytorch_model.bin\), which can run code; expected [*].safetensors"),
        (drop_weights, "it has no weights; expected"),
        (truncate_weights, "could not be loaded: .*is it complete"),
        (drop_tensor, "lacks 1 tensors, among them model.layers.2.mlp.up_proj.weight"),
        (reshape_tensor, "could not be loaded|lacks 1 tensors"),
        (lambda f: settings(f, model_type="unheard_of", auto_map={"AutoModel": "m.M"}), "code of its own"),
        (lambda f: settings(f, architectures=["BertModel"]), "holds BertModel, not a causal language model"),
        (lambda f: settings(f, architectures=None), "holds no named architecture"),
        (lambda f: settings(f, model_type="unheard_of"), "could not be loaded: .*architecture known"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder: Path, spoil, message: str) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_a_known_family_that_brings_code_is_run_with_the_librarys_own(folder: Path) -> None:
    settings(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran foreign code')")
    assert type(load(folder).model) is hf.Qwen2ForCausalLM


def test_wrong_names_of_devices_and_precisions(folder: Path) -> None:
    with pytest.raises(InputError, match="dtype 'float16' is not one of float32, float64, bfloat16"):
        load(folder, dtype="float16")
    with pytest.raises(InputError, match="expected auto, cpu, cuda or cuda:N"):
        load(folder, device="gpu")
    with pytest.raises(InputError, match="GPUs are visible"):
        load(folder, device="cuda:99")
    assert load(folder, device="auto").device.type in ("cpu", "cuda")


def test_an_architecture_with_other_names_is_refused_with_what_to_do() -> None:
    config = hf.GPTNeoXConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(
        InputError, match="unknown architecture: GPTNeoXForCausalLM has none of model, transformer; known are"
    ):
        from_model(hf.AutoModelForCausalLM.from_config(config))
    encoder = hf.BertModel(
        hf.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(InputError, match="BertModel has no unembedding"):
        from_model(encoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts(family: str) -> None:
    subject = tiny_subject(family)
    assert subject.post_norm == (family in ("gemma2", "gemma3", "olmo2"))
    assert subject.soft_cap == (5.0 if family == "gemma2" else None)
    for parts in subject.layers:
        assert written_vectors(parts.down_proj).shape == (48, 32)
        probe = torch.zeros(48)
        probe[5] = 1.0
        bias = getattr(parts.down_proj, "bias", None)
        written = parts.down_proj(probe) - (0 if bias is None else bias)
        torch.testing.assert_close(written, written_vectors(parts.down_proj)[5], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_untrained_twin(family: str) -> None:
    subject = from_model(tiny_model(family, torch.float64), None, family)
    state = torch.get_rng_state()
    twin, same, other = (untrained_twin(subject, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert twin.sha256 == same.sha256 != other.sha256
    assert twin.name == f"{family}-untrained-0"
    assert twin.dtype == torch.float64
    assert twin.model.config.to_dict() == subject.model.config.to_dict()
    assert find_parts(twin.model, None, "x").sha256 != subject.sha256
