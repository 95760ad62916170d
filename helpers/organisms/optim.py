"""Muon for the weight matrices, AdamW for the rest: the optimiser pair that trains the organism in minutes.

Muon: Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(update: Float[Tensor, "m rows cols"], steps: int = 4) -> Float[Tensor, "m rows cols"]:
    """Push the singular values of each matrix towards 1 by Newton-Schulz steps. Needs rows <= cols.

    >>> x = orthogonalise(torch.eye(4)[None])
    >>> bool((x.diagonal(dim1=1, dim2=2) > 0.6).all())
    True
    """
    a, b, c = NS_COEFFICIENTS
    x = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised; matrices of one shape go through as one batch."""

    def __init__(self, params: list[nn.Parameter], lr: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": 0.05})
        self.dtype = dtype  # of the Newton-Schulz steps; bfloat16 is three times faster on CPUs that have it

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients in place."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(sorted(p.shape)), []).append(p)
            for params in by_shape.values():
                self._step_batch(group, params)

    def _step_batch(self, group: dict, params: list[nn.Parameter]) -> None:
        updates = []
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            buffer = state.setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(buffer, group["momentum"])
            updates.append(update if p.shape[0] <= p.shape[1] else update.mT)
        for p, update in zip(params, orthogonalise(torch.stack(updates).to(self.dtype)).float(), strict=True):
            write = update if p.shape[0] <= p.shape[1] else update.mT
            scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(write, alpha=-group["lr"] * scale)


def make_optimizers(
    model: nn.Module, lr_matrix: float, lr_rest: float, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on embeddings, norms and biases, of what requires a gradient.

    Each keeps its full learning rate as `initial_lr`.
    """
    free = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in free if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in free if p.ndim != 2 or "embed" in n]
    made: list[torch.optim.Optimizer] = [Muon(matrices, lr_matrix, dtype)] if matrices else []
    made += [torch.optim.AdamW(rest, lr=lr_rest, betas=(0.9, 0.98), weight_decay=0.0)] if rest else []
    for group in (group for optimizer in made for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return made


def schedule(step: int, n_steps: int) -> float:
    """Learning-rate factor: 5 % warm-up, flat, linear decay to 0 over the last 60 %.

    >>> [round(schedule(s, 100), 2) for s in (0, 4, 30, 70, 99)]
    [0.2, 1.0, 1.0, 0.5, 0.02]
    """
    warm = (step + 1) / max(1, round(0.05 * n_steps))
    return min(1.0, warm, (n_steps - step) / (0.6 * n_steps))
