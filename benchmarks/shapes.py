"""The models, prompts and interventions that are timed: random weights, since time does not depend on them."""

import argparse
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from companion.base import device


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, and how many pairs of how many tokens it is given."""

    n_layers: int = 12
    d_model: int = 512
    d_mlp: int = 1376
    n_heads: int = 8
    n_key_heads: int = 8
    vocabulary: int = 32_000
    n_pairs: int = 16
    n_pos: int = 48
    n_shared: int = 0  # first tokens that all prompts have in common


QUOTED = Shape()
SMOKE = Shape(3, 64, 96, 4, 4, 500, 2, 8)
LLAMA_8B = Shape(32, 4096, 14_336, 32, 8, 128_256, 128, 64)
SMALL_8B = Shape(4, 256, 896, 8, 2, 2_000, 4, 64)  # the same proportions where there is no GPU


@dataclass(frozen=True)
class Job:
    """One intervention: a site at one layer and one position; `index` is the neuron or head."""

    site: str
    layer: int
    position: int
    index: int | None = None


@dataclass(frozen=True)
class Workload:
    """What is timed: interventions, on which kind of pairs, and whether the log-probability is wanted as well."""

    name: str
    jobs: tuple[Job, ...]
    pairs: str = "random"
    log_prob: bool = True


SITES = ("resid_post", "attn_out", "mlp_out")


def workloads(shape: Shape) -> list[Workload]:
    """The questions of a mediation study, one of them on pairs that differ in one token as well."""
    last, top, middle = shape.n_pos - 1, shape.n_layers - 1, shape.n_layers // 2
    at_last = tuple(Job(site, layer, last) for layer in range(shape.n_layers) for site in SITES)
    everywhere = tuple(replace(job, position=position) for position in range(shape.n_pos) for job in at_last)
    at_top = tuple(Job("neuron", top, last, neuron) for neuron in range(shape.d_mlp))
    at_middle = tuple(Job("neuron", middle, last, neuron) for neuron in range(min(256, shape.d_mlp)))
    return [
        Workload("layers and modules, last token", at_last),
        Workload("layers and modules, every token", everywhere),
        Workload("layers and modules, every token, minimal pairs", everywhere, "minimal"),
        Workload("all neurons of the last layer, log-odds only", at_top, log_prob=False),
        Workload(f"{len(at_middle)} neurons of a middle layer", at_middle),
    ]


def asked(prog: str, description: str, arguments: Sequence[str] | None) -> tuple[Shape, str]:
    """The shape that a command line asks for, and what its files' names end with; sets the number of threads."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--shape", choices=["quoted", "smoke"], default="quoted")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return (SMOKE, "_smoke") if options.shape == "smoke" else (QUOTED, "")


def random_llama(
    shape: Shape, dtype: torch.dtype = torch.float32, where: torch.device = device.HOST
) -> LlamaForCausalLM:
    """Random weights, the same each time."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.d_model, intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads, num_key_value_heads=shape.n_key_heads,
        tie_word_embeddings=False, initializer_range=0.05, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with where:
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def prompts(shape: Shape, kind: str) -> tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair pos"]]:
    """Control and treated tokens: "random" pairs differ everywhere, "minimal" ones in one token in the middle."""
    drawn = torch.randint(
        3, shape.vocabulary, (2, shape.n_pairs, shape.n_pos), generator=torch.Generator().manual_seed(1)
    )
    control, treated = drawn[0], drawn[1]
    if kind == "minimal":
        middle = treated[:, shape.n_pos // 2].clone()
        treated = control.clone()
        treated[:, shape.n_pos // 2] = middle
    return control, treated


def outcome(logits: Float[Tensor, "... row"], log_prob: bool) -> Float[Tensor, "... number"]:
    """The logit difference of the first two rows and, if wanted, the log-probability of the first."""
    difference = logits[..., 0] - logits[..., 1]
    if not log_prob:
        return difference[..., None]
    return torch.stack([difference, logits[..., 0] - logits.logsumexp(-1)], dim=-1)


def tokenizer_folder(folder: Path, vocabulary: int) -> Path:
    """A one-word-a-token tokenizer, for tools that cannot do without one."""
    words = {f"w{i}": i for i in range(vocabulary)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="w1", eos_token="w2", pad_token="w2", unk_token="w0"
    )
    made.save_pretrained(folder)
    return folder


def machine(where: torch.device = device.HOST) -> dict[str, Any]:
    """What the figures were measured on, without names or addresses; of a GPU, that which computed them."""
    card = device.facts(where)
    name = card.pop("name")
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": "none" if where.type == "cpu" else name,
        **card,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


REAL = Shape(30, 576, 1536, 9, 3, 49_152, 4, 37, 25)  # of SmolLM2-135M, with a batch of the shipped pairs of T1


def sharing(shape: Shape) -> tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair pos"]]:
    """Control and treated tokens: all rows share the first `n_shared`, and a pair differs in the token behind them only."""
    control, other = prompts(shape, "random")
    control[:, : shape.n_shared] = control[0, : shape.n_shared].clone()
    treated, at = control.clone(), shape.n_shared
    treated[:, at] = torch.where(other[:, at] == control[:, at], 1, other[:, at])
    return control, treated
