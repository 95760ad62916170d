"""A stand-in accelerator: tensors that say they lie on another device, on a machine that has none.

It holds their numbers in the processor's memory and refuses what CUDA refuses: an operation on tensors of both places,
`.numpy()` of its own, more bytes than it has. Products round in another way than on the processor, and in a way that
depends on how many rows there are, as those of a GPU do. `torch.get_device_module("standin")` answers as that of CUDA does.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "standin"
GIB = 2**30
# Operations that take tensors of both places: copies, and indices on the processor.
COPIES = {"copy_", "_to_copy"}
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # and where their left factor stands
# Without a deterministic kernel on CUDA, whatever torch is asked for.
CHANCY = {"cumsum", "cumprod", "logcumsumexp", "histc", "bincount", "kthvalue", "put_", "grid_sampler_2d"}


class Memory:
    """Bytes of tensors that are alive on the device; views count once."""

    def __init__(self) -> None:
        self.limit, self.held, self.peak, self.made = 0, 0, 0, 0
        self.owners: dict[int, int] = {}

    def take(self, owner: Any, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.owners:
            if self.held + size > self.limit:
                raise torch.OutOfMemoryError(f"stand-in out of memory: {size} bytes asked for beside {self.held}")
            self.held += size
            self.made += 1
            self.peak = max(self.peak, self.held)
        self.owners[place] = self.owners.get(place, 0) + 1
        weakref.finalize(owner, self.give, place, size).atexit = False

    def give(self, place: int, size: int) -> None:
        self.owners[place] -= 1
        if not self.owners[place]:
            del self.owners[place]
            self.held -= size


MEMORY = Memory()


class Accelerator:
    """What `torch.get_device_module("standin")` gives: one device, there while `active` is."""

    def is_available(self) -> bool:
        return MEMORY.limit > 0

    def device_count(self) -> int:
        return int(self.is_available())

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Its chance is the processor's."""

    def synchronize(self, device: Any = None) -> None:
        """It never works ahead."""

    def empty_cache(self) -> None:
        """It keeps nothing."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return MEMORY.limit - MEMORY.held, MEMORY.limit

    def max_memory_allocated(self, device: Any = None) -> int:
        return MEMORY.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        MEMORY.peak = MEMORY.held

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name="stand-in", total_memory=MEMORY.limit, major=0, minor=0)


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Accelerator())
DEVICE = torch.device(NAME, 0)


class OnDevice(Tensor):
    """A tensor that reports the stand-in device and holds a plain one."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=DEVICE,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held
        MEMORY.take(self, held)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _made_here(name: str, *args: Any, **kwargs: Any) -> Any:
    packet, _, overload = name.partition(".")
    return _run(getattr(getattr(torch.ops.aten, packet), overload or "default"), args, kwargs)


# Tensors that are made on the device come from these, in any thread; all else is seen by `__torch_dispatch__`.
_MAKERS = (
    "empty.memory_format",
    "empty_strided",
    "copy_",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "linspace",
)
_LIBRARY = torch.library.Library("aten", "IMPL")
for _name in _MAKERS:
    _LIBRARY.impl(_name, partial(_made_here, _name), "PrivateUse1")


@contextlib.contextmanager
def active(memory: int = 64 * GIB) -> Iterator[torch.device]:
    """Inside, `device="standin"` is an accelerator with so many bytes; yields the device."""
    MEMORY.limit = memory
    MEMORY.peak = MEMORY.held
    try:
        yield DEVICE
    finally:
        MEMORY.limit = 0


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _bare(tree: Any) -> Any:
    return _mapped(lambda x: x.held if isinstance(x, OnDevice) else x, tree)


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """An operation's arguments or results with every leaf changed; torch's own does the same at thrice the cost."""
    if type(tree) in (tuple, list):
        return type(tree)(_mapped(change, x) for x in tree)
    return {key: _mapped(change, x) for key, x in tree.items()} if type(tree) is dict else change(tree)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation: the rule on mixing, the processor's arithmetic, and the result in the right place."""
    name = func.overloadpacket.__name__
    tensors: list[Tensor] = []
    _mapped(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
    own = {id(x.held): x for x in tensors if isinstance(x, OnDevice)}
    if own and name not in COPIES:
        _refuse_mixed(name, args, tensors)
    if own and name in CHANCY and tensors[0].is_floating_point():
        raise RuntimeError(f"{name} does not have a deterministic implementation on {DEVICE}")
    wanted = kwargs.get("device")
    inner = {
        key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()
    }
    plain, run = _bare(args), _product if own and name in PRODUCTS else _plainly
    made = run(func, name, plain, _bare(inner))
    if not (_is_here(wanted) if wanted is not None else isinstance(args[0], OnDevice) if name == "copy_" else own):
        return made
    return _mapped(lambda x: (own.get(id(x)) if id(x) in own else OnDevice(x)) if isinstance(x, Tensor) else x, made)


def _refuse_mixed(name: str, args: Any, tensors: list[Tensor]) -> None:
    """CUDA takes numbers without a dimension from the processor, and indices, where what is indexed is its own."""
    if name in INDEXED and isinstance(args[0], OnDevice):
        tensors = [x for x in (args[0], *args[2:]) if isinstance(x, Tensor)]
    off = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
    if off:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, found {DEVICE} and cpu {tuple(off[0].shape)}"
        )


def _plainly(func: Any, _: str, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _product(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The product, its sum taken in an order that depends on how many rows the left factor has."""
    at = PRODUCTS[name]
    left, right = args[at : at + 2]
    if left.dtype == torch.float64 or not left.is_floating_point():
        return func(*args, **kwargs)
    order = torch.arange(left.shape[-1]).roll(1 + left.shape[-2] % 7)
    return func(*args[:at], left[..., order], right[..., order, :], *args[at + 2 :], **kwargs)
