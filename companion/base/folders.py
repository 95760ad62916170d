"""Checks of what a user hands in, before any notebook starts: a mistake shows in seconds, nothing is overwritten.

What must be true of a model's folder before its weights are read: a config of a causal LM, safetensors, no foreign code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from companion.base import files, hub
from companion.base.errors import InputError
from companion.base.files import BrokenJson, read_json
from companion.base.paths import ORGANISM, PROMPTS, at_home, relative


def model_folder(name: str) -> Path:
    """The folder of a shipped model (`embedded` is seed 0 of the windowed variant), the folder named, or the hub's cache.

    Raises InputError for a model of the hub that is not in the cache.
    """
    shipped = ORGANISM / ("window-0" if name == "embedded" else name)
    if shipped.is_dir() or Path(name).is_dir() or hub.parse(name) is None:
        return shipped if shipped.is_dir() else Path(name)
    return hub.folder_of(name)


def prompts_folder(name: str) -> Path:
    """The folder of a shipped prompt set or the folder named."""
    return PROMPTS / name if (PROMPTS / name).is_dir() else Path(name)


def from_caller(given: str) -> Path:
    """A path that a user typed, counted from where it was typed: run_all.sh changes into the repository."""
    return Path(os.environ.get("COMPANION_CALLER", "."), expanded(given))


def expanded(given: str) -> Path:
    """The path with `~` replaced, where it names a home; `InputError` for what no path may hold."""
    if "\0" in given:
        raise InputError(f"{given!r} holds a null character, which no path may: take it out")
    return at_home(Path(given))


def names(folder: Path) -> list[str]:
    """What is shipped below `data/organism` or `data/prompts`, and the default's name."""
    found = {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    return sorted(found | {"embedded"})


def check_model(name: str) -> None:
    """`InputError` unless `name` is a shipped model or a Hugging Face chat model's folder with safetensors.

    This looks at files only; `companion.model.load.load` checks what is in them. A model of the hub is looked at when it is
    downloaded.
    """
    if hub.parse(name) is not None and not Path(name).is_dir():
        return
    folder = model_folder(name)
    if not folder.is_dir():
        raise InputError(
            f"no model {name!r}: give a folder or one of the shipped models ({', '.join(names(ORGANISM))}), "
            "or a model of the hub as ORG/MODEL"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no model folder: it has no config.json (give the folder that holds it)")
    config = _json(folder / "config.json")
    if (
        "auto_map" in config and "model_type" not in config and not hub.trusts_code()
    ):  # of a known family the library's own code is used
        raise InputError(
            f"{folder} asks to run code of its own (auto_map), which is never done unasked: use a known family"
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no *.safetensors weights: only these are read, convert other formats first")
    check_chat(folder)


def check_judge(name: str) -> None:
    """`InputError` unless the model that is to label answers could be loaded, as far as files tell: hours pass before it is.

    What `check_model` asks, and whether the weight files are all there and whole. A model of the hub is looked at when it
    is downloaded.
    """
    try:
        check_model(name)
        if not (hub.parse(name) is not None and not Path(name).is_dir()):
            check_weights(model_folder(name))
    except InputError as error:
        raise InputError(f"--judge: {error}") from error


def check_weights(folder: Path) -> None:
    """`InputError` for a weight file that the index names and is not there, and for one that is cut off or no safetensors."""
    names = hub.weight_files(folder) if (folder / hub.INDEX).is_file() else []
    for path in [*(folder / name for name in names), *sorted(folder.glob("*.safetensors"))]:
        if not path.is_file():
            raise InputError(f"{path} is not there, though {hub.INDEX} names it: copy or download the model again")
        if not _is_whole(path):
            raise InputError(f"{path} is cut off or no safetensors file: copy or download the model again")


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes of the header's length, the header, the data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < min(path.stat().st_size, 100_000_000):
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return False
    return all(type(end) is int for end in ends) and path.stat().st_size == 8 + length + max(ends, default=0)


def check_chat(folder: Path) -> None:
    """`InputError` unless a tokenizer and a chat template are in the model's folder."""
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(f"{folder} has no tokenizer files: save the tokenizer into it (save_pretrained)")
    if not _has_template(folder):
        raise InputError(f"{folder} has no chat template: use a chat model, or put a chat_template.jinja into it")


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(_json(config).get("chat_template"))


def _json(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{relative(path)} holds no JSON object: save the model again")
    return content


PICKLED = ("*.bin", "*.pt", "*.pth")


def check_folder(folder: Path) -> None:
    """`InputError` unless the folder holds a causal language model with safetensors weights and no code that is not trusted."""
    check_config(folder)
    if not any(folder.glob("*.safetensors")):
        pickled = next((path.name for suffix in PICKLED for path in folder.glob(suffix)), None)
        raise no_weights(str(folder), pickled)


def no_weights(where: str, pickled: str | None) -> InputError:
    """The error for a model without safetensors; `pickled` names a file of pickled weights, where there is one."""
    what = f"its weights are pickled ({pickled}), which can run code" if pickled else "it has no weights"
    return InputError(f"{where}: {what}; expected *.safetensors (save_pretrained writes them)")


def check_config(folder: Path) -> None:
    """The part of `check_folder` that needs no weights, so that it can be asked before they are downloaded."""
    settings = _settings(folder)
    # Many models of known families name code of their own beside it; the library's own code is used for those.
    if "auto_map" in settings and str(settings.get("model_type")) not in CONFIG_MAPPING and not hub.trusts_code():
        raise InputError(
            f"{folder} asks to run code of its own (auto_map), which is never done unasked; use a model of a known "
            "family, or read that code and type --trust-remote-code"
        )
    named = settings.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise InputError(
            f"{folder} holds {', '.join(names) or 'no named architecture'}, not a causal language model; "
            "expected a class ...ForCausalLM or ...LMHeadModel (of a multimodal model, its text part)"
        )
    if settings.get("quantization_config"):
        raise InputError(
            f"{folder} holds quantized weights, whose layers the exact replay does not know; use the original model"
        )


def _settings(folder: Path) -> dict[str, Any]:
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{folder} has no config.json; expected a model folder as save_pretrained writes it")
    try:
        content = files.parse_json(config.read_text(encoding="utf-8"))
    except BrokenJson as error:
        raise InputError(f"{config} is not valid JSON ({error}); download it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{config} is not UTF-8 text; download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{config} holds no JSON object; download it again")
    return content
