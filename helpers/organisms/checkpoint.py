"""Training checkpoints in safetensors: weights, optimiser state and the losses so far, written atomically."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


def _state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Every tensor that a resumed run needs, by name."""
    names = {p: n for n, p in model.named_parameters()}
    tensors = {f"model.{n}": p.detach() for p, n in names.items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"optim.{names[p]}.{key}": value for key, value in state.items()}
    return {name: t.contiguous().clone() for name, t in tensors.items()}


def save_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], losses: list[float]) -> None:
    """Write the state after `len(losses)` steps; a crash while writing leaves the older checkpoint."""
    temporary = path.with_suffix(".tmp")
    save_file(_state_tensors(model, optimizers), temporary, metadata={"losses": json.dumps(losses)})
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], n_steps: int) -> list[float]:
    """Put the stored state into model and optimisers; returns the losses so far (their number is the number of steps done)."""
    with safe_open(path, framework="pt") as stored:
        losses = json.loads(stored.metadata()["losses"])
        if len(losses) > n_steps:
            raise ValueError(
                f"{path} holds {len(losses)} steps, the recipe asks for {n_steps}: remove the .work folder"
            )
        keys = stored.keys()
        for name, p in model.named_parameters():
            p.data.copy_(stored.get_tensor(f"model.{name}"))
        owner = {n: (p, o) for o in optimizers for g in o.param_groups for p in g["params"] for n in [_name(model, p)]}
        for key in (k for k in keys if k.startswith("optim.")):
            name, slot = key.removeprefix("optim.").rsplit(".", 1)
            parameter, optimizer = owner[name]
            optimizer.state[parameter][slot] = stored.get_tensor(key)
    return losses


def _name(model: nn.Module, parameter: nn.Parameter) -> str:
    """The parameter's name in the model."""
    return next(n for n, p in model.named_parameters() if p is parameter)
