"""Names of models on the Hugging Face hub, where the hub's own cache keeps them, and what its errors mean.

A name is `ORG/MODEL` or `ORG/MODEL@REVISION`. The hub's library is imported only where one of its errors is read.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from companion.base.errors import InputError, first_line
from companion.base.files import read_json
from companion.base.paths import ROOT, at_home

TRUST = "COMPANION_TRUST_REMOTE_CODE"
OWN = "COMPANION_CACHE"
JUDGE = "COMPANION_JUDGE"  # the model that labels answers, if one was chosen
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[A-Za-z0-9][\w-]*(?:[./][A-Za-z0-9][\w-]*)*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
INDEX = "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")  # one of them at least
TOKEN_HELP = "make a token at huggingface.co/settings/tokens and put it into the variable HF_TOKEN"
AGAIN = "run the same command again, it goes on from there"


@dataclass(frozen=True)
class HubId:
    """A model of the hub; `revision` is a branch, a tag or a commit, "main" where none was given."""

    repo: str
    revision: str = "main"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a full commit hash, which never changes its meaning."""
        return bool(_COMMIT.fullmatch(self.revision))

    def at(self, commit: str) -> str:
        """The name with this commit."""
        return f"{self.repo}@{commit}"


def parse(name: str | Path) -> HubId | None:
    """The hub id that a name is, or None for anything else (a shipped name, a path).

    >>> parse("org/model@v1.0"), parse("window-1"), parse("../org/model")
    (HubId(repo='org/model', revision='v1.0'), None, None)
    """
    repo, at, revision = str(name).partition("@")
    is_file = repo.lower().endswith(".gguf")
    if is_file or not _ID.fullmatch(repo) or ".." in repo or "--" in repo:  # what the hub itself refuses in a name
        return None
    if not at:
        return HubId(repo)
    if not _REVISION.fullmatch(revision):
        raise InputError(f"{name!r} names no revision behind its @: expected a branch, a tag or a commit")
    return HubId(repo, revision)


def slug(name: str) -> str:
    """The part of a run's name that stands for a model: a folder's or a file's own name, or both parts of a hub id.

    >>> slug("org/model@v1.0"), slug("/data/my-model")
    ('org--model-v1.0', 'my-model')
    """
    hub_id = parse(name)
    if hub_id is None:
        return Path(name).name.removesuffix(".gguf")
    revision = "" if hub_id.revision == "main" else f"-{hub_id.revision[:12] if hub_id.is_pinned else hub_id.revision}"
    return hub_id.repo.replace("/", "--") + revision.replace("/", "-")


def cache() -> Path:
    """The hub's cache, by the variables that its own library reads."""
    place = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return expand_variables(place) if place else home() / "hub"


def home() -> Path:
    """The folder of everything that the hub's libraries keep."""
    if place := os.environ.get("HF_HOME"):
        return expand_variables(place)
    return expand_variables(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"


def own_cache() -> Path:
    """The user's folder for what this project keeps outside of the repository; `InputError` if it lies inside."""
    named = os.environ.get(OWN)
    place = expand_variables(named) if named else home() / "companion"
    if place.resolve().is_relative_to(ROOT):
        raise InputError(f"{OWN}={place} lies inside the repository, where public prompts must not be: name another")
    return place.resolve()


def expand_variables(place: str) -> Path:
    """A path with variables and `~` replaced where they are known, as the hub's library does it."""
    return at_home(os.path.expandvars(place))


def ref(hub_id: HubId) -> Path:
    """The file of the cache that holds the commit which a branch or tag was when it was last downloaded."""
    return cache() / f"models--{hub_id.repo.replace('/', '--')}" / "refs" / hub_id.revision


def snapshot(hub_id: HubId) -> Path | None:
    """The folder of a revision in the cache, if one is there; it may be incomplete (see `is_complete`)."""
    file = ref(hub_id)
    commit = hub_id.revision if hub_id.is_pinned else file.read_text().strip() if file.is_file() else ""
    folder = cache() / f"models--{hub_id.repo.replace('/', '--')}" / "snapshots" / commit
    return folder if _COMMIT.fullmatch(commit) and folder.is_dir() else None


def name_of(folder: Path) -> str:
    """What a user calls the model in a folder: its id if that is one of the cache, which is named by its commit."""
    if not folder.is_relative_to(cache()):
        return folder.name
    return folder.relative_to(cache()).parts[0].removeprefix("models--").replace("--", "/")


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that a model's folder must have, by its index; one file where it has no index."""
    if not (folder / INDEX).is_file():
        return ["model.safetensors"]
    content = read_json(folder / INDEX)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    shards = list(shards.values()) if isinstance(shards, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in shards):
        raise InputError(f"{folder / INDEX} names no weight files of this folder: download the model again")
    return sorted(set(shards))


def is_complete(folder: Path) -> bool:
    """Whether config, tokenizer and all weights of a cached model are there."""
    needed = [folder / name for name in ("config.json", *weight_files(folder))]
    return any((folder / name).is_file() for name in TOKENIZER) and all(path.is_file() for path in needed)


def folder_of(name: str) -> Path:
    """The cached folder of a hub id, downloading nothing; `InputError` where it is not (wholly) in the cache."""
    hub_id = parse(name)
    assert hub_id is not None, "callers ask only about names of the hub"
    folder = snapshot(hub_id)
    if folder is None or not is_complete(folder):
        raise InputError(f"{name} is not in the hub's cache yet: ./run_all.sh --model {name} downloads it")
    return folder


def pinned(name: str) -> str:
    """A hub id with the commit that the cache has for it; other names as they are. Raises as `folder_of` does."""
    hub_id = parse(name)
    return name if hub_id is None else hub_id.at(folder_of(name).name)


def trusts_code() -> bool:
    """Whether `--trust-remote-code` was typed."""
    return os.environ.get(TRUST) == "1"


def set_variable(name: str, value: str | None) -> None:
    """Set a variable of this process and of what it starts; None (or "") takes it away."""
    os.environ.pop(name, None)
    if value:
        os.environ[name] = value


def is_network(error: BaseException) -> bool:
    """Whether the hub could not be reached at all, and did not merely refuse."""
    from huggingface_hub import errors as hub_errors

    unreached = (hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    return isinstance(error, (*unreached, hub_errors.HTTPError)) and not isinstance(error, hub_errors.HfHubHTTPError)


def explain(hub_id: HubId, error: Exception, kind: str = "model") -> InputError:
    """One sentence for an error of the hub: what was wrong, and what to do."""
    from huggingface_hub import errors as hub_errors

    if isinstance(error, hub_errors.LocalEntryNotFoundError) and isinstance(error.__cause__, hub_errors.HfHubHTTPError):
        error = error.__cause__  # the library looked into the cache because the hub refused, and that is the reason
    if is_network(error):
        return _no_network(hub_id, error)
    repo, said = hub_id.repo, first_line(error)
    page = f"huggingface.co/{'datasets/' if kind == 'data set' else ''}{repo}"
    if isinstance(error, hub_errors.GatedRepoError):  # it is also a RepositoryNotFoundError, so it comes first
        what = f"{repo} is gated: accept its terms at {page} with your account, then {TOKEN_HELP}"
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        what = f"{repo} has no revision {hub_id.revision!r}: see its branches and commits at {page}/commits"
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        what = f"no {kind} {repo!r}: there is no folder of that name here and the hub has none that you may see; "
        what += f"check the spelling at {page}, or if it is private, {TOKEN_HELP}"
    elif isinstance(error, hub_errors.HfHubHTTPError | hub_errors.HFValidationError | hub_errors.HTTPError):
        what = f"the hub did not give {repo}: {said}; try again later, or use a folder"
    elif isinstance(error, OSError) and error.errno is not None:  # without a number it is the hub library's own
        what = f"{repo} could not be written to {cache()}: {said}; HF_HOME names another place for it"
    else:
        what = f"the transfer of {repo} broke off: {said}; {AGAIN}"
    return InputError(what)


def _no_network(hub_id: HubId, error: Exception) -> InputError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    why, mend = f"the hub cannot be reached ({first_line(error)})", "connect"
    if isinstance(error, OfflineModeIsEnabled):
        why, mend = "HF_HUB_OFFLINE forbids downloads", "unset HF_HUB_OFFLINE"
    have = "only a part of it is" if snapshot(hub_id) is not None else "it is not"
    return InputError(
        f"{hub_id.repo} at {hub_id.revision!r}: {why}, and {have} in the cache {cache()}; {mend}, or copy the cache of a "
        "machine that has the model and name it in HF_HOME"
    )
