"""A stand-in accelerator: tensors that say they lie on another device, on a machine that has none.

It holds their numbers in the processor's memory and refuses what CUDA refuses: an operation on tensors of both places,
`.numpy()` of its own, more bytes than it has. Products round in another way than on the processor, and in a way that
depends on how many rows there are, as those of a GPU do. `torch.get_device_module("standin")` answers as that of CUDA does.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME, HOST = "standin", torch.device("cpu")
# Operations that take tensors of both places: copies, and indices on the processor.
COPIES = {"copy_", "_to_copy"}
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
# Products, each with the one that adds to a sum.
PRODUCTS = {"mm": torch.addmm, "addmm": torch.addmm, "bmm": torch.baddbmm, "baddbmm": torch.baddbmm}
# Without a deterministic kernel on CUDA, whatever torch is asked for; sums that run along a lone row among them.
CHANCY = {"cumprod", "logcumsumexp", "histc", "bincount", "kthvalue", "put_", "grid_sampler_2d"}
_NAMES: dict[Any, str] = {}  # of operations


class Memory:
    """Bytes of tensors that are alive on the device; views count once."""

    def __init__(self) -> None:
        self.limit, self.held, self.peak, self.is_counted = 0, 0, 0, False
        self.owners: dict[int, int] = {}

    def take(self, owner: Any, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.owners:
            if self.held + size > self.limit:
                raise torch.OutOfMemoryError(f"stand-in out of memory: {size} bytes asked for beside {self.held}")
            self.held += size
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

    def synchronize(self, device: Any = None) -> None:
        """It never works ahead, its chance is the processor's, and it keeps nothing."""

    manual_seed_all = empty_cache = synchronize

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
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> OnDevice:
        # `accelerate` makes parameters anew by calling the class of those that were there.
        held = held.held if isinstance(held, OnDevice) else held
        if held.is_meta:
            return torch.nn.Parameter(held, requires_grad)  # type: ignore[return-value]
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=DEVICE,
        )  # fmt: skip

    def __init__(self, held: Tensor, requires_grad: bool = False) -> None:
        self.held = held = held.held if isinstance(held, OnDevice) else held
        if MEMORY.is_counted:
            MEMORY.take(self, held)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def __format__(self, form: str) -> str:
        return format(self.held, form)

    def __deepcopy__(self, known: Any) -> OnDevice:
        return OnDevice(self.held.clone())

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
    "empty.memory_format", "empty_strided", "copy_", "arange", "arange.start", "arange.start_step", "eye", "linspace",
)  # fmt: skip
_LIBRARY = torch.library.Library("aten", "IMPL")
for _name in _MAKERS:
    _LIBRARY.impl(_name, partial(_made_here, _name), "PrivateUse1")


@contextlib.contextmanager
def active(memory: int | None = None) -> Iterator[torch.device]:
    """Inside, `device="standin"` is an accelerator; yields the device. With `memory`, bytes are counted and end there."""
    MEMORY.limit, MEMORY.is_counted, MEMORY.peak = memory or 2**36, memory is not None, MEMORY.held
    try:
        yield DEVICE
    finally:
        MEMORY.limit, MEMORY.is_counted = 0, False


def _bare(x: Any, tensors: list[Tensor]) -> Any:
    """An argument with plain tensors in place of those of the device; all tensors are noted."""
    kind = type(x)
    if kind is OnDevice:
        tensors.append(x)
        return x.held
    if kind is list or kind is tuple:
        return kind([_bare(one, tensors) for one in x])
    if isinstance(x, Tensor):
        tensors.append(x)
    return x


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation: the rule on mixing, the processor's arithmetic, and the result in the right place."""
    name, tensors = _NAMES.get(func) or _NAMES.setdefault(func, func.overloadpacket.__name__), list[Tensor]()
    plain = [_bare(x, tensors) for x in args]
    named = {key: _bare(x, tensors) for key, x in kwargs.items()} if kwargs else kwargs
    own = [x for x in tensors if type(x) is OnDevice]
    is_here = bool(own)
    if kwargs and (wanted := kwargs.get("device")) is not None:
        is_here = torch.device(wanted).type == NAME
        named["device"] = HOST if is_here else wanted
    if own and len(own) < len(tensors) and name not in COPIES:
        # CUDA takes numbers without a dimension from the processor, and indices, where what is indexed is its own.
        is_indexed = name in INDEXED and isinstance(args[0], OnDevice)
        mixed = [x for x in (args[0], *args[2:]) if isinstance(x, Tensor)] if is_indexed else tensors
        if off := [tuple(x.shape) for x in mixed if not isinstance(x, OnDevice) and x.dim() > 0]:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, found {DEVICE} and cpu {off[0]}"
            )
    if own and tensors[0].is_floating_point():
        is_alone = name == "cumsum" and args[0].numel() == args[0].shape[args[1]] > 1  # along the only row
        if is_alone or name in CHANCY:
            raise RuntimeError(f"{name} does not have a deterministic implementation on {DEVICE}")
    made = _product(func, name, plain, named) if own and name in PRODUCTS else func(*plain, **named)
    if name == "copy_":
        return args[0]
    if is_here and isinstance(made, Tensor):  # what was changed in place is what it was
        changed = [x for x in own if x.held is made]
        return changed[0] if changed else OnDevice(made)
    if is_here and isinstance(made, tuple | list):
        return type(made)(OnDevice(x) if isinstance(x, Tensor) else x for x in made)
    return made


def _product(func: Any, name: str, args: Any, named: Any) -> Any:
    """The product as two sums, cut at a place that depends on how many rows the left factor has."""
    *bias, left, right = args
    cut = left.shape[-1] * (1 + left.shape[-2] % 5) // 6
    if not cut or named or left.dtype == torch.float64 or not left.is_floating_point():
        return func(*args, **named)
    first = func(*bias, left[..., cut:], right[..., cut:, :])
    return PRODUCTS[name](first, left[..., :cut], right[..., :cut, :])
