"""The parts of all families and the self-check: what it refuses and finds out, also where layers lie elsewhere."""

import copy
import json
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from models import FAMILIES, tiny_model, tiny_subject, tokens
from oracles import mask, runs
from torch import nn

from companion.base.errors import InputError
from companion.model import architecture, memory, replay
from companion.model.activations import on_input, on_output
from companion.model.architecture import Subject, find_parts, hash_tensors, written_vectors
from companion.model.interventions import Patch
from companion.model.load import from_model
from companion.model.verify import check_sites, verify

# ---- verify ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str, dtype: torch.dtype) -> None:
    from_model(tiny_model(family, dtype))


def counted(x: torch.Tensor) -> torch.Tensor:
    """Scaled by the number of tokens that are computed: right in a full forward, wrong in a replay."""
    return x * x.shape[1] / 10


def interleaved(heads: torch.Tensor) -> torch.Tensor:
    return heads.view(*heads.shape[:2], 4, 8).mT.flatten(2)


# A part of the model, whether what it reads or what it gives is changed, how, and the refusal.
SPOILED = [
    ("model.layers.2", on_output, lambda x: 0.9 * x, "resid_pre [+] attn_out [+] mlp_out is not resid_post in layer 2"),
    ("model.layers.1.self_attn", on_output, counted, "a replay of its layers differs .* use a model of a known family"),
    ("lm_head", on_output, lambda x: 0.5 * x, "do not give the model's logits"),
    ("model.layers.3.mlp.down_proj", on_output, lambda x: x * float("nan"), "NaN or infinity"),
    ("model.layers.2.self_attn.o_proj", on_input, interleaved, "the heads of layer 2 do not lie side by side"),
    ("model.layers.0.mlp.down_proj", on_output, lambda x: x + 0.1 * x.pow(2), "mlp_out is no linear map of neuron .* in layer 0"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "hook", "change", "message"), SPOILED, ids=[part for part, *_ in SPOILED])
def test_what_cannot_be_replayed_is_refused(part, hook, change, message: str) -> None:
    model = tiny_model("llama")
    from_model(model)
    hook(model.get_submodule(part), change)
    with pytest.raises(InputError, match=message):
        from_model(model)


def test_an_mlp_that_also_reads_the_stream_below_its_block_is_refused() -> None:
    """The block's sum holds; what the MLP reads is another thing."""
    model, seen = tiny_model("llama"), []
    on_input(model.model.layers[1].input_layernorm, seen.append)
    on_input(model.model.layers[1].mlp, lambda x: x + 0.5 * seen[-1])
    with pytest.raises(
        InputError, match="the MLP, given the stream behind attention, writes something else in layer 1"
    ):
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
