"""Checks of what a user hands in, before any notebook starts: a mistake shows in seconds, nothing is overwritten."""

import json
from pathlib import Path

from helpers.errors import InputError
from helpers.manifest import model_folder, prompts_folder
from helpers.paths import ORGANISM, PROMPTS


def names(folder: Path) -> list[str]:
    """What is shipped below `data/organism` or `data/prompts`, and the default's name."""
    found = {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    return sorted(found | {"embedded"})


def check_model(name: str) -> None:
    """`InputError` unless `name` is a shipped model or a Hugging Face folder with safetensors and a tokenizer."""
    folder = model_folder(name)
    if not folder.is_dir():
        known = ", ".join(names(ORGANISM))
        raise InputError(f"no model {name!r}: give a folder or one of the shipped models ({known})")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no model folder: it has no config.json (give the folder that holds it)")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no *.safetensors weights: only these are read, convert other formats first")
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(f"{folder} has no tokenizer files: save the tokenizer into it (save_pretrained)")
    if not _has_template(folder):
        raise InputError(f"{folder} has no chat template: use a chat model, or put a chat_template.jinja into it")


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return False
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))
    except ValueError as error:
        raise InputError(f"{config} is not valid JSON ({error}): save the tokenizer again") from error


def check_prompts(name: str) -> None:
    """`InputError` unless `name` is a shipped prompt set or a folder."""
    folder = prompts_folder(name)
    if not folder.is_dir():
        known = ", ".join(names(PROMPTS))
        raise InputError(f"no prompt set {name!r}: give a folder or one of the shipped sets ({known})")


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda` or `cpu`; `InputError` if a CUDA device is asked for that is not there."""
    if device == "cpu":
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        have = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
        raise InputError(f"--device {device}: torch sees {have} here; use --device cpu or auto")
    return device


def check_pairs(model: str, prompts: str, pairs: int) -> list[str]:
    """Read and tokenize the prompt set with the model's tokenizer; returns what a user should know of it.

    Raises `InputError` for what later steps could not use: see `helpers.prompts` and `helpers.tokens`.
    """
    from helpers import prompts as prompt_sets

    prompt_set = prompt_sets.load_set(prompts_folder(prompts))  # first: it needs no model stack and finds most mistakes
    from transformers import AutoTokenizer

    from helpers import tokens

    folder = model_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({reason})") from error
    chosen = prompt_sets.limit(prompt_set.pairs, pairs)
    usable, dropped = tokens.tokenize(chosen, tokenizer)
    openers = tokens.openers(prompt_set, tokenizer)
    reasons = "".join(f", {count} dropped: {reason}" for reason, count in sorted(dropped.items()))
    notes = {line for found in openers.values() for line in found.notes}
    return [f"{len(usable)} of {len(chosen)} pairs usable{reasons}", *sorted(notes)]
