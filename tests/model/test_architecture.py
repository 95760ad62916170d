"""The parts of all families; and a model whose layers lie elsewhere gives the numbers of one that lies in one place.

Another GPU is stood in for by another precision: a weight in float64 takes no part in a product with an activation in
float32, as one on another GPU takes none, unless what stands between them converts.
"""

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from families import FAMILIES, tiny_model, tiny_subject, tokens
from grid_tools import mask, runs
from torch import nn

from companion.base import errors
from companion.model import architecture, memory, replay
from companion.model.architecture import Subject, find_parts, hash_tensors, written_vectors
from companion.model.interventions import Patch
from companion.model.verify import verify

PATCHES = [Patch("neuron", 1, mask([8]), 3), Patch("head", 1, mask([8]), 3), Patch("mlp_out", 1, mask([8]))]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts(family: str) -> None:
    subject = tiny_subject(family)
    assert subject.post_norm == (family in ("gemma2", "gemma3", "olmo2"))
    assert subject.soft_cap == (5.0 if family == "gemma2" else None)
    for parts in subject.layers:
        assert written_vectors(parts.down_proj).shape == (48, 32)
        probe = torch.zeros(48)
        probe[5] = 1.0
        written = parts.down_proj(probe) - parts.down_proj(torch.zeros(48))
        torch.testing.assert_close(written, written_vectors(parts.down_proj)[5], atol=1e-5, rtol=1e-4)


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
    architecture.connect(model, {"model.embed_tokens": "cpu", "model.layers.0": "disk"})
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
