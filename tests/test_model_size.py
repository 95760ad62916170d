"""What a model needs before it is loaded, where its layers lie, and that waiting layers change no number."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from families import tiny_model, tiny_tokenizer, tokens

from companion.base.errors import InputError
from companion.model import activations, memory, replay
from companion.model.architecture import find_parts
from companion.model.interventions import Patch
from companion.model.load import load
from companion.model.memory import USABLE, _names, free_memory, needs, on_meta, placement
from companion.model.verify import verify

GPU = torch.device("cuda:0")
GB = 10**9


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    tiny_tokenizer(place)
    tiny_model(request.param).save_pretrained(place)
    return place


def with_memory(monkeypatch: pytest.MonkeyPatch, gpu: float, cpu: float) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: int((gpu if device.type == "cuda" else cpu) / USABLE) + 1)


def test_shapes_are_those_of_the_loaded_model(folder: Path) -> None:
    shapes, real = on_meta(folder, torch.float32), load(folder)
    assert all(p.is_meta for p in shapes.model.parameters())
    assert {n: p.shape for n, p in shapes.model.named_parameters()} == {
        n: p.shape for n, p in real.model.named_parameters()
    }
    weights = sum(p.numel() for p in real.model.parameters())
    assert needs(shapes).weights == 4 * weights and needs(shapes).copies == 8 * weights
    half = needs(on_meta(folder, torch.bfloat16))
    assert (half.weights, half.copies) == (2 * weights, 6 * weights)
    assert needs(shapes, 128).sweep > needs(shapes, 32).sweep > 0


def test_an_8b_model_in_float32_needs_two_copies_of_32_gb(tmp_path: Path) -> None:
    """The shapes of a Llama with 8.03 billion parameters, in no memory at all."""
    hf.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    asked = needs(on_meta(tmp_path, torch.float32))
    assert asked.weights == pytest.approx(4 * 8.03e9, rel=0.001)
    assert 2.0 < asked.total / asked.weights < 2.3


def test_layers_wait_only_as_far_as_they_must(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = on_meta(folder, torch.float32)
    asked = needs(shapes)
    layer = 2 * sum(4 * p.numel() for p in shapes.layers[0].block.parameters())
    for short, away in ((-1, None), (1, 1), (layer, 1), (layer + 1, 2), (3 * layer, 3)):
        with_memory(monkeypatch, asked.total - short, 1e9)
        where = placement(shapes, GPU)
        assert (where and list(where.values()).count("cpu")) == away, short
    blocks = [name for name, module in shapes.model.named_modules() if module in [p.block for p in shapes.layers]]
    assert [where[name] for name in blocks] == ["cpu"] * 3 + ["cuda:0"]
    covered = [n for n, _ in shapes.model.named_parameters() if any(n.startswith(f"{name}.") for name in where)]
    assert covered == [n for n, _ in shapes.model.named_parameters()]


@pytest.mark.parametrize(("gpu", "cpu"), [(0, 1e9), (0.9, 0)])
def test_what_fits_nowhere_is_refused_with_sizes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: float, cpu: float
) -> None:
    shapes = on_meta(folder, torch.float32)
    with_memory(monkeypatch, gpu * needs(shapes).total, cpu)
    with pytest.raises(InputError, match=r"too large for cuda:0: weights 0.0 GB.*--dtype bfloat16"):
        placement(shapes, GPU)


def test_a_model_on_the_cpu_has_nowhere_to_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = on_meta(folder, torch.bfloat16)
    with_memory(monkeypatch, 0, needs(shapes).total - 1)
    with pytest.raises(InputError, match="too large for cpu") as caught:
        load(folder, dtype="bfloat16")
    assert "--dtype" not in str(caught.value)


def test_waiting_layers_change_no_number(folder: Path, tmp_path: Path) -> None:
    """Layers kept outside of the model and brought in for each call, as on a GPU that is too small; here from the disk."""
    shapes = on_meta(folder, torch.float32)
    names = _names(shapes, ["cpu"] * 3, "cpu:0")
    where = {name: "disk" if place == "cpu" else "cpu" for name, place in names.items()}
    assert list(where.values()).count("disk") == 3
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=where, offload_folder=tmp_path
    )
    away = find_parts(model.eval().requires_grad_(False), None, "away", "x")
    assert sum(p.is_meta for p in away.model.parameters()) > 0
    verify(away)
    here = load(folder)
    last = torch.zeros(3, 9, dtype=torch.bool)
    last[:, -1] = True
    patches = [
        Patch(site, 1, last, 3 if site in ("head", "neuron") else None) for site in ("neuron", "head", "mlp_out")
    ]
    one, two = (
        replay.interchange(s, activations.clean_run(s, tokens()), activations.clean_run(s, tokens(seed=1)), patches)
        for s in (away, here)
    )
    torch.testing.assert_close(one, two)


def system(place: Path, monkeypatch: pytest.MonkeyPatch, own: str, groups: dict[str, tuple[str, int, int]]) -> int:
    """Free memory on a machine with 100 GB of it and these control groups: limit, GB used, GB of them files."""
    (place / "meminfo").write_text(f"MemTotal: {128 * GB // 1024} kB\nMemAvailable: {100 * GB // 1024} kB\n")
    (place / "own").write_text(own)
    for folder, (limit, used, files) in groups.items():
        first = folder.startswith("memory")
        names = (
            ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
            if first
            else ("max", "current", "inactive_file")
        )
        (place / "groups" / folder).mkdir(parents=True, exist_ok=True)
        (place / "groups" / folder / f"memory.{names[0]}").write_text(f"{limit}\n")
        (place / "groups" / folder / f"memory.{names[1]}").write_text(f"{used * GB}\n")
        (place / "groups" / folder / "memory.stat").write_text(f"anon 1\n{names[2]} {files * GB}\n")
    for name, file in (("MEMINFO", "meminfo"), ("OWN_GROUPS", "own"), ("GROUPS", "groups")):
        monkeypatch.setattr(memory, name, place / file)
    return round(free_memory(torch.device("cpu")) / GB)


BIG = str(2**63 - 4096)  # what the first version says where there is no limit
LIMITS: dict[str, tuple[str, dict[str, tuple[str, int, int]], int]] = {
    "no groups": ("", {}, 100),
    "no limit": ("0::/\n", {"": ("max", 50, 0)}, 100),
    "files are given back": ("0::/\n", {"": (str(40 * GB), 35, 20)}, 25),
    "its own group": ("0::/job/step\n", {"job": ("max", 9, 0), "job/step": (str(16 * GB), 5, 1)}, 12),
    "a parent's limit": ("0::/job/step\n", {"job": (str(20 * GB), 18, 1), "job/step": (str(16 * GB), 5, 1)}, 3),
    "not another's": ("0::/job\n", {"job": (str(20 * GB), 5, 0), "other": (str(2 * GB), 1, 0)}, 15),
    "above what is seen": ("0::/../x\n", {"": (str(8 * GB), 1, 0), "../x": (str(2 * GB), 1, 0)}, 7),
    "a group that is not mounted": ("0::/docker/1a\n", {"": (str(8 * GB), 1, 0)}, 7),
    "first version": ("4:cpu,memory:/d\n0::/\n", {"memory": (BIG, 60, 0), "memory/d": (str(9 * GB), 6, 2)}, 5),
    "first version, other kind": ("4:cpu:/d\n", {"memory": (BIG, 60, 0), "memory/d": (str(9 * GB), 6, 2)}, 100),
    "more used than allowed": ("0::/\n", {"": (str(4 * GB), 5, 0)}, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMITS)
def test_a_containers_limits_count_but_not_its_cached_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    own, groups, free = LIMITS[case]
    assert system(tmp_path, monkeypatch, own, groups) == free


def test_free_memory_where_linux_says_nothing_is_all_of_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MEMINFO", "OWN_GROUPS", "GROUPS"):
        monkeypatch.setattr(memory, name, tmp_path / "none")
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert free_memory(torch.device("cpu")) == 4096000


def test_what_this_process_gave_up_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"free": 10, "given up": 5}

    def empty() -> None:
        held.update(free=held["free"] + held["given up"])

    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (held["free"], 100))
    assert free_memory(GPU) == 15
