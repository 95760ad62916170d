"""Folders and files that a user names, and the checks of a model's files before any notebook starts or weights are read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from companion.base import gguf, hub, smollm2
from companion.base.errors import InputError, explained
from companion.base.files import read_json
from companion.base.paths import ORGANISM, PROMPTS, at_home, relative

PICKLED = (".bin", ".pt", ".pth")
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def split_adapter(name: str) -> tuple[str, Path | None]:
    """A model's name, and the folder of its adapter: of `MODEL+FOLDER`, or of `smollm2-refuser`, whose adapters are shipped.

    >>> split_adapter("window-0")
    ('window-0', None)
    """
    if shipped := smollm2.refusers().get(name):
        return smollm2.NAME, shipped
    for at, letter in enumerate(name):
        if letter == "+" and (Path(name[at + 1 :]) / ADAPTER).is_file() and not Path(name).is_dir():
            return name[:at], Path(name[at + 1 :])
    return name, None


def with_adapter(model: str, adapter: Path | None) -> str:
    """The name that `split_adapter` takes apart."""
    named = {folder: name for name, folder in smollm2.refusers().items()} if model == smollm2.NAME else {}
    return named.get(adapter, f"{model}+{adapter}") if adapter else model


def weights(folder: Path, adapter: Path | None) -> list[Path]:
    """The files of a model's weights, and an adapter's with its config, which says how strongly it is added."""
    own = [folder] if gguf.is_gguf(folder) else [*folder.glob("*.safetensors")]
    return [*own, adapter / ADAPTER, adapter / ADAPTER_WEIGHTS] if adapter else own


def is_on_hub(name: str) -> bool:
    """Whether a name is that of a hub model, with or without an adapter, and no folder of that name is here."""
    base, _ = split_adapter(name)
    return hub.parse(base) is not None and not is_here(base)


def is_here(name: Path | str) -> bool:
    """Whether a folder or a GGUF file has this name."""
    return Path(name).is_dir() or (Path(name).is_file() and gguf.is_gguf(name))


def fixed(path: Path) -> Path:
    """The absolute path of a folder or a file; a file keeps its name, since that of a link says more than its target's."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def model_folder(name: str) -> Path:
    """The folder of a shipped model (`embedded` is seed 0 of the windowed variant), the folder named, or the hub's cache.

    Of a GGUF file it is the file, of `smollm2` where that lies or will. Raises `InputError` for a hub model that is not cached.
    """
    name, _ = split_adapter(name)
    shipped = ORGANISM / ("window-0" if name == "embedded" else name)
    if shipped.is_dir():
        return shipped
    if name == smollm2.NAME:
        return smollm2.place()
    return hub.folder_of(name) if is_on_hub(name) else Path(name)


def prompts_folder(name: str) -> Path:
    """The folder of a shipped prompt set or the folder named."""
    return PROMPTS / name if (PROMPTS / name).is_dir() else Path(name)


def from_caller(given: str) -> Path:
    """A path that a user typed, counted from where it was typed (run_all.sh changes folder); InputError for a null character."""
    if "\0" in given:
        raise InputError(f"{given!r} holds a null character, which no path may: take it out")
    return Path(os.environ.get("COMPANION_CALLER", "."), at_home(given))


def names(folder: Path) -> list[str]:
    """What is shipped below `data/organism` or `data/prompts`, and the default's name."""
    found = {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    return sorted(found | {"embedded"})


def is_small(name: str) -> bool:
    """Whether one thread and two notebooks at once suit a model: the embedded ones, `smollm2` and its refusers."""
    return split_adapter(name)[0] in {*names(ORGANISM), smollm2.NAME}


def check_model(name: str) -> None:
    """`InputError` unless `name` is a shipped model, or the folder or GGUF file of a chat model, as far as files tell.

    `companion.model.load` checks the weights themselves. A model of the hub is looked at when it is downloaded.
    """
    name, adapter = split_adapter(name)
    if adapter is not None:
        check_adapter(adapter)
    if is_on_hub(name) or name == smollm2.NAME:
        return
    folder = model_folder(name)
    if gguf.is_gguf(folder):
        gguf.check_chat_file(folder)
    elif folder.is_dir():
        check_folder(folder)
        check_chat(folder)
    else:
        shipped = ", ".join([*names(ORGANISM), smollm2.NAME, *smollm2.refusers()])
        raise InputError(
            f"no model {name!r}: give a folder or one of the shipped models ({shipped}), a GGUF file, or a model of the hub "
            "as ORG/MODEL"
        )


def check_judge(name: str) -> None:
    """`check_model` for the model that is to label answers, and `InputError` unless its weight files are there and whole."""
    try:
        check_model(name)
        if not is_on_hub(name):
            if gguf.is_gguf(model_folder(name)):
                raise InputError(f"{name} is a GGUF file; expected a judge's folder or ORG/MODEL")
            check_weights(model_folder(name))
    except InputError as error:
        raise InputError(f"--judge: {error}") from error


def check_folder(folder: Path) -> None:
    """`InputError` unless it holds a causal language model with safetensors weights and no code that is not trusted."""
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder} holds an adapter ({ADAPTER}), which is never merged unasked: move its adapter_* files into a folder of "
            "their own, and give that folder as --adapter if it is to be part of the model"
        )
    check_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise no_weights(str(folder), folder.iterdir())


def check_adapter(folder: Path) -> None:
    """`InputError` unless the folder holds an adapter as the `peft` library writes it, with safetensors weights."""
    if not (folder / ADAPTER).is_file():
        raise InputError(f"{folder} holds no adapter: expected {ADAPTER} and {ADAPTER_WEIGHTS}, as peft saves them")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise no_weights(str(folder), folder.iterdir())
    kind = _json_object(folder / ADAPTER).get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder} holds an adapter of type {kind}; only LORA is merged into weights exactly")


def no_weights(where: str, files: Iterable[Path]) -> InputError:
    """The error for a model whose files hold no safetensors; it names one of pickled weights, where there is one."""
    pickled = next((path.name for path in files if path.suffix in PICKLED), None)
    what = f"its weights are pickled ({pickled}), which can run code" if pickled else "it has no weights"
    return InputError(f"{where}: {what}; expected *.safetensors (save_pretrained writes them)")


def check_config(folder: Path) -> None:
    """The part of `check_folder` that needs no weights, so that it can be asked before they are downloaded."""
    if not (folder / "config.json").is_file():
        if file := next(folder.glob("*.gguf"), None):
            raise InputError(f"{folder} holds no config.json but GGUF files: name one of them, such as {file}")
        raise InputError(
            f"{folder} is no model folder: it has no config.json; expected a model folder as save_pretrained writes it"
        )
    config = _json_object(folder / "config.json")
    if "auto_map" in config and not hub.trusts_code():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # takes seconds, and few configs need it

        # Many models of known families name code of their own beside it; the library's own code is used for those.
        if str(config.get("model_type")) not in CONFIG_MAPPING:
            raise InputError(
                f"{folder} asks to run code of its own (auto_map), which is never done unasked; use a model of a known "
                "family, or read that code and type --trust-remote-code"
            )
    named = config.get("architectures")
    architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise InputError(
            f"{folder} holds {', '.join(architectures) or 'no named architecture'}, not a causal language model; "
            "expected a class ...ForCausalLM or ...LMHeadModel (of a multimodal model, its text part)"
        )
    if config.get("quantization_config"):
        raise InputError(
            f"{folder} holds quantized weights, whose layers the exact replay does not know; use the original model"
        )


def check_chat(folder: Path) -> None:
    """`InputError` unless a tokenizer and a chat template are in the model's folder."""
    if not any((folder / file).is_file() for file in hub.TOKENIZER):
        raise InputError(f"{folder} has no tokenizer files: save the tokenizer into it (save_pretrained)")
    settings = folder / "tokenizer_config.json"
    if any((folder / f"chat_template.{kind}").is_file() for kind in ("jinja", "json")):
        return
    if not (settings.is_file() and _json_object(settings).get("chat_template")):
        raise InputError(f"{folder} has no chat template: use a chat model, or put a chat_template.jinja into it")


def check_weights(folder: Path) -> None:
    """`InputError` for a weight file that is missing by the index, cut off or no safetensors."""
    try:
        from safetensors import safe_open
    except ImportError:  # the command line asks before any package is installed, and again after
        return
    indexed = hub.weight_files(folder) if (folder / hub.INDEX).is_file() else []
    for path in sorted({*(folder / name for name in indexed), *folder.glob("*.safetensors")}):
        wrong = f"{path} is missing, cut off or no safetensors file"
        with explained(wrong, "copy or download the model again"), safe_open(path, "np"):
            pass  # opening compares the file's length with its header


def _json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{relative(path)} holds no JSON object: save the model again")
    return content
