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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import edit_json, tiny_model, tiny_tokenizer, tokens
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

MODEL, FILE, LORA = ORGANISM / "window-0", "model.safetensors", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Qwen2, half precision, with a tokenizer, as `save_pretrained` writes it."""
    tiny_tokenizer(tmp_path / "tiny")
    tiny_model("qwen2").half().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


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


def weights(place: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = place if place.is_file() else place / FILE
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def config(folder: Path, **fields: object) -> None:
    edit_json(folder / "config.json", **fields)


def test_a_half_precision_folder_is_computed_in_float32_and_needs_no_tokenizer(folder: Path) -> None:
    subject = load(folder, device="auto")
    assert subject.dtype == torch.float32 and subject.tokenizer is not None and subject.device.type in ("cpu", "cuda")
    assert (subject.n_layers, subject.n_heads, subject.d_model, subject.d_mlp) == (4, 4, 32, 48)
    assert not subject.model.training
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    plain = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(subject.device)
    run = activations.clean_run(subject, tokens().to(subject.device))
    torch.testing.assert_close(readout.logits(subject, run.resid_post[-1]), plain(run.tokens).logits)
    with pytest.raises(InputError, match="dtype 'float16' is not one of float32, float64, bfloat16"):
        load(folder, dtype="float16")
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
    weights(folder, lambda tensors: tensors | {NORM: tensors[NORM] + 1})
    assert load(folder).sha256 != first.sha256
    llama, again, phi = (from_model(tiny_model(family)).sha256 for family in ("llama", "llama", "phi3"))
    assert llama == again != phi


def test_names_of_shipped_models_and_links_to_weights_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (paths, folders):
        monkeypatch.setattr(module, "ORGANISM", folder.parent)
    shutil.copytree(folder, folder.parent / "window-0")
    (folder.parent / "full-2").mkdir()
    for path in folder.iterdir():
        (folder.parent / "full-2" / path.name).symlink_to(path)
    assert load("embedded").sha256 == load("window-0").sha256 == load("full-2").sha256
    with pytest.raises(
        InputError, match="no model 'window-7': neither a folder nor one of embedded, full-2, tiny, window"
    ):
        load("window-7")


NORM, UP, BIAS = "model.norm.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.bias"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; expected a model folder"),
    "no JSON": (lambda f: (f / "config.json").write_text('{\n"a": 1,,\n}'), "config.json is not valid JSON: line 2"),
    "pickled": (lambda f: (f / FILE).rename(f / "pytorch_model.bin"), r"pickled \(pytorch_model.bin\), which can run code"),
    "pickled under another name": (lambda f: (f / FILE).write_bytes(b"\x80\x04cos\nsystem\n(S'x'\ntR."), "could not be loaded"),
    "no weights": (lambda f: (f / FILE).unlink(), "it has no weights; expected"),
    "torn": (lambda f: os.truncate(f / FILE, 1000), "could not be loaded: .*is it complete"),
    "dangling link": (lambda f: (f / FILE).rename(f / "x") and (f / FILE).symlink_to(f / "y"), "could not be loaded"),
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
    "lost biases": (lambda f: weights(f, lambda t: t | {BIAS: torch.ones(32)}), "1 tensors of its weights have no .*o_proj"),
    "adapter beside them": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "never merged unasked"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer cannot be loaded"),
}  # fmt: skip
STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled adapter": (lambda f: (f / LORA).rename(f / "adapter_model.bin"), "weights are pickled"),
    "another kind": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "of type IA3; only LORA"),
    "of other layers": (
        lambda f: weights(f / LORA, lambda t: {k.replace("layers.3", "layers.9"): v for k, v in t.items()}),
        "8 of its tensors or of the model's have no counterpart",
    ),
    "of another width": (lambda f: weights(f / LORA, lambda t: {k: v[:, :8].contiguous() for k, v in t.items()}), "merged into"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BROKEN, *STRANGE])
def test_what_is_wrong_with_a_folder_or_adapter_is_said(folder, request, case):
    damage, message = (BROKEN | STRANGE)[case]
    damaged = folder if case in BROKEN else request.getfixturevalue("adapter")
    damage(damaged)
    with pytest.raises(InputError, match=message):
        load(folder if case in BROKEN else f"{folder}+{damaged}")


def test_buffers_of_old_checkpoints_and_code_that_a_known_family_brings_do_no_harm(folder: Path) -> None:
    weights(folder, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran foreign code')")
    assert type(load(folder).model) is hf.Qwen2ForCausalLM


def small_vocabulary(folder: Path) -> None:
    n = json.loads((folder / "config.json").read_text())["vocab_size"]
    weights(folder, lambda tensors: {k: v[:10].clone() if v.shape[:1] == (n,) else v for k, v in tensors.items()})
    config(folder, vocab_size=10)


def template(folder: Path, text: str) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").write_text(text)


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "small vocabulary": (small_vocabulary, "tokenizer gives token .*they do not belong together"),
    "short context": (  # a learned table of positions would end in an index error
        lambda f: config(f, max_position_embeddings=30), "reads at most 30 tokens, and a prompt with its answer takes up to"
    ),
    "broken template": (lambda f: template(f, "{% for m in messages %}{{ m.content }"), "cannot render one user turn .*Error"),
    "template that refuses": (lambda f: template(f, "{{ raise_exception('only') }}"), "cannot render one user turn .*only"),
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
    pairs = [pair for pair in load_set("embedded").pairs if pair.treatment == "T1"][:60]
    names = ("id", "treatment", "topic", "control", "treated")
    rows = [{name: getattr(pair, name) for name in names} for pair in pairs]
    for row in rows[:50]:
        row["treated"] += " please"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(PROMPTS / "embedded" / "outcome.json", tmp_path)
    assert check_pairs("embedded", str(tmp_path), 0, "full")[0].startswith("10 of 60 pairs usable")
    with pytest.raises(InputError, match="usable"):
        check_pairs("embedded", str(tmp_path), 0, "smoke")


def test_an_adapter_is_merged_in_float32_where_it_is_asked_for(folder: Path, adapter: Path) -> None:
    name = f"{folder}+{adapter}"
    assert folders.split_adapter(name) == (str(folder), adapter) and folders.model_folder(name) == folder
    merged = load(name)
    plain = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(plain, str(adapter))(tokens()).logits  # beside the weights, not in them
    torch.testing.assert_close(merged.model(tokens()).logits, wanted, rtol=1e-4, atol=1e-4)
    assert merged.facts is not None and merged.facts.adapter == adapter.name
    base, stronger = (one.model.state_dict() for one in (load(folder), load(name, adapter_scale=1.5)))
    for key, tensor in merged.model.state_dict().items():
        torch.testing.assert_close(stronger[key] - base[key], 1.5 * (tensor - base[key]), rtol=1e-3, atol=1e-5)
    half = load(name, dtype="bfloat16").model.state_dict()  # rounded once, behind the sum
    assert all(torch.equal(half[key], tensor.bfloat16()) for key, tensor in merged.model.state_dict().items())
    edit_json(adapter / "adapter_config.json", lora_alpha=4)  # added less strongly, which its config alone says
    assert len({merged.sha256, load(folder).sha256, load(name).sha256}) == 3


FILES = st.sampled_from(["config.json", "tokenizer.json", "model.safetensors"])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), name=FILES, cut=st.booleans())
def test_damage_anywhere(tmp_path: Path, place: float, name: str, cut: bool) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MODEL, folder)
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


def test_a_model_without_an_unembedding_is_refused() -> None:
    with pytest.raises(InputError, match="BertModel has no unembedding"):
        from_model(hf.BertModel(hf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)))


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_untrained_twin(family: str) -> None:
    subject, state = from_model(tiny_model(family, torch.float64), None, family), torch.get_rng_state()
    twin, same, other = (untrained_twin(subject, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert twin.sha256 == same.sha256 != other.sha256
    assert (twin.name, twin.dtype) == (f"{family}-untrained-0", torch.float64)
    assert twin.model.config.to_dict() == subject.model.config.to_dict()
    assert find_parts(twin.model, None, "x").sha256 != subject.sha256
