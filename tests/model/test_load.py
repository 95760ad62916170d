"""Loading: names, folders, precisions; and every folder that is no sound model gives one sentence, never a traceback."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import tiny_model, tiny_tokenizer, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from companion.base import folders, paths
from companion.base.errors import InputError
from companion.base.paths import ORGANISM, PROMPTS
from companion.mediation.study import begin
from companion.model import activations, readout
from companion.model.architecture import find_parts
from companion.model.load import from_model, load, load_tokenizer, untrained_twin
from companion.prompts.pairs import load_set
from companion.prompts.tokens import tokenize
from companion.run.settings import check_pairs

MODEL = ORGANISM / "window-0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Qwen2, half precision, with a tokenizer, as `save_pretrained` writes it."""
    place = tmp_path / "tiny"
    tiny_tokenizer(place)
    tiny_model("qwen2").half().save_pretrained(place)
    return place


def test_a_half_precision_folder_is_computed_in_float32(folder: Path) -> None:
    subject = load(folder)
    assert subject.dtype == torch.float32 and subject.tokenizer is not None
    assert (subject.n_layers, subject.n_heads, subject.d_model, subject.d_mlp) == (4, 4, 32, 48)
    assert not subject.model.training
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    plain = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    run = activations.clean_run(subject, tokens())
    torch.testing.assert_close(readout.logits(subject, run.resid_post[-1]), plain(tokens()).logits)


def test_a_model_without_a_tokenizer_is_loaded_and_has_none(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load(folder).tokenizer is None
    with pytest.raises(InputError, match="has no tokenizer: save it into the model's folder"):
        load_tokenizer(folder)


def test_the_hash_is_of_the_weights(folder: Path) -> None:
    first = load(folder)
    assert len(first.sha256) == 64
    for dtype in ("float64", "bfloat16"):
        other = load(folder, dtype=dtype)
        assert (other.dtype, other.sha256) == (getattr(torch, dtype), first.sha256)
    weights(folder, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1})
    assert load(folder).sha256 != first.sha256
    assert from_model(tiny_model("llama")).sha256 == from_model(tiny_model("llama")).sha256
    assert from_model(tiny_model("llama")).sha256 != from_model(tiny_model("phi3")).sha256


def test_names_of_shipped_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "ORGANISM", folder.parent)
    shutil.copytree(folder, folder.parent / "window-0")
    shutil.copytree(folder, folder.parent / "full-2")
    assert load("embedded").sha256 == load("window-0").sha256 == load("full-2").sha256
    known = "no model 'window-7': neither a folder nor one of embedded, full-2, tiny, window-0"
    with pytest.raises(InputError, match=known):
        load("window-7")


def weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def dangling_link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder.parent / "nowhere.safetensors")


def torn(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


NORM, UP = "model.norm.weight", "model.layers.2.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; expected a model folder"),
    "no JSON": (lambda f: (f / "config.json").write_text('{\n"a": 1,,\n}'), "config.json is not valid JSON .line 2"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pickled \(pytorch_model.bin\), which can run code; expected [*].safetensors",
    ),
    "pickled under another name": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."), "could not be loaded"
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "it has no weights; expected"),
    "torn": (torn, "could not be loaded: .*is it complete"),
    "dangling link": (dangling_link, "could not be loaded"),
    "no tensor": (lambda f: weights(f, lambda t: {n: t[n] for n in t if n != UP}), f"lacks 1 tensors, among them {UP}"),
    "other shape": (lambda f: weights(f, lambda t: t | {NORM: torch.ones(16)}), "could not be loaded|lacks 1 tensors"),
    "other width": (lambda f: config(f, hidden_size=64), "lacks|could not be loaded"),
    "more layers": (lambda f: config(f, num_hidden_layers=99, layer_types=None), "lacks|could not be loaded"),
    "own code": (lambda f: config(f, model_type="unheard_of", auto_map={"AutoModel": "m.M"}), "code of its own"),
    "not causal": (lambda f: config(f, architectures=["BertModel"]), "holds BertModel, not a causal language model"),
    "unnamed": (lambda f: config(f, architectures=None), "holds no named architecture"),
    "unknown": (lambda f: config(f, model_type="unheard_of"), "could not be loaded: .*architecture known"),
    "fewer layers than weights": (
        lambda f: config(f, num_hidden_layers=2, layer_types=None, max_window_layers=0),
        "24 tensors of its weights have no place in the model .*, among them model.layers.2.input_layernorm.weight",
    ),
    "lost biases": (
        lambda f: weights(f, lambda t: t | {"model.layers.1.self_attn.o_proj.bias": torch.ones(32)}),
        "1 tensors of its weights have no place .*o_proj.bias; take the config.json that belongs to these weights",
    ),
    "an adapter beside the weights": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "never merged unasked: .* as --adapter",
    ),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_folder_is_said(folder: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_buffers_that_old_checkpoints_hold_do_no_harm(folder: Path) -> None:
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    weights(folder, lambda tensors: tensors | {rotary: torch.ones(4)})
    load(folder)


def small_vocabulary(folder: Path) -> None:
    """Weights for fewer tokens than the tokenizer has."""
    n = json.loads((folder / "config.json").read_text())["vocab_size"]
    weights(folder, lambda tensors: {k: v[:10].clone() if v.shape[:1] == (n,) else v for k, v in tensors.items()})
    config(folder, vocab_size=10)


def short_context(folder: Path) -> None:
    """Fewer positions than a prompt with its answer takes; a learned table of them would end in an index error."""
    config(folder, max_position_embeddings=30)


def template(folder: Path, text: str) -> None:
    kept = json.loads((folder / "tokenizer_config.json").read_text())
    kept.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    (folder / "chat_template.jinja").write_text(text)


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "small vocabulary": (small_vocabulary, "tokenizer gives token .*they do not belong together"),
    "short context": (short_context, "reads at most 30 tokens, and a prompt with its answer takes up to"),
    "broken template": (
        lambda f: template(f, "{% for m in messages %}{{ m.content }"), "chat template cannot render one user turn .*Error"
    ),
    "template that refuses": (
        lambda f: template(f, "{{ raise_exception('only tools may speak') }}"),
        "chat template cannot render one user turn .*only tools may speak",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_model_that_does_not_fit_the_prompts_is_named(tmp_path: Path, case: str) -> None:
    damage, message = UNFIT[case]
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    damage(folder)
    with pytest.raises(InputError, match=message):
        folders.check_model(str(folder))
        begin(str(folder), "embedded", "x", pairs=10)


def test_pairs_are_checked_as_the_profile_takes_them(tmp_path: Path) -> None:
    """The smoke profile takes the first of each kind, which may be unusable where later ones are not."""
    topics = [pair for pair in load_set("embedded").pairs if pair.treatment == "T1"][:60]
    rows = [
        {"id": pair.id, "treatment": "T1", "topic": pair.topic, "control": pair.control, "treated": pair.treated}
        for pair in topics
    ]
    for row in rows[:50]:
        row["treated"] += " please"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = json.loads((PROMPTS / "embedded" / "outcome.json").read_text())
    (tmp_path / "outcome.json").write_text(json.dumps(outcome.get("T1", outcome)))
    assert check_pairs("embedded", str(tmp_path), 0, "full")[0].startswith("10 of 60 pairs usable")
    with pytest.raises(InputError, match="usable"):
        check_pairs("embedded", str(tmp_path), 0, "smoke")


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """A LoRA of random weights, trained (so to speak) on the tiny Qwen2."""
    torch.manual_seed(1)
    base = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged_in_float32_where_it_is_asked_for(folder: Path, adapter: Path) -> None:
    name = f"{folder}+{adapter}"
    assert folders.split_adapter(name) == (str(folder), adapter) and folders.model_folder(name) == folder
    merged = load(name)
    plain = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(plain, str(adapter))(tokens()).logits  # beside the weights, not in them
    torch.testing.assert_close(merged.model(tokens()).logits, wanted, rtol=1e-4, atol=1e-4)
    assert merged.facts is not None and merged.facts.adapter == adapter.name
    assert len({merged.sha256, load(folder).sha256, adapter_scaled(name, adapter, 4).sha256}) == 3
    adapter_scaled(name, adapter, 8)
    half = load(name, dtype="bfloat16").model.state_dict()  # rounded once, behind the sum
    assert all(torch.equal(half[key], tensor.bfloat16()) for key, tensor in merged.model.state_dict().items())


def adapter_scaled(name: str, adapter: Path, alpha: int) -> Any:
    """The same adapter added more or less strongly, which its config alone says."""
    kept = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(kept | {"lora_alpha": alpha}))
    return load(name)


def other_adapter(adapter: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(change(load_file(adapter / "adapter_model.safetensors")), adapter / "adapter_model.safetensors")


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "weights are pickled"),
    "another kind": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "of type IA3; only LORA"),
    "of other layers": (
        lambda f: other_adapter(f, lambda t: {k.replace("layers.3", "layers.9"): v for k, v in t.items()}),
        "does not belong to .*: 8 of its tensors or of the model's have no counterpart",
    ),
    "of another width": (lambda f: other_adapter(f, lambda t: {k: v[:, :8].contiguous() for k, v in t.items()}), "merged into"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE)
def test_an_adapter_that_does_not_fit_is_refused(folder: Path, adapter: Path, case: str) -> None:
    damage, message = STRANGE[case]
    damage(adapter)
    with pytest.raises(InputError, match=message):
        load(f"{folder}+{adapter}")


def test_links_to_weights_elsewhere_are_followed(tmp_path: Path) -> None:
    """Download caches consist of links; what they lead to is what is hashed."""
    for path in MODEL.iterdir():
        (tmp_path / path.name).symlink_to(path)
    folders.check_model(str(tmp_path))
    assert load(tmp_path).sha256 == load(MODEL).sha256


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.floats(0, 1),
    name=st.sampled_from(["config.json", "tokenizer.json", "model.safetensors"]),
    cut=st.booleans(),
)
def test_damage_anywhere(tmp_path: Path, place: float, name: str, cut: bool) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in MODEL.iterdir():
        os.link(path, folder / path.name) if path.name != name else shutil.copy2(path, folder)
    data = (folder / name).read_bytes()
    at = int(place * (len(data) - 1))
    (folder / name).write_bytes(data[:at] if cut else data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    try:
        folders.check_model(str(folder))
        one = load(folder)
        assert one.tokenizer is not None
        tokenize(load_set("embedded").pairs[:20], one.tokenizer)
    except InputError as error:
        assert len(str(error)) > 15


def test_a_known_family_that_brings_code_is_run_with_the_librarys_own(folder: Path) -> None:
    config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran foreign code')")
    assert type(load(folder).model) is hf.Qwen2ForCausalLM


def test_wrong_names_of_precisions(folder: Path) -> None:
    with pytest.raises(InputError, match="dtype 'float16' is not one of float32, float64, bfloat16"):
        load(folder, dtype="float16")
    assert load(folder, device="auto").device.type in ("cpu", "cuda")


def test_an_architecture_with_other_names_is_refused_with_what_to_do() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    unknown = "unknown architecture: GPTNeoXForCausalLM has none of model, transformer; known are"
    with pytest.raises(InputError, match=unknown):
        from_model(hf.AutoModelForCausalLM.from_config(hf.GPTNeoXConfig(vocab_size=61, **sizes)))
    with pytest.raises(InputError, match="BertModel has no unembedding"):
        from_model(hf.BertModel(hf.BertConfig(**sizes)))


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
