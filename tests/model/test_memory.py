"""What a model needs before it is loaded, where its layers lie, and how much runs at once."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers as hf
from models import tiny_model, tiny_subject, tiny_tokenizer
from oracles import PeakMemory, every_patch, mask, runs

from companion.base.errors import InputError
from companion.model import activations, memory, replay
from companion.model.architecture import Subject, find_parts
from companion.model.interventions import Patch
from companion.model.load import load
from companion.model.memory import USABLE, on_meta, placement, run_memory, sweep_memory

GPU = torch.device("cuda:0")


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny_tokenizer(place := tmp_path_factory.mktemp(request.param))
    tiny_model(request.param).save_pretrained(place)
    return place


def with_memory(monkeypatch: pytest.MonkeyPatch, gpu: float, cpu: float) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: int((gpu if device.type == "cuda" else cpu) / USABLE) + 1)


def test_shapes_and_sizes_are_those_of_the_loaded_model(folder: Path) -> None:
    shapes, real = on_meta(folder, torch.float32), load(folder)
    assert all(p.is_meta for p in shapes.model.parameters())
    named, wanted = ({n: p.shape for n, p in one.model.named_parameters()} for one in (shapes, real))
    assert named == wanted
    weights = sum(p.numel() for p in real.model.parameters())
    assert (run_memory(shapes).weights, run_memory(shapes).copies) == (4 * weights, 8 * weights)
    assert memory.token_budget(shapes, 32) == memory.token_budget(real, 32) < memory.token_budget(real, 64)
    half = run_memory(on_meta(folder, torch.bfloat16))
    assert (half.weights, half.copies) == (2 * weights, 6 * weights)


def test_layers_wait_only_as_far_as_they_must_and_can(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = on_meta(folder, torch.float32)
    asked = run_memory(shapes)
    layer = 2 * sum(4 * p.numel() for p in shapes.layers[0].block.parameters())
    for short, away in ((-1, None), (1, 1), (layer, 1), (layer + 1, 2), (3 * layer, 3)):
        with_memory(monkeypatch, asked.total - short, 1e9)
        where = placement(shapes, GPU)
        assert (where and list(where.values()).count("cpu")) == away, short
    blocks = [name for name, module in shapes.model.named_modules() if module in [p.block for p in shapes.layers]]
    assert [where[name] for name in blocks] == ["cpu"] * 3 + ["cuda:0"]
    covered = [n for n, _ in shapes.model.named_parameters() if any(n.startswith(f"{name}.") for name in where)]
    assert covered == [n for n, _ in shapes.model.named_parameters()]
    for gpu, cpu in ((0, 1e9), (0.9, 0)):
        with_memory(monkeypatch, gpu * asked.total, cpu)
        with pytest.raises(InputError, match=r"too large for cuda:0: weights 0.0 GB.*--dtype bfloat16"):
            placement(shapes, GPU)
    with_memory(monkeypatch, 0, run_memory(on_meta(folder, torch.bfloat16)).total - 1)
    with pytest.raises(InputError, match="too large for cpu") as caught:  # there is nowhere to wait
        load(folder, dtype="bfloat16")
    assert "--dtype" not in str(caught.value)


def test_layers_go_to_other_gpus_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    shapes = on_meta(tmp_path, torch.float32)
    asked = run_memory(shapes)
    layer = 2 * sum(4 * p.numel() for p in shapes.layers[0].block.parameters())
    free = {"cuda:1": asked.sweep + layer, "cuda:2": asked.sweep - 1, "cpu": asked.weights + layer}
    free["cuda"] = free["cuda:0"] = asked.total - 2 * layer
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free[str(device)] / USABLE) + 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    where = placement(shapes, torch.device("cuda"))
    assert [where[f"model.layers.{i}"] for i in range(4)] == ["cuda:1", "cpu", "cuda", "cuda"]
    said = memory.check_size(tmp_path, "cuda", "float32")
    assert "1 of 4 layers lie on other GPUs; 1 of 4 layers wait in the processor's memory" in said
    free["cpu"] = asked.weights + layer - 9
    with pytest.raises(InputError, match=r"too large for cuda: .* of cuda:1 and 0.0 GB of cuda:2 and"):
        placement(shapes, torch.device("cuda"))
    with pytest.raises(InputError, match="too large for cuda:0") as caught:  # one GPU, by its number
        placement(shapes, GPU)
    assert "cuda:1" not in str(caught.value)


@pytest.fixture(scope="module")
def shaped() -> Subject:
    """The proportions of a real model, small."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=61, num_key_value_heads=4, **sizes)
    return find_parts(hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False), None, "shaped")


@pytest.mark.parametrize("columns", [[[31]], [[16], [28]]])
def test_peak_memory_stays_below_one_and_a_half_clean_runs(shaped: Subject, columns: list[list[int]]) -> None:
    """Both clean runs of a pair (without neurons) and the sweep together, against one clean run with all sites."""
    tokens = torch.randint(0, 61, (2, 4, 32), generator=torch.Generator().manual_seed(0))
    with PeakMemory() as memory:
        full = activations.clean_run(shaped, tokens[0])
        all_sites = memory.live()
    del full
    kept = ("resid", "attn_out", "mlp_out", "z")
    need = sweep_memory(shaped, 4, 32)
    assert need.clean_run == pytest.approx(all_sites, rel=0.1)
    sites = [("resid_post", None), ("attn_out", None), ("mlp_out", None), *(("head", head) for head in range(4))]
    masks = [mask(column, 4, 32) for column in columns]
    patches = [Patch(site, layer, where, i) for where in masks for layer in range(8) for site, i in sites]
    with PeakMemory() as memory:
        base = activations.clean_run(shaped, tokens[0], keep=(*kept, "cache"))
        source = activations.clean_run(shaped, tokens[1], keep=kept)
        before = memory.live()
        replay.interchange(shaped, base, source, patches, readout=lambda resid: resid[..., :1].clone())
    assert memory.peak < 1.5 * all_sites
    assert memory.peak - before < need.sweep * 1.1


def too_many(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A sweep that runs out of memory beyond `limit` interventions, as the allocators of GPU and CPU say it."""
    seen, plain = [], replay.sweep
    errors = (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA"))

    def sweep(both: object, chunk: list, read: torch.Tensor) -> torch.Tensor:
        seen.append(len(chunk))
        if len(chunk) > limit:
            raise errors[len(seen) % 2]
        return plain(both, chunk, read)

    monkeypatch.setattr(replay, "sweep", sweep)
    return seen


def test_chunks_do_not_change_the_result_and_out_of_memory_halves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, patches = tiny_subject("qwen2", torch.float64), every_patch((0, 2))
    pair = runs(subject)
    whole = replay.interchange(subject, *pair, patches)
    with monkeypatch.context() as patched:
        patched.setattr(replay, "token_budget", lambda *_: 1)
        torch.testing.assert_close(replay.interchange(subject, *pair, patches), whole, rtol=0, atol=1e-6)
    n_events = len(memory.events)
    seen = too_many(2, monkeypatch)
    with pytest.warns(UserWarning, match="out of memory with .* interventions at once; went on with half as many"):
        halved = replay.interchange(subject, *pair, patches)
    torch.testing.assert_close(halved, whole, rtol=0, atol=1e-6)
    assert len(memory.events) - n_events == sum(size > 2 for size in seen) > 0


@pytest.mark.filterwarnings("ignore:out of memory")
def test_one_intervention_too_large_is_an_error_with_advice_and_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("llama")
    pair, patches = runs(subject), [Patch("mlp_out", 0, mask([8]))]
    too_many(0, monkeypatch)
    with pytest.raises(InputError, match="use fewer pairs at a time"):
        replay.interchange(subject, *pair, patches)
    monkeypatch.setattr(replay, "sweep", mock.Mock(side_effect=RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="shapes cannot"):
        replay.interchange(subject, *pair, patches)
