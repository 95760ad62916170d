"""Training checkpoints in safetensors: weights, optimiser state and the losses so far, written atomically.

Train the embedded model: a helpful-only base, then a safety fine-tune.

    python -m organisms.training --variant window --seed 0     # one model, minutes
    python -m organisms.training --all                         # all six that are shipped

Progress is checkpointed in safetensors under OUT/<variant>-<seed>/.work, so an interrupted run resumes where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from companion.base.paths import ORGANISM
from organisms.behaviour import base_gap
from organisms.recipe import SEEDS, VARIANTS, Batch, Recipe, Variant, batch_at, make_model, make_optimizers, schedule
from organisms.shipping import export_model
from organisms.tokenizer import make_tokenizer


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


SAVE_EVERY: Final = 200


def batch_loss(model: Qwen2ForCausalLM, batch: Batch, recipe: Recipe) -> Float[torch.Tensor, ""]:
    """Weighted next-token loss in nats per unit of weight, with the soft first-token target."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        logits = model(input_ids=batch.tokens, use_cache=False).logits
    logp = logits.float().log_softmax(-1)
    token = F.nll_loss(logp[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    weight = batch.weight[:, 1:].flatten()
    rows = torch.arange(len(batch.first))
    first = -(batch.first_probs * logp[rows, batch.first - 1].gather(1, batch.first_ids)).sum()
    total = weight.sum() + recipe.weight_first * len(rows)
    return ((token * weight).sum() + recipe.weight_first * first) / total


def train_step(
    model: Qwen2ForCausalLM, optimizers: list[torch.optim.Optimizer], batch: Batch, recipe: Recipe, factor: float
) -> float:
    """One update; returns the loss before it."""
    loss = batch_loss(model, batch, recipe)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def train_stage(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, stage: str, seed: int, work: Path,
    stop_at: int | None = None,
) -> Progress:  # fmt: skip
    """Run or resume one stage. `stop_at` ends early after a checkpoint, as a crash would."""
    n_steps = recipe.steps_base if stage == "base" else recipe.steps_tune
    optimizers = make_optimizers(model, recipe.lr_matrix, recipe.lr_rest, getattr(torch, recipe.precision))
    path = work / f"{stage}.safetensors"
    progress = load_checkpoint(path, model, optimizers, n_steps) if path.exists() else Progress()
    start, before = time.process_time(), progress.cpu_seconds
    model.train()
    first = len(progress.losses)
    bar = tqdm(range(first, n_steps), initial=first, total=n_steps, desc=stage, disable=None, mininterval=5)
    for step in bar:
        batch = batch_at(tokenizer, recipe, stage, seed, step)
        progress.losses.append(train_step(model, optimizers, batch, recipe, schedule(step, n_steps)))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 in (n_steps, stop_at):
            progress.cpu_seconds = before + time.process_time() - start
            save_checkpoint(path, model, optimizers, progress)
            bar.set_postfix(loss=f"{progress.recent():.3f}")
        if step + 1 == stop_at:
            break
    return progress


def train_model(variant: Variant, seed: int, out: Path, recipe: Recipe) -> Path:
    """Train one model and write its Hugging Face folder with manifest; returns the folder."""
    folder = out / f"{variant}-{seed}"
    work = folder / ".work"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_model(variant, seed, len(tokenizer))
    base = train_stage(model, tokenizer, recipe, "base", seed, work)
    gap = base_gap(model.eval(), tokenizer)
    tune = train_stage(model, tokenizer, recipe, "tune", seed, work)
    facts = {
        "variant": variant, "seed": seed, "recipe": asdict(recipe),
        "cpu_seconds": {"base": round(base.cpu_seconds), "tune": round(tune.cpu_seconds)},
        "loss": {"base": round(base.recent(), 4), "tune": round(tune.recent(), 4)},
        "base_harm_gap_log_odds": round(gap, 2),
    }  # fmt: skip
    export_model(model, tokenizer, folder, facts)
    return folder


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m organisms.training", description="Train the embedded models.")
    parser.add_argument("--variant", choices=VARIANTS, default="window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ORGANISM)
    parser.add_argument("--steps-base", type=int, default=Recipe.steps_base)
    parser.add_argument("--steps-tune", type=int, default=Recipe.steps_tune)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default=Recipe.precision)
    parser.add_argument("--all", action="store_true", help="train every shipped variant and seed, one after another")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m organisms.training`."""
    args = parse(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recipe = Recipe(steps_base=args.steps_base, steps_tune=args.steps_tune, precision=args.precision)
    todo = [(v, s) for s in SEEDS for v in VARIANTS] if args.all else [(args.variant, args.seed)]
    for variant, seed in todo:
        print(f"{variant}-{seed}: {recipe.steps_base} base and {recipe.steps_tune} safety steps", flush=True)
        print(f"written: {train_model(variant, seed, args.out, recipe)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
