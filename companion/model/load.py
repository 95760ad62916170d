"""Loading a model: by name, from a folder or the hub, or one that is already in memory; and what its tokens may be.

Weights come from safetensors and GGUF only and code only from the installed library. What is loaded is checked before it is used.
Of a hub's model config and tokenizer come first, so that one which cannot be used is refused before gigabytes are fetched.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from accelerate import dispatch_model
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from companion.base import folders, gguf, hub, paths, smollm2
from companion.base.device import HOST, make_exact, resolve
from companion.base.errors import InputError, explained
from companion.base.files import write_text
from companion.base.hub import HubId, explain, is_network
from companion.model import architecture, memory
from companion.model.architecture import Subject, find_parts, hash_files
from companion.model.verify import read_facts, verify

DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_)  # what the library's initialisation is made of
SMALL = ["*.json", "*.jinja", "*.model", "*.txt"]  # what is fetched of a hub's model before its weights
WEIGHTS = ["*.safetensors"]
IGNORED = ["*/*", "consolidated*"]  # subfolders hold other formats, and some repositories a second copy of the weights
FAILURES = (OSError, ValueError, RuntimeError, HTTPError)  # hf_xet raises RuntimeError if the network goes
# Buffers that old checkpoints hold and the library makes anew.
HARMLESS = (".masked_bias", ".position_ids", ".rotary_emb.inv_freq", ".attn.bias")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def load(
    name: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    only_answers: bool = False,
    adapter_scale: float = 1.0,
) -> Subject:
    """A model by name ("embedded", "window-1", "smollm2"), by folder, GGUF file or hub id ("org/model@revision"), checked.

    `MODEL+FOLDER` is a model with the LoRA adapter in that folder, merged in float32 and times `adapter_scale`. Weights of any
    precision are converted to `dtype`: float32 or float64, or bfloat16 for screening. On a GPU products are full float32 (no
    TF32). The sites of a model that `only_answers`, such as a judge, are not checked, and no copy of it is planned for.
    Raises InputError: no such model, no config.json, pickled weights, remote code, not a causal language model, an unknown
    architecture, too large for memory, missing or unused tensors, an adapter that does not fit or lies beside the weights
    unasked, or a model that cannot be replayed exactly.
    """
    base, adapter = folders.split_adapter(str(name))
    folder = _folder(base)
    if not gguf.is_gguf(folder):
        folders.check_folder(folder)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    place = resolve(device)
    make_exact(place)
    copies = 1 if only_answers else None
    if adapter is None:
        model = _load_model(folder, DTYPES[dtype], place, copies)
    else:
        model = _load_merged(folder, adapter, DTYPES[dtype], place, copies, adapter_scale)
    tokenizer = load_tokenizer(folder) if _has_tokenizer(folder) else None
    hashes = hash_files(folders.weights(folder, adapter))
    found = find_parts(model.eval().requires_grad_(False), tokenizer, str(name), hashes)
    return found if only_answers else _checked(found, "" if adapter is None else adapter.name)


def from_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str = "in-memory"
) -> Subject:
    """A model that is already in memory, put into evaluation mode without gradients, and checked; raises as `verify` does."""
    return _checked(find_parts(model.eval().requires_grad_(False), tokenizer, name))


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
    twin = find_parts(model.eval().requires_grad_(False), subject.tokenizer, f"{subject.name}-untrained-{seed}")
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


def _folder(name: str) -> Path:
    if name == smollm2.NAME:
        return smollm2.fetch_smollm2()
    if folders.is_on_hub(name):
        return fetch_model(name)
    folder = folders.model_folder(name)
    if folder.is_dir() or gguf.is_gguf(folder):
        return folder
    known = [*folders.names(paths.ORGANISM), smollm2.NAME, *smollm2.refusers()]
    raise InputError(
        f"no model {name!r}: neither a folder nor one of {', '.join(known)}; "
        "give a folder, a GGUF file, or a model of the hub as ORG/MODEL"
    )


def _load_model(folder: Path, dtype: torch.dtype, device: torch.device, copies: float | None) -> PreTrainedModel:
    """Straight to its place: on a GPU no second copy stands in the machine's memory, unless layers must wait there."""
    where = memory.placement(memory.on_meta(folder, dtype), device, copies)
    on_gpu: dict[str, Any] = {"device_map": where or {"": str(device)}} if device.type != "cpu" else {}
    with explained(f"{folder} could not be loaded", "is it complete, and its architecture known?"):
        if gguf.is_gguf(folder):
            model, report = gguf.read_model(folder, dtype, **on_gpu)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=hub.trusts_code(),
                output_loading_info=True, **on_gpu,
            )  # fmt: skip
    if missing := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise InputError(f"{folder} lacks {len(missing)} tensors, among them {missing[0]}; download its weights again")
    if unused := sorted(key for key in report["unexpected_keys"] if not key.endswith(HARMLESS)):
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
    where = memory.placement(memory.on_meta(folder, dtype), device, copies)
    model = _load_model(folder, torch.float32, HOST, copies)
    with explained(f"{adapter} cannot be merged into {folder}", "was it trained on this model?"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is looked for below
            merged = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
        held, known = load_file(adapter / folders.ADAPTER_WEIGHTS), get_peft_model_state_dict(merged)
        if strangers := sorted(set(held) ^ set(known)):
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
    with explained(f"{other or folder}: its tokenizer cannot be loaded", "download it again"):
        if other is None:
            return gguf.read_tokenizer(folder)
        return AutoTokenizer.from_pretrained(other, local_files_only=True, trust_remote_code=hub.trusts_code())


def _has_tokenizer(folder: Path) -> bool:
    if gguf.is_gguf(folder):
        return gguf.tokenizer_folder() is not None or gguf.TOKENS in gguf.read_header(folder).values
    return any((folder / name).is_file() for name in (*hub.TOKENIZER, "tokenizer.model"))


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


# ---- models of the hub ----


def fetch_model(name: str, before_weights: Callable[[Path], object] = lambda folder: None) -> Path:
    """The cached folder of `ORG/MODEL[@REVISION]`, named by its commit; what is missing is downloaded.

    The hub is asked what a branch is now; without a network the cached copy serves, if it is complete. `before_weights` is
    called with the folder when all but the weights is there, and may refuse it. Raises InputError: no access, no network, no
    such model, no safetensors, no room.
    """
    hub_id = hub.parse(name)
    assert hub_id is not None, "the caller has parsed it"
    cached, info = hub.snapshot(hub_id), None
    cached = cached if cached is not None and hub.is_complete(cached) else None
    if cached is None or not hub_id.is_pinned:
        try:
            api = huggingface_hub.HfApi()
            info = api.model_info(hub_id.repo, revision=hub_id.revision, files_metadata=True, timeout=20)
        except FAILURES as error:
            if cached is None or not is_network(error):
                raise explain(hub_id, error) from error
    if cached is not None and info is None:
        before_weights(folder := cached)
    else:
        folder = _downloaded(hub_id, info, before_weights)
    folders.check_folder(folder)
    return folder


def _downloaded(hub_id: HubId, info: Any, before_weights: Callable[[Path], object]) -> Path:
    """The folder of the commit that the hub named, filled with what its listing has and we need."""
    pinned = HubId(hub_id.repo, str(info.sha))
    files = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    top = [Path(name) for name in files if "/" not in name]
    if Path("config.json") not in top:
        raise InputError(f"{hub_id.repo} has no config.json, so it is no model that can be loaded; check its id")
    if not any(path.suffix == ".safetensors" for path in top):
        raise folders.no_weights(hub_id.repo, top)
    folder = _fill(pinned, SMALL + (["*.py"] if hub.trusts_code() else []))
    folders.check_config(folder)
    before_weights(folder)
    wanted = hub.weight_files(folder)
    if missing := [file for file in wanted if file not in files]:
        raise InputError(
            f"{hub_id.repo} has no file {missing[0]}, where its weights should be: use a copy that save_pretrained wrote"
        )
    size = sum(size for file, size in files.items() if file in wanted and not (folder / file).is_file())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"{hub_id.repo} needs {size / 1e9:.1f} GB below {hub.cache()}, where {free / 1e9:.1f} GB are free: "
            "make room, or set HF_HOME to a folder on a larger disk"
        )
    _fill(pinned, WEIGHTS)
    ref = hub.ref(hub_id)  # the hub's library notes it only where it is asked for a branch, not a commit
    if not hub_id.is_pinned and not (ref.is_file() and ref.read_text() == folder.name):
        try:
            write_text(folder.name, ref)
        except OSError as error:
            raise explain(hub_id, error) from error
    return folder


def _fill(hub_id: HubId, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(
            hub_id.repo, revision=hub_id.revision, cache_dir=hub.cache(), allow_patterns=patterns, ignore_patterns=IGNORED,
        ))  # fmt: skip
    except FAILURES as error:
        raise explain(hub_id, error) from error


def prepare_model(name: str, device: str, dtype: str, copies: float | None = None) -> str:
    """For the command line: the model is downloaded and fits; returns its name with the commit that was resolved.

    Other names than hub ids are returned as they are. `copies` is that of `memory.run_memory`. Raises as `fetch_model`, and for
    a model without a tokenizer or a chat template, of an unknown architecture, or too large for the device's memory.
    """

    def check(folder: Path) -> None:
        folders.check_chat(folder)
        print(f"{name} ({folder.name[:12]}): {memory.check_size(folder, device, dtype, copies)}")

    hub_id = hub.parse(name)
    return name if hub_id is None or Path(name).is_dir() else hub_id.at(fetch_model(name, check).name)
