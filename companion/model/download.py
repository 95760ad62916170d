"""Models of the Hugging Face hub: downloaded once into the hub's own cache, safetensors only, checked before the weights.

Files come in two steps: config and tokenizer first, so that a model which cannot be used is refused before gigabytes
are fetched; then the weights. Without a network, what is in the cache is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HTTPError

from companion.base import folders, hub
from companion.base.errors import InputError
from companion.base.files import write_text
from companion.base.hub import HubId, explain, is_network

SMALL = ["*.json", "*.jinja", "*.model", "*.txt"]
WEIGHTS = ["*.safetensors"]
# Subfolders hold other formats, and some repositories a second copy of the weights under this name.
IGNORED = ["*/*", "consolidated*"]
FAILURES = (OSError, ValueError, RuntimeError, HTTPError)  # hf_xet raises RuntimeError if the network goes


def fetch_model(name: str, before_weights: Callable[[Path], object] = lambda folder: None) -> Path:
    """The cached folder of `ORG/MODEL[@REVISION]`, named by its commit; what is missing is downloaded.

    `before_weights` is called with the folder when all but the weights is there, and may refuse it. Raises InputError
    with one sentence for everything that can go wrong: no access, no network, no such model, no safetensors, no room.
    """
    hub_id = hub.parse(name)
    assert hub_id is not None, "the caller has parsed it"
    folder = hub.snapshot(hub_id)
    if not (hub_id.is_pinned and folder is not None and hub.is_complete(folder)):
        folder = _updated(hub_id, before_weights)
    folders.check_folder(folder)
    return folder


def _updated(hub_id: HubId, before_weights: Callable[[Path], object]) -> Path:
    """Ask the hub what the revision is now; without a network the cached copy serves, if it is complete."""
    try:
        info = huggingface_hub.HfApi().model_info(
            hub_id.repo, revision=hub_id.revision, files_metadata=True, timeout=20
        )
    except FAILURES as error:
        folder = hub.snapshot(hub_id)
        if is_network(error) and folder is not None and hub.is_complete(folder):
            return folder
        raise explain(hub_id, error) from error
    pinned = HubId(hub_id.repo, str(info.sha))
    files = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    _check_listing(hub_id, files)
    small = SMALL + (["*.py"] if hub.trusts_code() else [])
    folder = _download(pinned, small)
    folders.check_config(folder)
    before_weights(folder)
    wanted = hub.weight_files(folder)
    if missing := [file for file in wanted if file not in files]:
        raise InputError(
            f"{hub_id.repo} has no file {missing[0]}, where its weights should be: use a copy that save_pretrained wrote"
        )
    _check_room(hub_id, sum(size for file, size in files.items() if file in wanted and not (folder / file).is_file()))
    folder = _download(pinned, WEIGHTS)
    _remember(hub_id, folder.name)
    return folder


def _remember(hub_id: HubId, commit: str) -> None:
    """Note which commit the revision is: the hub's library does so only where it is asked for a branch, not a commit."""
    file = hub.ref(hub_id)
    if hub_id.is_pinned or (file.is_file() and file.read_text() == commit):  # a cache for reading only is left alone
        return
    try:
        write_text(commit, file)
    except OSError as error:
        raise explain(hub_id, error) from error


def _download(hub_id: HubId, patterns: list[str]) -> Path:
    try:
        place = huggingface_hub.snapshot_download(
            hub_id.repo, revision=hub_id.revision, cache_dir=hub.cache(),
            allow_patterns=patterns, ignore_patterns=IGNORED,
        )  # fmt: skip
    except FAILURES as error:
        raise explain(hub_id, error) from error
    return Path(place)


def _check_listing(hub_id: HubId, files: dict[str, int]) -> None:
    """Whether the repository can be a model for us, from the names of its files."""
    top = [name for name in files if "/" not in name]
    if "config.json" not in top:
        raise InputError(f"{hub_id.repo} has no config.json, so it is no model that can be loaded; check its id")
    if not any(Path(name).match("*.safetensors") for name in top):
        raise folders.no_weights(hub_id.repo, map(Path, top))


def _check_room(hub_id: HubId, size: int) -> None:
    place = next(folder for folder in (hub.cache(), *hub.cache().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if size > free:
        raise InputError(
            f"{hub_id.repo} needs {size / 1e9:.1f} GB below {hub.cache()}, where {free / 1e9:.1f} GB are free: "
            "make room, or set HF_HOME to a folder on a larger disk"
        )


def prepare_model(name: str, device: str, dtype: str, *, copies: float | None = None, beside: int = 0) -> str:
    """For the command line: the model is downloaded and fits; returns its name with the commit that was resolved.

    Other names than hub ids are returned as they are. `copies` and `beside` are those of `memory.placement`. Raises as
    `fetch_model`, and for a model without a tokenizer or a chat template, of an unknown architecture, or too large for the
    device's memory.
    """
    hub_id = hub.parse(name)
    if hub_id is None or Path(name).is_dir():
        return name
    seen: set[Path] = set()

    def check(folder: Path) -> None:
        from companion.model import memory

        folders.check_chat(folder)
        print(f"{name} ({folder.name[:12]}): {memory.check_size(folder, device, dtype, copies=copies, beside=beside)}")
        seen.add(folder)

    folder = fetch_model(name, check)
    if folder not in seen:  # all of it was in the cache
        check(folder)
    return hub_id.at(folder.name)
