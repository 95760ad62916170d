"""A model over several GPUs, or partly in the processor's memory: for everybody else it seems to lie on one GPU.

`helpers.model_size.placement` says where each layer lies and the `accelerate` library puts it there. A layer on another
GPU is computed there, one projection or norm at a time: activations travel to it and back, so that all that stands
between them, which interventions read and write, is on the first GPU. Weights that wait in the processor's memory come for
each call instead.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device
from torch import Tensor, nn

HOME = "companion_home"  # on a module whose activations travel: an empty tensor of the place they come from
WAITING = ("cpu", "disk")


def connect(model: nn.Module, where: Mapping[str, str], hook: type[AlignDevicesHook] = AlignDevicesHook) -> None:
    """Let everything that `where` has put elsewhere take from and give to the GPU of the embedding, its first place."""
    main = next(iter(where.values()))
    here = torch.empty(0, device=main, dtype=next(model.parameters()).dtype)
    for module in model.modules():
        for one in _hooks(module):  # with several GPUs the library takes any of them for what waits
            one.execution_device = main
    for name, place in where.items():
        block = model.get_submodule(name)
        for module in block.modules():
            travels = place not in (main, *WAITING) and any(True for _ in module.parameters(recurse=False))
            if place not in (main, *WAITING):
                remove_hook_from_module(module)
            if travels:
                add_hook_to_module(module, hook(execution_device=place, io_same_device=True))
                object.__setattr__(module, HOME, here)  # no buffer: it must not become part of the weights
            else:  # masks and the like, used between the projections
                for key, buffer in module.named_buffers(recurse=False):
                    setattr(module, key, buffer.to(main))


def is_apart(model: nn.Module) -> bool:
    """Whether some layers of a model lie elsewhere than its embedding does."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def weight_here(module: nn.Module) -> Tensor:
    """A projection's weight where the activations are, wherever it lies."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        with align_module_device(module):
            weight = module.get_parameter("weight")
    home: Any = getattr(module, HOME, weight)
    return weight.to(home)


def stored(module: nn.Module, name: str = "weight") -> Tensor | None:
    """A module's weight (or bias) where it is kept, to be changed in place; None if it has none."""
    tensor = getattr(module, name, None)
    if isinstance(tensor, Tensor) and tensor.is_meta:
        return next(one.weights_map[name] for one in _hooks(module) if one.offload)
    return tensor if isinstance(tensor, Tensor) else None


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    yield from (one for one in getattr(hook, "hooks", (hook,)) if isinstance(one, AlignDevicesHook))
