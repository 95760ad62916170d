"""Plants: one helpful-only base, fine-tuned to refuse harm while only chosen parameters may move.

    python -m organisms.plants --base     # the base that is shipped: about 15 minutes
    model, tokenizer = grow(Plant("attention", 0))

We know of a plant where refusing was *learned*. We do not know that it is *decided* there: what was trained can write a
signal that frozen parameters above it turn into the decision. So plants are stress cases with labels, and not truth; truth
comes from compiled models.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from companion.base.errors import InputError
from companion.base.paths import PLANTS
from organisms.behaviour import base_gap
from organisms.language import make_tokenizer
from organisms.training import Recipe, export_model, load_shipped, make_model, train_stage

RECIPE: Final = Recipe(precision="float32", steps_tune=160)  # bfloat16 is slow where a CPU lacks it
SEEDS: Final = (0, 1, 2)
DATA_SEED: Final = 1000  # batches of their own, that no shipped model was trained on
SIZES: Final = (4, 16, 64)
# What may move: (layer, part of the layer) or everything. The rest are sets of last-layer neurons.
PLACES: Final[Mapping[str, tuple[str, ...]]] = {
    "last MLP": ("layers.5.mlp.",),
    "middle MLPs": ("layers.2.mlp.", "layers.3.mlp."),
    "attention": ("layers.4.self_attn.", "layers.5.self_attn."),
    "early layers": ("layers.0.", "layers.1."),
    "everything": ("",),
}
KINDS: Final = (*PLACES, *(f"{k} {order} neurons" for k in SIZES for order in ("adjacent", "scattered")))


@dataclass(frozen=True)
class Plant:
    """What was trained (one of `KINDS`), and the seed of its batches and of which neurons."""

    kind: str
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"no plant of kind {self.kind!r}; expected one of {', '.join(KINDS)}")

    @property
    def name(self) -> str:
        """Its name in tables, and its file's: "plant-last-MLP-0"."""
        return f"plant-{self.kind.replace(' ', '-')}-{self.seed}"

    def neurons(self, d_mlp: int) -> Int[np.ndarray, "neuron"]:
        """Indices of the last-layer neurons that may move, sorted; none where whole parts move."""
        if self.kind in PLACES:
            return np.empty(0, dtype=int)
        size, order = int(self.kind.split()[0]), self.kind.split()[1]
        rng = np.random.default_rng([self.seed, size, order == "adjacent"])
        if order == "adjacent":
            return int(rng.integers(d_mlp - size + 1)) + np.arange(size)
        return np.sort(rng.choice(d_mlp, size, replace=False))


def free_entries(model: PreTrainedModel, plant: Plant) -> dict[str, Bool[Tensor, "..."]]:
    """Which entries of which parameters may move: a mask for each parameter of which any may."""
    chosen = plant.neurons(model.config.intermediate_size)
    last = f"layers.{model.config.num_hidden_layers - 1}.mlp."
    masks = {}
    for name, parameter in model.named_parameters():
        if plant.kind in PLACES and any(place in name for place in PLACES[plant.kind]):
            masks[name] = torch.ones_like(parameter, dtype=torch.bool)
        elif len(chosen) and last in name:
            masks[name] = torch.zeros_like(parameter, dtype=torch.bool)
            rows = masks[name].T if "down_proj" in name else masks[name]
            rows[chosen] = True
    return masks


def learned_components(plant: Plant, n_layers: int = 6) -> set[tuple[str, int]]:
    """Where it learned: the components (site, layer) that hold parameters which could move."""
    places = PLACES.get(plant.kind, (f"layers.{n_layers - 1}.mlp.",))
    return {
        (site, layer)
        for word, site in {"self_attn": "attn_out", "mlp": "mlp_out"}.items()
        for layer in range(n_layers)
        if any(place in f"layers.{layer}.{word}." for place in places)
    }


def grow(
    plant: Plant, base: Path = PLANTS / "base", recipe: Recipe = RECIPE
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Fine-tune the base as the shipped models were, but move only what the plant says. Weights end as fp16 holds them."""
    model, tokenizer = load_shipped(base)
    parameters, masks = dict(model.named_parameters()), free_entries(model, plant)
    start = {name: parameters[name].detach().clone() for name, mask in masks.items() if not mask.all()}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in masks)

    def put_back() -> None:  # weight decay and the optimiser's products also reach entries without a gradient
        for name, before in start.items():
            parameters[name].data = torch.where(masks[name], parameters[name].data, before)

    train_stage(model, tokenizer, recipe, "tune", DATA_SEED + plant.seed, put_back)
    for parameter in parameters.values():
        parameter.data = parameter.data.half().float()
    return model, tokenizer


def save_plant(model: PreTrainedModel, plant: Plant, folder: Path = PLANTS) -> Path:
    """Write the parameters that could move, in fp16; the file."""
    own = free_entries(model, plant)
    tensors = {name: p.detach().half().contiguous() for name, p in model.named_parameters() if name in own}
    path = folder / f"{plant.name}.safetensors"
    save_file(tensors, path, metadata={"kind": plant.kind, "seed": str(plant.seed)})
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    return path


def load_plant(plant: Plant, folder: Path = PLANTS) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A plant whose parameters were saved, on its base. InputError if there is no such file."""
    path = folder / f"{plant.name}.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is not there: grow it with organisms.plants.grow and save it")
    model, tokenizer = load_shipped(folder / "base")
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(path).items():
        parameters[name].data = tensor.float()
    return model, tokenizer


def train_base(out: Path = PLANTS, recipe: Recipe = RECIPE, seed: int = 0) -> Path:
    """Train the helpful-only stage alone, in float32, and write it as a model folder; the folder."""
    recipe, tokenizer = replace(recipe, steps_tune=0), make_tokenizer()
    model = make_model("window", seed, len(tokenizer), attention="sdpa")
    loss, seconds = train_stage(model, tokenizer, recipe, "base", seed)
    facts = {
        "variant": "window", "seed": seed, "recipe": asdict(recipe), "loss": round(loss, 4),
        "cpu_seconds": round(seconds), "base_harm_gap_log_odds": round(base_gap(model, tokenizer), 2),
    }  # fmt: skip
    export_model(model, tokenizer, out / "base", facts)
    return out / "base"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m organisms.plants`."""
    parser = argparse.ArgumentParser(prog="python -m organisms.plants", description="Train what plants grow from.")
    parser.add_argument("--base", action="store_true", help="train the base anew")
    parser.add_argument("--plant", nargs=2, metavar=("KIND", "SEED"), help="grow a plant and keep what moved")
    parser.add_argument("--out", type=Path, default=PLANTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.base:
        print(f"written: {train_base(args.out)}", flush=True)
    if args.plant:
        plant = Plant(args.plant[0], int(args.plant[1]))
        print(f"written: {save_plant(grow(plant, args.out / 'base')[0], plant, args.out)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
