"""The models, prompts and interventions that are timed: a real model on chat prompts, and random weights of other sizes."""

import argparse
import os
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from companion.base import device
from companion.model import load
from companion.model.architecture import Subject
from companion.prompts import pairs, tokens


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
    """One intervention: a site at one layer and one position, or several at once; `index` is the neuron or head."""

    site: str
    layer: int
    position: int | tuple[int, ...]
    index: int | None = None

    @property
    def positions(self) -> list[int]:
        """The positions, in rising order."""
        return [self.position] if isinstance(self.position, int) else sorted(self.position)


@dataclass(frozen=True)
class Workload:
    """What is timed: interventions, on which kind of pairs, and what is read.

    That is a difference of two logits, with `log_prob` a log-probability as well, or with `answer` a whole answer's.
    """

    name: str
    jobs: tuple[Job, ...]
    pairs: str = "random"
    log_prob: bool = True
    answer: bool = False


@dataclass(frozen=True)
class Case:
    """A model with pairs by their kind, an answer to each of them, and the two tokens whose logits are compared."""

    subject: Subject
    shape: Shape
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    answer: Int[Tensor, "pair step"]
    rows: tuple[int, int]

    @property
    def differing(self) -> dict[str, list[int]]:
        """For each kind of pairs the positions at which any of them differ."""
        return {kind: (a != b).any(0).nonzero().flatten().tolist() for kind, (a, b) in self.pairs.items()}


SITES = ("resid_post", "attn_out", "mlp_out")
STEPS = 8  # tokens of an answer


def workloads(shape: Shape, differing: Mapping[str, Sequence[int]] | None = None) -> list[Workload]:
    """The questions of a mediation study. A patch before the first token that differs would change nothing: there is none."""
    last, top, layers = shape.n_pos - 1, shape.n_layers - 1, range(shape.n_layers)
    differing = differing or {"random": range(shape.n_pos), "minimal": [shape.n_pos // 2]}
    kind = next(iter(differing))
    at_last = tuple(Job(site, layer, last) for layer in layers for site in SITES)
    heads = tuple(Job("head", layer, last, head) for layer in layers for head in range(shape.n_heads))
    few = len(differing[kind]) < shape.n_pos // 2
    group = tuple(differing[kind]) if few else tuple(range(shape.n_pos // 2 - 2, shape.n_pos // 2 + 2))
    residual = tuple(job for job in at_last if job.site == "resid_post")

    def neurons(layer: int) -> tuple[Job, ...]:
        return tuple(Job("neuron", layer, last, neuron) for neuron in range(shape.d_mlp))

    everywhere = [
        Workload(
            f"layers and modules, every token, {name} pairs",
            tuple(replace(job, position=p) for p in range(positions[0], shape.n_pos) for job in at_last),
            name,
        )
        for name, positions in differing.items()
    ]
    return [
        Workload("layers, last token", residual, kind),
        Workload("attention and MLP outputs, last token", tuple(job for job in at_last if job not in residual), kind),
        Workload("heads, last token", heads, kind),
        *everywhere,
        Workload("token groups, layers and modules", tuple(replace(job, position=group) for job in at_last), kind),
        Workload("all neurons of the first layer", neurons(0), kind),
        Workload("all neurons of a middle layer", neurons(shape.n_layers // 2), kind),
        Workload("all neurons of the last layer", neurons(top), kind),
        Workload("all neurons of the last layer, log-odds only", neurons(top), kind, log_prob=False),
        Workload(f"whole answer of {STEPS} tokens, layers", residual, kind, answer=True),
    ]


def random_case(shape: Shape, folder: Path) -> Case:
    """A random Llama, checked, on random tokens; `folder` is for its tokenizer, which some tools cannot do without."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder, shape.vocabulary))
    subject = load.from_model(random_llama(shape), tokenizer, str(folder))
    generator = torch.Generator().manual_seed(2)
    answer = torch.randint(3, shape.vocabulary, (shape.n_pairs, STEPS), generator=generator)
    return Case(subject, shape, {kind: prompts(shape, kind) for kind in ("random", "minimal")}, answer, (0, 1))


def real_case(n_pairs: int) -> Case:
    """SmolLM2 on T2 pairs, the first of those with the commonest length and the commonest place of the first difference."""
    subject, groups = load.load("smollm2"), defaultdict(list)
    assert subject.tokenizer is not None
    wanted = [pair for pair in pairs.load_set("english").pairs if pair.treatment == "T2"]
    for made in tokens.tokenize(wanted, subject.tokenizer)[0]:
        groups[len(made.control), int((made.control != made.treated).argmax())].append(made)
    chosen = max(groups.values(), key=len)[:n_pairs]
    control, treated = (
        torch.stack([torch.tensor(getattr(one, side)) for one in chosen]) for side in ("control", "treated")
    )
    refusal = subject.tokenizer("I'm sorry, but I can't help with that.")["input_ids"][:STEPS]
    rows = (subject.tokenizer("Sure")["input_ids"][0], refusal[0])
    config = subject.model.config
    shape = Shape(
        subject.n_layers, subject.d_model, subject.d_mlp, subject.n_heads, config.num_key_value_heads, config.vocab_size,
        *control.shape,
    )  # fmt: skip
    return Case(subject, shape, {"real": (control, treated)}, torch.tensor(refusal).expand(len(chosen), -1), rows)


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
