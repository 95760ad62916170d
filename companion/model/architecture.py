"""The named parts of a causal language model: every family is the same drawing, in which only attribute names differ.

`find_parts` follows those names, and `companion.model.verify` decides by arithmetic whether what it found is right. A model may
lie over several GPUs, or partly in the processor's memory (`memory.placement`). A layer on another GPU is computed there, one
projection or norm at a time: activations travel to it and back, so that all that interventions read and write is on the first
GPU. Weights that wait in the processor's memory come for each call instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from companion.base.chat import TemplateFacts, end_of_turn
from companion.base.device import to_host
from companion.base.errors import InputError

HOME = "companion_home"  # on a module whose activations travel: an empty tensor of the place they come from


def connect(model: nn.Module, where: Mapping[str, str], hook: type[AlignDevicesHook] = AlignDevicesHook) -> None:
    """Let modules that `where` has put elsewhere take from and give to the embedding's GPU, which is named first."""
    main = next(iter(where.values()))
    here = torch.empty(0, device=main, dtype=next(model.parameters()).dtype)
    for module in model.modules():
        for one in _hooks(module):  # with several GPUs the library takes any of them for what waits
            one.execution_device = main
    for name, place in where.items():
        is_remote = place not in (main, "cpu")
        for module in model.get_submodule(name).modules():
            if is_remote:
                remove_hook_from_module(module)
            if is_remote and any(True for _ in module.parameters(recurse=False)):
                add_hook_to_module(module, hook(execution_device=place, io_same_device=True))
                object.__setattr__(module, HOME, here)  # no buffer: it must not become part of the weights
            else:  # masks and the like, used between the projections
                for key, buffer in module.named_buffers(recurse=False):
                    setattr(module, key, buffer.to(main))


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    yield from (one for one in getattr(hook, "hooks", (hook,)) if isinstance(one, AlignDevicesHook))


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer. The `*_post` norms are None in pre-norm families; `down_proj` is None in mixtures of experts.

    What `attn_write` and `mlp_write` give (attention and MLP, or their post-norms) is added to the residual stream.
    """

    block: nn.Module
    attn: nn.Module
    o_proj: nn.Module
    mlp: nn.Module
    down_proj: nn.Module | None
    attn_post: nn.Module | None
    mlp_post: nn.Module | None
    attn_write: nn.Module
    mlp_write: nn.Module


@dataclass(frozen=True)
class Subject:
    """A language model: the library's own modules by name, its sizes, the sha256 of its weights; `facts` if it was checked."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    layers: tuple[LayerParts, ...]
    final_norm: nn.Module
    unembed: nn.Module
    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int
    post_norm: bool
    sha256: str
    facts: ModelFacts | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' floating-point type, in which everything is computed."""
        return next(self.model.parameters()).dtype

    def tensor(self, numbers: Any) -> Tensor:
        """Token ids, masks or indices as a tensor where the model computes."""
        return torch.tensor(numbers, device=self.device)

    @property
    def unembedding(self) -> tuple[Float[Tensor, "row d"], Float[Tensor, "row"] | None]:
        """Weight and bias (None in most families) of the map from residual stream to logits."""
        return self.unembed.get_parameter("weight"), getattr(self.unembed, "bias", None)

    @property
    def soft_cap(self) -> float | None:
        """The bound of the final logits (Gemma 2), or None."""
        return getattr(self.model.config, "final_logit_softcapping", None)


def find_parts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str, sha256: str | None = None
) -> Subject:
    """The parts of a model; `InputError` for a model whose drawing is not the one above."""
    unembed = model.get_output_embeddings()
    if unembed is None:
        raise InputError(
            f"{type(model).__name__} has no unembedding, so it is not a causal language model; "
            "load a model of class ...ForCausalLM or ...LMHeadModel"
        )
    decoder = _part(model, "model", "transformer")
    layers = tuple(map(_layer_parts, _part(decoder, "layers", "h")))
    return Subject(
        name, model, tokenizer, layers, final_norm=_part(decoder, "norm", "ln_f"), unembed=unembed,
        n_layers=len(layers), n_heads=int(model.config.num_attention_heads), d_model=int(model.config.hidden_size),
        d_mlp=0 if layers[0].down_proj is None else written_vectors(layers[0].down_proj).shape[0],
        post_norm=layers[0].attn_post is not None, sha256=sha256 or hash_tensors(model),
    )  # fmt: skip


def end_tokens(subject: Subject) -> dict[int, tuple[str, ...]]:
    """The tokens that end an answer, and who names each: generation config, tokenizer, chat template.

    Many generation configs name the end of a text and not that of a turn, behind which answers run on into a dialogue.
    """
    named: dict[str, Any] = {"generation config": subject.model.generation_config.eos_token_id}
    if subject.tokenizer is not None:
        named["tokenizer"] = subject.tokenizer.eos_token_id
        named["chat template"] = end_of_turn(subject.tokenizer, str(subject.tokenizer.chat_template or ""))
    ends: dict[int, tuple[str, ...]] = {}
    for place, tokens in named.items():
        for token in dict.fromkeys([tokens] if isinstance(tokens, int) else tokens or ()):
            ends[token] = (*ends.get(token, ()), place)
    return ends


def written_vectors(projection: nn.Module) -> Float[Tensor, "entry d"]:
    """What one unit of each input entry of an output or down projection adds to the projection's output.

    Row j of a down projection is neuron j's output vector. GPT-2's `Conv1D` stores it so, `nn.Linear` transposed.
    """
    with align_module_device(projection):  # of a weight that waits, the one that comes
        weight: Any = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        kind = type(projection).__name__
        raise InputError(f"{kind} holds no plain weight matrix, so what it writes cannot be told by entry")
    weight = weight.to(getattr(projection, HOME, weight))
    return weight.T if isinstance(projection, nn.Linear) else weight


def hash_tensors(model: nn.Module) -> str:
    """sha256 over the names and bytes of a model's weights (shared tensors once), for models without a file."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.named_parameters()):
        if tensor.is_meta:  # it waits elsewhere
            owner, _, name = key.rpartition(".")
            tensor = next(one.weights_map[name] for one in _hooks(model.get_submodule(owner)) if one.offload)
        digest.update(key.encode())
        digest.update(to_host(tensor.contiguous().view(-1).view(torch.uint8)).tobytes())
    return digest.hexdigest()


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over weight files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def _layer_parts(block: nn.Module) -> LayerParts:
    attn, mlp = _part(block, "self_attn", "attn"), _part(block, "mlp")
    # Gemma and OLMo 2 normalise what attention and MLP write; elsewhere `post_attention_layernorm` stands before the MLP.
    posts = ("post_attention_layernorm", "post_feedforward_layernorm")
    attn_post, mlp_post = (_part(block, name) if hasattr(block, posts[1]) else None for name in posts)
    return LayerParts(
        block, attn, _part(attn, "o_proj", "c_proj"), mlp, getattr(mlp, "down_proj", getattr(mlp, "c_proj", None)),
        attn_post, mlp_post, attn_write=attn_post or attn, mlp_write=mlp_post or mlp,
    )  # fmt: skip


def _part(parent: nn.Module, *names: str) -> Any:
    for name in names:
        if isinstance(getattr(parent, name, None), nn.Module):
            return getattr(parent, name)
    raise InputError(
        f"unknown architecture: {type(parent).__name__} has none of {', '.join(names)}; known are Llama, Qwen2, Qwen3, "
        "Gemma 2, Gemma 3 (text), Mistral, Phi-3, OLMo 2, GPT-2 and models that name their parts as one of these does; "
        "for another family add its names to companion/model/architecture.py and run tests/model/test_replay.py on a tiny copy"
    )


@dataclass(frozen=True)
class ModelFacts:
    """Everything that later steps assume of a model, as it was found at load.

    `noise` is the largest difference between two ways to the same activation, as a share of the largest one compared.
    `ends` maps each token that ends an answer to the places that name it (`end_tokens`).
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
