"""Devices by name, and how much of their memory is free."""

from pathlib import Path

import pytest
import torch

from companion.base import device
from companion.base.device import free_memory
from companion.base.errors import InputError

GB = 10**9
WRONG = {
    "gpu": "device 'gpu' does not exist; expected auto, cpu, cuda or cuda:N",
    "cuda:99": "--device cuda:99: torch sees .* here.*; use --device cpu or auto",
    "mps": "lacks float64",
    "xpu": "torch sees no xpu device here",
}


@pytest.mark.parametrize(("name", "message"), WRONG.items())
def test_a_device_that_cannot_be_used_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        device.resolve(name)


def test_auto_is_the_first_gpu_or_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, found in ((0, "cpu"), (2, "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert str(device.resolve("auto")) == found
    assert str(device.resolve("cuda:1")) == "cuda:1"


def system(place: Path, monkeypatch: pytest.MonkeyPatch, own: str, groups: dict[str, tuple[str, int, int]]) -> int:
    """Free memory on a machine with 100 GB of it and these control groups: limit, GB used, GB of them files."""
    (place / "meminfo").write_text(f"MemTotal: {128 * GB // 1024} kB\nMemAvailable: {100 * GB // 1024} kB\n")
    (place / "own").write_text(own)
    for folder, (limit, used, files) in groups.items():
        names = device.VERSIONS[folder.startswith("memory")][1:]
        texts = (f"{limit}\n", f"{used * GB}\n", f"anon 1\n{names[2]} {files * GB}\n")
        (place / "groups" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in zip((*names[:2], "memory.stat"), texts, strict=True):
            (place / "groups" / folder / name).write_text(text)
    for name, file in (("MEMINFO", "meminfo"), ("OWN_GROUPS", "own"), ("GROUPS", "groups")):
        monkeypatch.setattr(device, name, place / file)
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


@pytest.mark.parametrize(("own", "groups", "free"), LIMITS.values(), ids=LIMITS)
def test_a_containers_limits_count_but_not_its_cached_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, groups: dict, free: int
) -> None:
    assert system(tmp_path, monkeypatch, own, groups) == free


def test_free_memory_where_linux_says_nothing_and_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEMINFO", "OWN_GROUPS", "GROUPS"):
        monkeypatch.setattr(device, name, tmp_path / "none")
    monkeypatch.setattr(device.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert free_memory(torch.device("cpu")) == 4096000
    free = [10]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(15))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 100))
    assert free_memory(torch.device("cuda:0")) == 15
