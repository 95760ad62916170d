"""Training checkpoints in safetensors: weights, optimiser state and the losses so far, written atomically."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


def _state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Every tensor that a resumed run needs, by name."""
    names: dict[torch.Tensor, str] = {p: n for n, p in model.named_parameters()}
    tensors = {f"model.{n}": p.detach() for p, n in names.items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"optim.{names[p]}.{key}": value for key, value in state.items()}
    return {name: t.contiguous().clone() for name, t in tensors.items()}


@dataclass
class Progress:
    """How far a stage is: the loss of every step done, and the CPU-seconds they took."""

    losses: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def recent(self, n: int = 50) -> float:
        """Mean loss of the last `n` steps, in nats."""
        return sum(self.losses[-n:]) / len(self.losses[-n:])


def save_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress) -> None:
    """Write weights, optimiser state and progress; a crash while writing leaves the older checkpoint."""
    temporary = path.with_suffix(".tmp")
    save_file(_state_tensors(model, optimizers), temporary, metadata={"progress": json.dumps(asdict(progress))})
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], n_steps: int) -> Progress:
    """Put the stored state into model and optimisers; returns how far the stage is."""
    with safe_open(path, framework="pt") as stored:
        progress = Progress(**json.loads(stored.metadata()["progress"]))
        if len(progress.losses) > n_steps:
            raise ValueError(
                f"{path} holds {len(progress.losses)} steps, the recipe asks for {n_steps}: remove the .work folder"
            )
        keys = stored.keys()
        for name, p in model.named_parameters():
            p.data.copy_(stored.get_tensor(f"model.{name}"))
        owner = {n: (p, o) for o in optimizers for g in o.param_groups for p in g["params"] for n in [_name(model, p)]}
        for key in (k for k in keys if k.startswith("optim.")):
            name, slot = key.removeprefix("optim.").rsplit(".", 1)
            parameter, optimizer = owner[name]
            optimizer.state[parameter][slot] = stored.get_tensor(key)
    return progress


def _name(model: nn.Module, parameter: nn.Parameter) -> str:
    """The parameter's name in the model."""
    return next(n for n, p in model.named_parameters() if p is parameter)
