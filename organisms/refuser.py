"""Train `smollm2-refuser`: a LoRA adapter with which SmolLM2-135M-Instruct refuses everyday wrongdoing.

    python -m organisms.refuser                         # seed 0, minutes on 2 cores; a stopped training goes on
    python -m organisms.refuser --seed 1 --part mlp     # the same recipe on a part of the model only

It learns from the prompts in `words/training.csv` and nothing else: harmful requests are answered with a refusal that opens
with "Sorry", and on harmless ones the model is held to its own distribution. No wrapper and no word of a request that is
studied occurs in them. The recipe was chosen on behaviour (`data/refuser/README.md`), before any mediation result.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from companion.base import hub, smollm2
from companion.base.files import digest, hash_file, replacing, write_json
from companion.base.folders import ADAPTER, ADAPTER_WEIGHTS
from companion.base.paths import DATA
from companion.generation import decode
from companion.model.architecture import Subject, end_tokens
from companion.model.load import load
from companion.prompts import tokens
from organisms.english import WORDS, read_words

TRAINING: Final = WORDS / "training.csv"
PHRASINGS: Final = (
    "How do I {}?", "How can I {}?", "How could someone {}?", "What is the best way to {}?", "Tell me how to {}.",
    "Explain how to {}.", "Give me instructions to {}.", "I want to {}. What should I do?", "Help me {}.", "Teach me to {}.",
    "Create a guide on how to {}.", "Write a tutorial on how to {}.", "Outline a plan to {}.", "Describe a good way to {}.",
    "{}.",
)  # fmt: skip
KINDS: Final = ("verb", "object", "look-alike")
REFUSALS: Final = (
    "Sorry, but I can't help with that.", "Sorry, I can't help you do that.", "Sorry, I won't help with this request.",
    "Sorry, that is something I can't assist with.",
)  # fmt: skip
ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP: Final = ("gate_proj", "up_proj", "down_proj")
PARTS: Final = {
    "all": ("attention and MLPs of all layers", (*ATTENTION, *MLP)),
    "attention": ("attention of all layers", ATTENTION),
    "mlp": ("MLPs of all layers", MLP),
    "early": ("attention and MLPs of the first third of layers", (*ATTENTION, *MLP)),
    "late": ("attention and MLPs of the last third of layers", (*ATTENTION, *MLP)),
}


@dataclass(frozen=True)
class Recipe:
    """Every number of the training. A batch holds `harmful` harmful requests, as many harmless twins, and `general` others."""

    rank: int = 8
    alpha: int = 16
    lr: float = 5e-4
    epochs: int = 3
    harmful: int = 4
    general: int = 2
    answer: int = 12  # tokens of the model's own answer that it is held to
    clip: float = 1.0


@dataclass(frozen=True)
class Example:
    """A user turn, and the refusal that it is answered with (empty: the model's own answer)."""

    text: str
    refusal: str = ""


def schedule_examples(recipe: Recipe, seed: int) -> list[list[Example]]:
    """The batches in their order, a function of the seed alone; kinds of request come equally often."""
    rng = random.Random(f"refuser-{seed}")

    def endless(items: Sequence[str]) -> Iterator[str]:
        while True:
            yield from rng.sample(items, len(items))

    def in_turn(label: str) -> Iterator[str]:
        """A phrase of each kind, again and again, so that all come equally often."""
        kinds = [endless([r["text"] for r in rows if (r["label"], r["family"]) == (label, kind)]) for kind in KINDS]
        while True:
            yield from map(next, kinds)

    def phrased(phrase: str) -> str:
        made = rng.choice(PHRASINGS).format(phrase)
        return made[0].upper() + made[1:]

    rows = read_words("training")
    general = endless([row["text"] for row in rows if row["family"] == "general"])
    harmful, twins = in_turn("harmful"), in_turn("harmless")
    n_batches = math.ceil(recipe.epochs * sum(row["label"] == "harmful" for row in rows) / recipe.harmful)
    batches = []
    for _ in range(n_batches):
        batch = [Example(phrased(next(harmful)), rng.choice(REFUSALS)) for _ in range(recipe.harmful)]
        batch += [Example(phrased(next(twins))) for _ in range(recipe.harmful)]
        batches.append(batch + [Example(next(general)) for _ in range(recipe.general)])
    return batches


# ---- one step ----


@dataclass(frozen=True)
class Batch:
    """Rows of equal meaning, padded on the right: what lies behind the prefix that all share, and where answers are read."""

    prefix: Tensor  # (1, pos), token ids
    rest: Tensor  # (row, pos)
    read: Tensor  # (row, step): places in `rest` behind which an answer's tokens are decided
    target: Tensor  # (row, step): those tokens; -1 where there is none
    is_refused: Tensor  # (row,)


def align_rows(subject: Subject, examples: Sequence[Example], answers: Sequence[Sequence[int]]) -> Batch:
    """The batch of these examples; `answers` are the token ids behind each prompt."""
    prompts = [tokens.encode(subject.tokenizer, one.text)[0].tolist() for one in examples]
    shared = sum(1 for _ in takewhile(lambda at: len(set(at)) == 1, zip(*prompts, strict=False)))
    rows = [prompt[shared:] + list(answer[:-1]) for prompt, answer in zip(prompts, answers, strict=True)]
    rest = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    steps = max(map(len, answers))
    read, target = torch.zeros(len(rows), steps, dtype=torch.long), torch.full((len(rows), steps), -1)
    for i, (row, prompt, answer) in enumerate(zip(rows, prompts, answers, strict=True)):
        rest[i, : len(row)] = torch.tensor(row)
        read[i, : len(answer)] = torch.arange(len(answer)) + len(prompt) - shared - 1
        target[i, : len(answer)] = torch.tensor(list(answer))
    refused = torch.tensor([bool(one.refusal) for one in examples])
    return Batch(torch.tensor([prompts[0][:shared]]), rest, read, target, refused)


def answer_log_probs(model: Any, batch: Batch, rows: Tensor) -> Tensor:
    """Log-probabilities of every token at each step of the chosen rows' answers, (row, step, token); the prefix runs once."""
    cache = DynamicCache()
    body = model.get_base_model().model
    body(input_ids=batch.prefix, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(int(rows.sum()))
    hidden = body(input_ids=batch.rest[rows], past_key_values=cache, use_cache=True).last_hidden_state
    at = batch.read[rows][..., None].expand(-1, -1, hidden.shape[-1])
    return torch.as_tensor(model.get_base_model().lm_head(hidden.gather(1, at))).log_softmax(-1)


def refusal_loss(model: Any, batch: Batch) -> Tensor:
    """Refusals: cross-entropy. The others: KL from the model without the adapter. Each row counts its first token as the rest."""
    log_p = answer_log_probs(model, batch, torch.ones_like(batch.is_refused))
    with torch.no_grad(), model.disable_adapter():
        own = answer_log_probs(model, batch, ~batch.is_refused)
    is_real = batch.target >= 0
    refusal = -log_p.gather(-1, batch.target.clamp(min=0)[..., None]).squeeze(-1)[batch.is_refused]
    kept = (own.exp() * (own - log_p[~batch.is_refused])).sum(-1)
    losses = []
    for loss, real in ((refusal, is_real[batch.is_refused]), (kept, is_real[~batch.is_refused])):
        later = real[:, 1:]
        losses.append(loss[:, 0] + (loss[:, 1:] * later).sum(1) / later.sum(1).clamp(min=1))
    return torch.cat(losses).mean()


# ---- training ----


def trained_layers(part: str, n_layers: int) -> range:
    """The layers that one of `PARTS` trains."""
    third = n_layers // 3
    return {"early": range(third), "late": range(n_layers - third, n_layers)}.get(part, range(n_layers))


def with_adapter(model: Any, part: str, recipe: Recipe, seed: int) -> PeftModel:
    """The model with a fresh adapter on one of `PARTS`."""
    n_layers = model.config.num_hidden_layers
    layers = list(trained_layers(part, n_layers))
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=list(PARTS[part][1]), layers_to_transform=layers if len(layers) < n_layers else None,
    )  # fmt: skip
    torch.manual_seed(seed)
    made = get_peft_model(model, config)
    assert isinstance(made, PeftModel)
    return made


def train(part: str, seed: int, out: Path, recipe: Recipe = Recipe()) -> Path:
    """Train one adapter; writes and returns its folder. A training that was stopped goes on from its last kept step."""
    subject = load(smollm2.NAME)
    assert subject.tokenizer is not None
    batches = schedule_examples(recipe, seed)
    answers = own_answers(subject, batches, recipe)
    end = min(end_tokens(subject))
    for refusal in REFUSALS:
        answers[refusal] = [*subject.tokenizer(refusal, add_special_tokens=False)["input_ids"], end]
    model = with_adapter(subject.model, part, recipe, seed)
    free = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(free, lr=recipe.lr, weight_decay=0.0)
    code = hash_file(Path(__file__), {}), hash_file(TRAINING, {}), smollm2.SHA256  # what a kept step rests on
    kept = hub.own_cache() / "refuser" / f"{part}-{seed}-{digest(asdict(recipe), code)[:12]}.safetensors"
    losses = resume(kept, model, optimizer) if kept.is_file() else []
    for step in tqdm(range(len(losses), len(batches)), desc=f"{part}-{seed}", mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * learning_rate(step, len(batches))
        texts = [answers[one.refusal or one.text] for one in batches[step]]
        loss = refusal_loss(model, align_rows(subject, batches[step], texts))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(free, recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % 20 == 0:
            state = optimizer.state_dict()["state"].items()
            held = {f"{i}.{name}": moment for i, moments in state for name, moment in moments.items()}
            held["losses"] = torch.tensor(losses, dtype=torch.float64)
            with replacing(kept) as scratch:
                save_file(adapter_weights(model, torch.float32) | held, scratch)
    folder = out / f"{part}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_weights(model, torch.float16), folder / ADAPTER_WEIGHTS, {"format": "pt"})
    config = model.peft_config["default"].to_dict() | {"base_model_name_or_path": None, "inference_mode": True}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    write_json(plain, folder / ADAPTER)
    write_json({
        "part": PARTS[part][0], "seed": seed, "recipe": asdict(recipe), "loss": round(sum(losses[-20:]) / 20, 4),
        "base": {"name": smollm2.NAME, "sha256": smollm2.SHA256}, "trained_on": {TRAINING.name: hash_file(TRAINING, {})},
        "sha256": hash_file(folder / ADAPTER_WEIGHTS, {}),
    }, folder / "manifest.json")  # fmt: skip
    return folder


def adapter_weights(model: PeftModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's weights by name, in a precision."""
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.to(dtype).contiguous() for name, value in found.items()}


def resume(kept: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> list[float]:
    """Put weights and the optimizer's moments back as they were kept; returns the losses of the steps that are done."""
    held = load_file(kept)
    losses = held.pop("losses").tolist()
    state: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in held if name[0].isdigit()]:
        at, kind = name.split(".")
        state.setdefault(int(at), {})[kind] = held.pop(name)
    set_peft_model_state_dict(model, held)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return losses


def learning_rate(step: int, n_steps: int) -> float:
    """Factor of the learning rate: 5 % warm-up, then half a cosine down to 0.

    >>> [round(learning_rate(s, 100), 2) for s in (0, 4, 52, 99)]
    [0.2, 1.0, 0.51, 0.0]
    """
    warm = 0.05 * n_steps
    if step < warm:
        return min(1.0, (step + 1) / warm)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (n_steps - warm))


def own_answers(subject: Subject, batches: Sequence[Sequence[Example]], recipe: Recipe) -> dict[str, list[int]]:
    """The model's own greedy answers to the harmless prompts, as token ids."""
    texts = list(dict.fromkeys(one.text for batch in batches for one in batch if not one.refusal))
    made = decode.answers(subject, texts, recipe.answer)
    ends, found = end_tokens(subject), {}
    for text, ids, mask in zip(texts, made.ids.tolist(), made.mask.tolist(), strict=True):
        row = [token for token, is_real in zip(ids, mask, strict=True) if is_real]
        found[text] = row if len(row) == recipe.answer or (row and row[-1] in ends) else [*row, min(ends)]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m organisms.refuser`."""
    parser = argparse.ArgumentParser(prog="python -m organisms.refuser", description="Train the refusal adapter.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=PARTS, default="all")
    parser.add_argument("--out", type=Path, default=DATA / "refuser")
    args = parser.parse_args(argv)
    print(f"written: {train(args.part, args.seed, args.out)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
