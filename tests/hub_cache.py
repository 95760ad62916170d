"""A stand-in for the hub: a folder of files that is "downloaded" into a cache laid out as the real one."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from families import tiny_model, tiny_tokenizer
from huggingface_hub.utils import filter_repo_objects

REPO = "org/tiny"
TEMPLATE = "{% for m in messages %}<s> {{ m.content }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"


def chat_folder(place: Path, family: str = "llama") -> Path:
    """A tiny chat model in bfloat16, as `save_pretrained` writes it, in several shards."""
    tokenizer = tiny_tokenizer(place)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    tiny_model(family).bfloat16().save_pretrained(place, max_shard_size="30KB")
    return place


def put(cache: Path, source: Path, names: list[str], commit: str, ref: str | None = "main") -> Path:
    """Store files the way the hub's library does: blobs by hash, a snapshot of links, a ref for the branch."""
    place = cache / "models--org--tiny"
    snapshot = place / "snapshots" / commit
    for name in names:
        blob = place / "blobs" / hashlib.sha256((source / name).read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes((source / name).read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(blob)
    if ref:
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / ref).write_text(commit)
    return snapshot


def serve(monkeypatch: pytest.MonkeyPatch, source: Path, cache: Path, commit: str) -> list[str]:
    """Answer the two questions that are asked of the hub from a folder; returns the list of what gets downloaded."""
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    fetched: list[str] = []

    def model_info(self: object, repo: str, *, revision: str, **_: object) -> SimpleNamespace:
        assert repo == REPO
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        listed = [SimpleNamespace(rfilename=p.relative_to(source).as_posix(), size=p.stat().st_size) for p in files]
        return SimpleNamespace(sha=commit, siblings=listed)

    def download(repo: str, *, revision: str, cache_dir: Path, allow_patterns: list, ignore_patterns: list) -> str:
        assert (repo, revision, Path(cache_dir)) == (REPO, commit, cache)
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
        chosen = list(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        fetched.extend(chosen)
        return str(put(cache, source, chosen, commit, ref=revision if revision != commit else None))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fetched
