"""What the load check found out about a model: kept with it, written into the run's manifest, shown in notebook 01."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from companion.base.chat import TemplateFacts


@dataclass(frozen=True)
class ModelFacts:
    """Everything that later steps assume of a model, as it was found at load.

    `noise` is the largest difference between two ways to the same activation, as a share of the largest one compared:
    rounding of this model in this precision. `ends` maps each token that ends an answer to the places that name it
    (generation config, tokenizer, template). `device` names the processor, or the card and what computes on it. `replay` is
    False where each intervention is a full forward pass.
    """

    architecture: str
    layers: int
    heads: int
    key_heads: int
    width: int
    neurons: int
    norm: str
    norm_after: bool
    gated: bool
    windows: tuple[int, ...]
    soft_cap: float | None
    tied: bool
    vocabulary: int
    noise: float
    replay: bool
    adapter: str
    ends: dict[str, tuple[str, ...]]
    device: dict[str, Any]
    template: TemplateFacts | None

    @property
    def tolerance(self) -> float:
        """How far two routes to the same effect may lie apart, relative to the total effect: rounding, not a mistake."""
        return max(1e-4, 30 * self.noise)

    def manifest(self) -> dict[str, Any]:
        """The facts as JSON takes them; the noise to one digit."""
        return asdict(self) | {"noise": float(f"{self.noise:.0e}")}

    def table(self) -> pd.DataFrame:
        """A short table for a reader: what was looked at, what was found."""
        ends = [f"{token} ({', '.join(places)})" for token, places in self.ends.items()]
        rows = {
            "architecture": self.architecture,
            "layers, heads, width, neurons": f"{self.layers}, {self._heads}, {self.width}, {self.neurons or 'none'}",
            "norms": f"{self.norm}, {'before and after' if self.norm_after else 'before'} attention and MLP",
            "attention": f"windows of {', '.join(map(str, self.windows))} tokens" if self.windows else "all tokens",
            "MLP": ("gated" if self.gated else "not gated") if self.neurons else "mixture of experts",
            "unembedding": f"{self.vocabulary} tokens{', tied to the embedding' * self.tied}{self._cap}",
            "replay": "exact" if self.replay else "one full forward pass an intervention",
            "rounding noise": f"below {_power_above(self.noise)} of the largest activation",
            "answers end with": "; ".join(ends) or "nothing: they are cut at their longest",
        }
        if self.device["name"] != "cpu":
            rows["device"] = f"{self.device['name']}, {self.device['memory_gib']} GiB"
        if self.adapter:
            rows["adapter"] = self.adapter
        if self.template is not None:
            rows |= {
                "a system turn is given as": self.template.system,
                "date in prompts": f"{self.template.date}, on every day" if self.template.date else "none",
            }
            if self.template.thinking_off:
                rows["thinking"] = "switched off in the template"
        return pd.DataFrame({"fact": list(rows), "found": list(rows.values())})

    @property
    def _heads(self) -> str:
        return f"{self.heads}" if self.heads == self.key_heads else f"{self.heads} on {self.key_heads} keys"

    @property
    def _cap(self) -> str:
        return "" if self.soft_cap is None else f", soft cap {self.soft_cap:g}"


def _power_above(noise: float) -> str:
    """The power of ten above a number, since its digits differ between processors.

    >>> _power_above(3e-7), _power_above(0.0)
    ('1e-06', '1e-16')
    """
    return next(f"1e{power:03d}" for power in range(-16, 3) if noise < 10.0**power)
