"""The device that a run computes on: asked for by name, its memory, and what identifies it.

Only torch's own device modules are called, so any accelerator with float64 will do.
"""

from __future__ import annotations

import os
import subprocess
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.base.errors import InputError

HOST = torch.device("cpu")
MEMINFO, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# How the two versions of Linux's control groups name a folder, a limit, what is used, and what of it is a cache of files.
VERSIONS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def resolve(name: str) -> torch.device:
    """The device of this name, `auto` the first GPU or else the processor; InputError for one that is not there, and for mps."""
    if name == "auto":
        name = "cuda" if torch.cuda.device_count() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} does not exist; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return HOST
    if device.type == "mps":
        raise InputError("device 'mps' lacks float64, in which effects are summed; use --device cpu")
    there = count(device)
    if (device.index or 0) >= there:
        kind = "CUDA" if device.type == "cuda" else device.type
        have = f"{there} {kind} device{'s' * (there != 1)}" if there else f"no {kind} device"
        build = "; this torch was built without CUDA" if device.type == "cuda" and torch.version.cuda is None else ""
        raise InputError(f"--device {name}: torch sees {have} here{build}; use --device cpu or auto")
    return device


def make_exact(device: torch.device) -> None:
    """Full float32 on a GPU (no TF32), and kernels whose sums have one order, so that a rerun gives the same bits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if device.type != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it begins
        torch.use_deterministic_algorithms(True, warn_only=True)
        warnings.filterwarnings("ignore", "cumsum_cuda_kernel")  # `running_sum` avoids the case that it warns of


def count(device: torch.device) -> int:
    """How many devices of this kind there are."""
    try:
        return int(torch.get_device_module(device).device_count())
    except (AttributeError, RuntimeError):  # a kind that this torch was built without
        return 0


def to_host(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers in the processor's memory; bfloat16, which numpy lacks, as float32."""
    host = tensor.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy()


@dataclass
class Placed:
    """Numbers of the host that are copied once to each device and precision in which they are asked for."""

    numbers: np.ndarray
    _made: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def like(self, x: Tensor) -> Tensor:
        """Them where `x` lies, in its precision."""
        key = (x.device, x.dtype)
        if key not in self._made:
            self._made[key] = torch.as_tensor(self.numbers).to(x)
        return self._made[key]


def running_sum(x: Tensor, dim: int) -> Tensor:
    """`cumsum` with the same bits each time: of a lone row, a GPU sums the parts in the order in which they come."""
    is_alone = x.device.type != "cpu" and x.numel() == x.shape[dim]
    return torch.stack([x, x]).cumsum(dim if dim < 0 else dim + 1)[0] if is_alone else x.cumsum(dim)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told; a GPU works on while Python goes on."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in the machine's memory, where a container's limits count."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()  # else what this process used and gave up counts as taken
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    free = _fields(MEMINFO).get("MemAvailable:")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else 1024 * free
    return max(0, min([machine, *_left_by_limits()]))


def _left_by_limits() -> list[int]:
    """Bytes that each limit on this process leaves: that of its own control group, and those of all above it."""
    groups = [line.split(":", 2)[1:] for line in _text(OWN_GROUPS).splitlines()]
    found = []
    for kind, limit, used, cached in VERSIONS:
        own = next((path.strip("/") for kinds, path in groups if kind in kinds.split(",")), "")
        own = "" if ".." in own.split("/") else own  # it lies outside of what this process may see
        inside = GROUPS / kind / own
        for folder in (inside, *inside.parents):
            most, now = (_text(folder / name).strip() for name in (limit, used))
            if most.isdigit() and now.isdigit():  # no limit is the word "max"; cached files are given back when needed
                found.append(int(most) - int(now) + _fields(folder / "memory.stat").get(cached, 0))
    return found


def facts(device: torch.device) -> dict[str, Any]:
    """What a reader must know to repeat a run: the card, its memory, and the builds that computed with it."""
    if device.type == "cpu":
        return {"name": "cpu"}
    card = torch.get_device_module(device).get_device_properties(device)
    found = {"name": card.name, "memory_gib": round(card.total_memory / 2**30, 1)}
    if device.type == "cuda":
        found |= {"capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version(), "driver": _driver()}
    return found


@cache
def _driver() -> str:
    """The version of NVIDIA's driver, "" where its tool is not there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.split("\n", 1)[0].strip() if done.returncode == 0 else ""


def _fields(path: Path) -> dict[str, int]:
    """The first number behind each name, a line each."""
    return {name: int(value) for name, value, *_ in (line.split() for line in _text(path).splitlines())}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system, or a group that this user may not look into
        return ""
