"""Models of the Hugging Face hub: downloaded once into the hub's own cache, safetensors only, checked before the weights.

Files come in two steps: config and tokenizer first, so that a model which cannot be used is refused before gigabytes
are fetched; then the weights. Without a network, what is in the cache is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HTTPError

from companion.base import folders, hub
from companion.base.errors import InputError
from companion.base.files import write_text
from companion.base.hub import HubId, explain, is_network
from companion.model import memory

SMALL = ["*.json", "*.jinja", "*.model", "*.txt"]
WEIGHTS = ["*.safetensors"]
# Subfolders hold other formats, and some repositories a second copy of the weights under this name.
IGNORED = ["*/*", "consolidated*"]
FAILURES = (OSError, ValueError, RuntimeError, HTTPError)  # hf_xet raises RuntimeError if the network goes


def fetch_model(name: str, before_weights: Callable[[Path], object] = lambda folder: None) -> Path:
    """The cached folder of `ORG/MODEL[@REVISION]`, named by its commit; what is missing is downloaded.

    The hub is asked what a branch is now; without a network the cached copy serves, if it is complete. `before_weights` is
    called with the folder when all but the weights is there, and may refuse it. Raises InputError with one sentence for
    everything that can go wrong: no access, no network, no such model, no safetensors, no room.
    """
    hub_id = hub.parse(name)
    assert hub_id is not None, "the caller has parsed it"
    cached, info = hub.snapshot(hub_id), None
    if cached is not None and not hub.is_complete(cached):
        cached = None
    if cached is None or not hub_id.is_pinned:
        try:
            info = huggingface_hub.HfApi().model_info(
                hub_id.repo, revision=hub_id.revision, files_metadata=True, timeout=20
            )
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
        pickled = next((path.name for path in top if any(map(path.match, folders.PICKLED))), None)
        raise folders.no_weights(hub_id.repo, pickled)
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
        place = huggingface_hub.snapshot_download(
            hub_id.repo, revision=hub_id.revision, cache_dir=hub.cache(),
            allow_patterns=patterns, ignore_patterns=IGNORED,
        )  # fmt: skip
    except FAILURES as error:
        raise explain(hub_id, error) from error
    return Path(place)


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
