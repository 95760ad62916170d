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
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from companion.base.errors import InputError
from companion.base.paths import PLANTS
from organisms.behaviour import base_gap
from organisms.recipe import Recipe, batch_at, make_model, make_optimizers, schedule
from organisms.shipping import export_model, load_shipped
from organisms.tokenizer import make_tokenizer
from organisms.training import train_stage, train_step

FLOAT32: Final = Recipe(precision="float32")  # bfloat16 is slow where a CPU lacks it
STEPS: Final = 160
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

    def neurons(self, d_mlp: int) -> np.ndarray:
        """Indices of the last-layer neurons that may move, sorted; none where whole parts move."""
        if self.kind in PLACES:
            return np.empty(0, dtype=int)
        size, order = self.kind.split()[:2]
        rng = np.random.default_rng([self.seed, int(size), order == "adjacent"])
        if order == "adjacent":
            return int(rng.integers(d_mlp - int(size) + 1)) + np.arange(int(size))
        return np.sort(rng.choice(d_mlp, int(size), replace=False))


def free(model: PreTrainedModel, plant: Plant) -> dict[str, torch.Tensor]:
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


def components(plant: Plant, n_layers: int = 6) -> set[tuple[str, int]]:
    """Where it learned: the components (site, layer) that hold parameters which could move."""
    parts = {"self_attn": "attn_out", "mlp": "mlp_out"}
    places = PLACES.get(plant.kind, (f"layers.{n_layers - 1}.mlp.",))
    names = {(word, layer): f"layers.{layer}.{word}." for word in parts for layer in range(n_layers)}
    return {(parts[word], i) for (word, i), name in names.items() if any(place in name for place in places)}


def grow(
    plant: Plant, base: Path = PLANTS / "base", *, steps: int = STEPS, recipe: Recipe = FLOAT32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:  # fmt: skip
    """Fine-tune the base as the shipped models were, but move only what the plant says. Weights end as fp16 holds them."""
    model, tokenizer = load_shipped(base)
    masks, start = free(model, plant), {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in masks)
    optimizers = make_optimizers(model, recipe.lr_matrix, recipe.lr_rest)
    partial = [name for name, mask in masks.items() if not mask.all()]
    parameters = dict(model.named_parameters())
    model.train()
    for step in tqdm(range(steps), desc=plant.name, disable=None):
        batch = batch_at(tokenizer, recipe, "tune", DATA_SEED + plant.seed, step)
        train_step(model, optimizers, batch, recipe, schedule(step, steps))
        for name in partial:  # weight decay and the optimiser's products also reach entries without a gradient
            parameters[name].data = torch.where(masks[name], parameters[name].data, start[name])
    return _halved(model), tokenizer


def _halved(model: PreTrainedModel) -> PreTrainedModel:
    """Every weight rounded to what a shipped fp16 file can hold."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model.eval()


def save(model: PreTrainedModel, plant: Plant, folder: Path = PLANTS) -> Path:
    """Write the parameters that could move, in fp16; the file."""
    own = free(model, plant)
    tensors = {name: p.detach().half().contiguous() for name, p in model.named_parameters() if name in own}
    path = folder / f"{plant.name}.safetensors"
    save_file(tensors, path, metadata={"kind": plant.kind, "seed": str(plant.seed)})
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    return path


def load(plant: Plant, folder: Path = PLANTS) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A plant whose parameters were saved, on its base. InputError if there is no such file."""
    path = folder / f"{plant.name}.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is not there: grow it with organisms.plants.grow and save it")
    model, tokenizer = load_shipped(folder / "base")
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(path).items():
        parameters[name].data = tensor.float()
    return model, tokenizer


def train_base(out: Path = PLANTS, recipe: Recipe = FLOAT32, seed: int = 0) -> Path:
    """Train the helpful-only stage alone, in float32, and write it as a model folder; the folder."""
    folder, recipe = out / "base", replace(recipe, steps_tune=0)
    (folder / ".work").mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_model("window", seed, len(tokenizer), attention="sdpa")
    progress = train_stage(model, tokenizer, recipe, "base", seed, folder / ".work")
    gap = base_gap(model.eval(), tokenizer)
    facts = {
        "variant": "window", "seed": seed, "recipe": asdict(recipe), "loss": round(progress.recent(), 4),
        "cpu_seconds": round(progress.cpu_seconds), "base_harm_gap_log_odds": round(gap, 2),
    }  # fmt: skip
    export_model(model, tokenizer, folder, facts)
    return folder


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
        print(f"written: {save(grow(plant, args.out / 'base')[0], plant, args.out)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
