"""Loading a model: by name, from a folder or the hub, or one that is already in memory; and what its tokens may be.

Weights come from safetensors and GGUF only and code only from the installed library. What is loaded is checked before it is used.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from companion.base import folders, gguf, hub, paths, smollm2
from companion.base.device import HOST, make_exact, resolve
from companion.base.errors import InputError, explained
from companion.model import architecture, download, memory
from companion.model.architecture import Subject, find_parts, hash_files
from companion.model.verify import read_facts, verify

# Buffers that old checkpoints hold and the library makes anew.
HARMLESS = (".masked_bias", ".position_ids", ".rotary_emb.inv_freq", ".attn.bias")
DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_)  # what the library's initialisation is made of
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def load(
    name: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    copies: float | None = None,
    only_answers: bool = False,
    adapter_scale: float = 1.0,
) -> Subject:
    """A model by name ("embedded", "window-1", "smollm2"), by folder, GGUF file or hub id ("org/model@revision"), checked.

    `MODEL+FOLDER` is a model with the LoRA adapter in that folder, merged in float32, so many times as strong as
    `adapter_scale` says. Weights of any precision are
    converted to `dtype`. Verified effects are computed in float32 or float64; bfloat16 is for screening, and
    `companion.mediation.study.noise_floor` measures what it does to effects. On a GPU float32 products are computed in
    full float32 (no TF32). `copies` is that of `memory.run_memory`. The sites of a
    model that `only_answers`, such as a judge, are not checked.

    Raises:
        InputError: no such model, no config.json, pickled weights, remote code, not a causal language model, an
            unknown architecture, too large for memory, missing or unused tensors, an adapter that does not fit or lies
            beside the weights unasked, or a model that cannot be replayed exactly (see `from_model`).
    """
    base, adapter = folders.split_adapter(str(name))
    folder = _folder(base)
    if not gguf.is_gguf(folder):
        folders.check_folder(folder)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    place = resolve(device)
    make_exact(place)
    if adapter is None:
        model = _load_model(folder, DTYPES[dtype], place, copies)
    else:
        model = _load_merged(folder, adapter, DTYPES[dtype], place, copies, adapter_scale)
    tokenizer = load_tokenizer(folder) if _has_tokenizer(folder) else None
    found = find_parts(_quiet(model), tokenizer, str(name), hash_files(folders.weights(folder, adapter)))
    return found if only_answers else _checked(found, "" if adapter is None else adapter.name)


def from_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str = "in-memory"
) -> Subject:
    """A model that is already in memory, checked; it is put into evaluation mode and its gradients are switched off.

    Raises:
        InputError: sites that are not what their names say, or a model that the grid cannot replay exactly.
    """
    return _checked(find_parts(_quiet(model), tokenizer, name))


def untrained_twin(subject: Subject, seed: int = 0) -> Subject:
    """The same architecture with fresh random weights, drawn by the library's own initialisation: the same on every device."""
    config, where = copy.deepcopy(subject.model.config), getattr(subject.model, "hf_device_map", {})
    built_on = HOST if len(set(where.values())) > 1 else subject.device
    with torch.random.fork_rng(devices=[]), _DrawnByTheHost(), built_on:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=config._attn_implementation, trust_remote_code=hub.trusts_code()
        )
    model = _placed(model.to(subject.dtype), where, subject.device)
    twin = find_parts(_quiet(model), subject.tokenizer, f"{subject.name}-untrained-{seed}")
    return replace(twin, facts=subject.facts)


class _DrawnByTheHost(TorchFunctionMode):
    """Tensors of a GPU get the host's random numbers, one tensor at a time: no whole model lies in the host's memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = args[0] if args else None
        if func not in DRAWS or not isinstance(tensor, torch.Tensor) or tensor.device.type in ("cpu", "meta"):
            return func(*args, **(kwargs or {}))
        drawn = torch.empty_like(tensor, device=HOST)
        func(drawn, *args[1:], **(kwargs or {}))
        return tensor.copy_(drawn)


def _placed(model: PreTrainedModel, where: Mapping[str, str], device: torch.device) -> PreTrainedModel:
    """A model in the processor's memory, brought to its device; layers that `where` puts elsewhere lie there."""
    if len(set(where.values())) < 2:
        return model.to(device)
    model = dispatch_model(model, where, main_device=str(device))
    architecture.connect(model, where)
    return model


def _checked(subject: Subject, adapter: str = "") -> Subject:
    return replace(subject, facts=read_facts(subject, verify(subject), adapter))


def _folder(name: str | Path) -> Path:
    shipped = paths.ORGANISM / ("window-0" if name == "embedded" else str(name))
    folder = shipped if shipped.is_dir() else Path(name)
    if str(name) == smollm2.NAME:
        return smollm2.fetch_smollm2()
    if folder.is_dir() or gguf.is_gguf(folder):
        return folder
    if hub.parse(name) is not None:
        return download.fetch_model(str(name))
    known = ["embedded", *sorted(path.name for path in paths.ORGANISM.glob("*") if path.is_dir())]
    raise InputError(
        f"no model {str(name)!r}: neither a folder nor one of {', '.join([*known, smollm2.NAME, *smollm2.refusers()])}; "
        "give a folder, a GGUF file, or a model of the hub as ORG/MODEL"
    )


def _load_model(folder: Path, dtype: torch.dtype, device: torch.device, copies: float | None) -> PreTrainedModel:
    """Straight to its place: on a GPU no second copy stands in the machine's memory, unless layers must wait there."""
    where = memory.placement(memory.on_meta(folder, dtype), device, copies=copies)
    on_gpu: dict[str, Any] = {"device_map": where or {"": str(device)}} if device.type != "cpu" else {}
    with explained(f"{folder} could not be loaded", "is it complete, and its architecture known?"):
        if gguf.is_gguf(folder):
            model, report = gguf.read_model(folder, dtype, **on_gpu)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=hub.trusts_code(),
                output_loading_info=True, **on_gpu,
            )  # fmt: skip
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} tensors, among them {missing[0]}; download its weights again")
    unused = sorted(key for key in report["unexpected_keys"] if not key.endswith(HARMLESS))
    if unused:
        raise InputError(
            f"{folder}: {len(unused)} tensors of its weights have no place in the model that its config.json describes, among "
            f"them {unused[0]}; take the config.json that belongs to these weights"
        )
    if where:
        architecture.connect(model, where)
    return model


def _load_merged(
    folder: Path, adapter: Path, dtype: torch.dtype, device: torch.device, copies: float | None, scale: float
) -> PreTrainedModel:
    """The model with a LoRA adapter, times `scale`, added to its weights: merged in float32, then converted."""
    from peft import PeftModel, get_peft_model_state_dict  # a second, and few runs have an adapter
    from peft.tuners.lora import LoraLayer

    folders.check_adapter(adapter)
    where = memory.placement(memory.on_meta(folder, dtype), device, copies=copies)
    model = _load_model(folder, torch.float32, torch.device("cpu"), copies)
    with explained(f"{adapter} cannot be merged into {folder}", "was it trained on this model?"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is looked for below
            merged = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
        held, known = load_file(adapter / folders.ADAPTER_WEIGHTS), get_peft_model_state_dict(merged)
        strangers = sorted(set(held) ^ set(known))
        if strangers:
            raise InputError(
                f"{adapter} does not belong to {folder}: {len(strangers)} of its tensors or of the model's have no "
                f"counterpart, among them {strangers[0]}; give the adapter that was trained on this model"
            )
        for module in merged.modules():
            if isinstance(module, LoraLayer) and scale != 1:
                module.scale_layer(scale)
        model = merged.merge_and_unload()
    return _placed(model.to(dtype), where or {}, device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder; `InputError` where there is none or its files are damaged."""
    if not _has_tokenizer(folder):
        raise InputError(
            f"{folder} has no tokenizer: save it into the model's folder (of a GGUF file: --tokenizer DIR)"
        )
    other = gguf.tokenizer_folder() if gguf.is_gguf(folder) else folder
    try:
        if other is None:
            return gguf.read_tokenizer(folder)
        return AutoTokenizer.from_pretrained(other, local_files_only=True, trust_remote_code=hub.trusts_code())
    except InputError:
        raise
    except Exception as error:  # damaged files make the library raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{other or folder}: its tokenizer cannot be loaded ({reason}); download it again") from error


def _has_tokenizer(folder: Path) -> bool:
    if gguf.is_gguf(folder):
        return gguf.tokenizer_folder() is not None or gguf.TOKENS in gguf.read_header(folder).values
    return any((folder / name).is_file() for name in (*hub.TOKENIZER, "tokenizer.model"))


def _quiet(model: PreTrainedModel) -> PreTrainedModel:
    return model.eval().requires_grad_(False)


def check_fit(subject: Subject, largest: int, longest: int, what: str) -> None:
    """`InputError` for a token id that the model does not embed, or a text (`what`) of more tokens than it reads."""
    rows = subject.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise InputError(
            f"{subject.name}: its tokenizer gives token {largest}, but the model embeds {rows}; they do not belong "
            "together: save the model's own tokenizer into its folder"
        )
    most = getattr(subject.model.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise InputError(
            f"{subject.name} reads at most {most} tokens, and {what} takes up to {longest}: leave the longest prompts out, "
            "or use a model that reads more"
        )
