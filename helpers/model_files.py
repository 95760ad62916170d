"""What must be true of a model's folder before its weights are read: a config of a causal LM, safetensors, no foreign code."""

from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers import hub, json_text
from helpers.errors import InputError
from helpers.json_text import BrokenJson

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
        content = json_text.parse(config.read_text(encoding="utf-8"))
    except BrokenJson as error:
        raise InputError(f"{config} is not valid JSON ({error}); download it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{config} is not UTF-8 text; download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{config} holds no JSON object; download it again")
    return content
