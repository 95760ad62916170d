"""The parts of all families and the self-check: what it refuses and finds out, also where layers lie elsewhere."""

import copy
import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as hf
from accelerate.hooks import AlignDevicesHook
from models import FAMILIES, tiny_model, tiny_subject, tokens
from oracles import mask, runs
from torch import nn

from companion.base import errors
from companion.base.errors import InputError
from companion.model import architecture, memory, replay
from companion.model.architecture import Subject, find_parts, hash_tensors, written_vectors
from companion.model.interventions import Patch
from companion.model.load import from_model
from companion.model.verify import check_sites, verify

# ---- verify ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str, dtype: torch.dtype) -> None:
    from_model(tiny_model(family, dtype))


def scaled_block(model: hf.PreTrainedModel) -> None:
    """A hidden factor on a block's output: what the hooks see is not what is added."""
    block = model.model.layers[2]
    plain = block.forward
    block.forward = lambda hidden_states, **kwargs: 0.9 * plain(hidden_states, **kwargs)


def position_counter(model: hf.PreTrainedModel) -> None:
    """Attention that scales by the length of what it is given: right in a full forward, wrong in a replay."""
    attn = model.model.layers[1].self_attn
    plain = type(attn).forward

    def forward(self, hidden_states, **kwargs):
        out, weights = plain(self, hidden_states, **kwargs)
        return out * hidden_states.shape[1] / 10, weights

    attn.forward = types.MethodType(forward, attn)


def scaled_logits(model: hf.PreTrainedModel) -> None:
    model.lm_head.register_forward_hook(lambda _, __, out: 0.5 * out)


def nan_weight(model: hf.PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")


def other_reader(model: hf.PreTrainedModel) -> None:
    """An MLP that also reads the stream below the block: the block's sum holds, what the MLP reads is another thing."""
    block = model.model.layers[1]
    seen = []
    block.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.mlp.register_forward_pre_hook(lambda _, args: (args[0] + 0.5 * seen[-1],))


def swapped_heads(model: hf.PreTrainedModel) -> None:
    """Entries of two heads lie interleaved in the output projection's input."""
    o_proj = model.model.layers[2].self_attn.o_proj
    o_proj.register_forward_pre_hook(lambda _, args: (args[0].view(*args[0].shape[:2], 4, 8).mT.flatten(2),))


def curved_projection(model: hf.PreTrainedModel) -> None:
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, out: out + 0.1 * out.pow(2))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (scaled_block, "resid_pre [+] attn_out [+] mlp_out is not resid_post in layer 2"),
        (position_counter, "a replay of its layers differs from the model itself .* use a model of a known family"),
        (scaled_logits, "do not give the model's logits"),
        (nan_weight, "NaN or infinity"),
        (other_reader, "the MLP, given the stream behind attention, writes something else in layer 1"),
        (swapped_heads, "the heads of layer 2 do not lie side by side"),
        (curved_projection, "mlp_out is no linear map of neuron entries in layer 0"),
    ],
)
def test_what_cannot_be_replayed_is_refused(spoil, message: str) -> None:
    model = tiny_model("llama")
    from_model(model)
    spoil(model)
    with pytest.raises(InputError, match=message):
        from_model(model)


def test_nan_fails_every_comparison() -> None:
    subject = tiny_subject("llama")
    run = runs(subject)[0]
    check_sites(subject, run)
    spoiled = replace(run, mlp_out=(*run.mlp_out[:2], run.mlp_out[2] * float("nan"), run.mlp_out[3]))
    with pytest.raises(InputError, match="off by nan of"):
        check_sites(subject, spoiled)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_flash_and_flex_attention_are_refused_with_what_to_do(name: str) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = name
    with pytest.raises(InputError, match="attn_implementation='sdpa' or 'eager'"):
        from_model(model)


def test_the_facts_say_what_was_found() -> None:
    facts = from_model(tiny_model("gemma2")).facts
    assert facts is not None and (facts.windows, facts.soft_cap, facts.norm_after) == ((3,), 5.0, True)
    assert (facts.heads, facts.key_heads, facts.tied, facts.ends) == (4, 2, False, {"2": ("generation config",)})
    assert 0 < facts.noise < 1e-5 and facts.tolerance == 1e-4
    coarse = from_model(tiny_model("llama", torch.bfloat16)).facts
    assert coarse is not None and coarse.tolerance > 0.05  # 30 times the noise of that precision
    assert json.loads(json.dumps(facts.manifest()))["noise"] == float(f"{facts.noise:.0e}") != facts.noise


def test_verify_leaves_the_model_as_it_was() -> None:
    subject = tiny_subject("gemma3")
    verify(subject)
    for module in subject.model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


# ---- architecture ----

PATCHES = [Patch("neuron", 1, mask([8]), 3), Patch("head", 1, mask([8]), 3), Patch("mlp_out", 1, mask([8]))]


class Elsewhere(AlignDevicesHook):
    """A place whose numbers are float64."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.double()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return tuple(one.double() for one in args), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output.float()


def apart(family: str, where: str) -> Subject:
    """The first three layers elsewhere: on "another GPU", or waiting as `accelerate` lets layers wait."""
    model = tiny_model(family)
    shapes = find_parts(copy.deepcopy(model), None, "shapes", "x")
    if where == "waiting":
        for parts in find_parts(model, None, "x", "x").layers[:3]:
            accelerate.cpu_offload(parts.block, execution_device=torch.device("cpu"))
    else:
        names = memory.name_places(shapes, [where] * 3, "cpu")
        architecture.connect(model, names, Elsewhere)
        model.hf_device_map = names
    return find_parts(model, None, "apart", "x")


def effects(subject: Subject) -> torch.Tensor:
    return replay.interchange(subject, *runs(subject), PATCHES)


@pytest.mark.parametrize("where", ["cuda:1", "waiting"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2"])
def test_no_number_changes_where_layers_lie_elsewhere(family: str, where: str) -> None:
    subject, here = apart(family, where), tiny_subject(family)
    assert all(p.is_meta or p.dtype == torch.float64 for p in subject.layers[0].block.parameters())
    verify(subject)
    torch.testing.assert_close(effects(subject), effects(here), rtol=1e-4, atol=1e-4)
    if where == "waiting":  # what waits is hashed where it waits
        assert hash_tensors(subject.model) == hash_tensors(here.model)
    torch.testing.assert_close(*(written_vectors(one.layers[0].down_proj) for one in (subject, here)))
    here.layers[0].o_proj.double()
    with pytest.raises(RuntimeError):  # what the stand-in rests on: numbers of two places do not mix unnoticed
        here.model(tokens())


def test_hooks_of_what_waits_are_sent_to_the_first_gpu() -> None:
    """With several GPUs the library lets waiting layers be computed on any of them."""
    model = tiny_model("llama")
    block = find_parts(model, None, "x", "x").layers[0].block
    accelerate.cpu_offload(block, execution_device=torch.device("meta"))
    architecture.connect(model, {"model.embed_tokens": "cpu", "model.layers.0": "cpu"})
    assert model(tokens()).logits.isfinite().all()


def test_layers_go_to_other_gpus_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    shapes = memory.on_meta(tmp_path, torch.float32)
    asked = memory.run_memory(shapes)
    layer = 2 * sum(4 * p.numel() for p in shapes.layers[0].block.parameters())
    free = {"cuda:1": asked.sweep + layer, "cuda:2": asked.sweep - 1, "cpu": asked.weights + layer}
    free["cuda"] = asked.total - 2 * layer
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free[str(device)] / memory.USABLE) + 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    where = memory.placement(shapes, torch.device("cuda"))
    assert where is not None
    assert [where[f"model.layers.{i}"] for i in range(4)] == ["cuda:1", "cpu", "cuda", "cuda"]
    said = memory.check_size(tmp_path, "cuda", "float32")
    assert "1 of 4 layers lie on other GPUs; 1 of 4 layers wait in the processor's memory" in said
    free["cpu"] = asked.weights + layer - 9
    with pytest.raises(errors.InputError, match=r"too large for cuda: .* of cuda:1 and 0.0 GB of cuda:2 and"):
        memory.placement(shapes, torch.device("cuda"))
    free["cuda:0"] = free["cuda"]
    with pytest.raises(errors.InputError, match="too large for cuda:0") as caught:  # one GPU, by its number
        memory.placement(shapes, torch.device("cuda:0"))
    assert "cuda:1" not in str(caught.value)
