"""Models by hub id: names, the cache, every refusal of the hub, and weights that are only fetched for a usable model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import httpx2
import huggingface_hub
import pytest
import torch
import transformers as hf
from huggingface_hub import errors
from models import edit_json, tokens
from toys import REPO, chat_folder, put, serve

from companion.base import folders, hub
from companion.base.errors import InputError
from companion.base.hub import HubId
from companion.base.paths import check_slug
from companion.model import memory
from companion.model.load import WEIGHTS, load, prepare_model
from companion.run import freshness

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PINNED = f"{REPO}@{COMMIT}"
Refuse = Callable[..., None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return chat_folder(tmp_path / "source")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def served(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub has the tiny model; the list of files that are fetched from it."""
    return serve(monkeypatch, source, cache, COMMIT)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Lets the hub answer the first question that is asked of it, or only that for files, with an error."""
    questions = {"listing": (huggingface_hub.HfApi, "model_info"), "files": (huggingface_hub, "snapshot_download")}
    return lambda error, at="listing": monkeypatch.setattr(*questions[at], mock.Mock(side_effect=error))


def is_weight(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def test_hub_ids_and_their_revisions(monkeypatch: pytest.MonkeyPatch) -> None:
    no_ids = "window-0", "embedded", "/a/b", "../a/b", "a/b/c", "a/..", "./a/b", "a/.b", "a/b--c", "-a/b", "a/b c"
    assert not any(map(hub.parse, no_ids))
    assert hub.parse("meta-llama/Llama-3.1-8B-Instruct") == HubId("meta-llama/Llama-3.1-8B-Instruct", "main")
    assert hub.parse("org/m@refs/pr/1") == HubId("org/m", "refs/pr/1")
    assert hub.parse(PINNED).is_pinned and not hub.parse("org/m@0123").is_pinned
    for revision in ("", "../x", "a//b", "a/../b", "/x", "a b"):
        with pytest.raises(InputError, match="names no revision behind its @"):
            hub.parse(f"org/m@{revision}")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", "~nobody-of-this-name/cache")
    assert hub.cache() == Path("~nobody-of-this-name/cache/hub"), "no traceback"
    names = ["a/m", "b/m", "a/m@refs/pr/1", f"a/m@{COMMIT}", "a.b/c_d.e@v1.0", "/x/../y/m"]
    slugs = {check_slug(hub.slug(name)) for name in names}
    assert len(slugs) == len(names), "a folder of its own for each"
    assert {(Path("results") / slug).resolve().parent for slug in slugs} == {Path("results").resolve()}


def test_a_model_is_downloaded_checked_and_loaded(own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = hf.AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32)
    for name in ("original/consolidated.safetensors", "consolidated.safetensors", "modeling_x.py", "old.bin"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text("not ours")
    fetched = serve(monkeypatch, own, cache, COMMIT)
    model = load(REPO)
    weights = [name for name in fetched if is_weight(name)]
    assert len(weights) > 1 and weights == fetched[-len(weights) :]
    assert not [name for name in fetched if "consolidated" in name or name.endswith((".py", ".bin"))]
    torch.testing.assert_close(model.model(tokens()).logits, plain(tokens()).logits)


def test_a_cached_commit_needs_no_network(source: Path, cache: Path, refuse: Refuse) -> None:
    put(cache, source, [path.name for path in source.iterdir()], COMMIT)
    refuse(AssertionError("the hub was asked"))
    assert load(PINNED).n_layers == 4
    assert folders.model_folder(REPO) == cache / "models--org--tiny" / "snapshots" / COMMIT
    assert (hub.pinned(REPO), hub.pinned("window-0")) == (PINNED, "window-0")


@pytest.mark.parametrize("error", [errors.OfflineModeIsEnabled("off"), ConnectionError("down"), TimeoutError("slow")])
def test_without_a_network_the_cached_copy_serves(source: Path, cache: Path, refuse: Refuse, error: Exception) -> None:
    refuse(error)
    names = [path.name for path in source.iterdir()]
    with pytest.raises(InputError, match=r"and it is not in the cache .*HF_HOME"):
        load(REPO)
    put(cache, source, [name for name in names if "00002" not in name], COMMIT)
    with pytest.raises(InputError, match="only a part of it is in the cache"):
        load(REPO)
    with pytest.raises(InputError, match=r"not in the hub's cache yet: \./run_all\.sh --model org/tiny"):
        folders.model_folder(REPO)
    put(cache, source, names, COMMIT)
    assert load(REPO).n_layers == 4
    for name in hub.TOKENIZER:
        (cache / "models--org--tiny" / "snapshots" / COMMIT / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="only a part of it is in the cache"):
        load(PINNED)


@pytest.mark.parametrize("revision", ["", "@v1.0", "@refs/pr/1"])
def test_what_was_downloaded_by_branch_is_there_without_a_network(source, cache, monkeypatch, refuse, revision):
    name = REPO + revision
    for commit in (COMMIT, COMMIT[::-1]):
        serve(monkeypatch, source, cache, commit)
        assert prepare_model(name, "cpu", "float32") == f"{REPO}@{commit}"
        refuse(errors.OfflineModeIsEnabled("off"))
        assert hub.pinned(name) == f"{REPO}@{commit}" == prepare_model(name, "cpu", "float32")
    assert hub.ref(hub.parse(name)).read_text() == commit, "as the hub's library reads it, without a line's end"
    serve(monkeypatch, source, cache, "f" * 40)
    plain, down = huggingface_hub.snapshot_download, mock.Mock(side_effect=ConnectionError("down"))
    cut = lambda repo, **given: (down if given["allow_patterns"] == WEIGHTS else plain)(repo, **given)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cut)
    with pytest.raises(InputError, match="only a part of it is in the cache"):
        prepare_model(name, "cpu", "float32")
    assert hub.pinned(name) == f"{REPO}@{commit}"


def answer(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    response = httpx2.Response(401, request=httpx2.Request("GET", "https://hub.invalid"))
    return kind("long story\nof many lines", response=response)


def late() -> Exception:
    error = errors.LocalEntryNotFoundError("nothing in the cache")
    error.__cause__ = answer(errors.GatedRepoError)
    return error


REFUSALS = {
    "gated": (lambda: answer(errors.GatedRepoError), "is gated: accept its terms at huggingface.co/org/tiny .*HF_TOKEN"),
    "gated, seen late": (late, "is gated"),
    "no such id": (lambda: answer(errors.RepositoryNotFoundError), "no model 'org/tiny': there is no folder of that name"),
    "no such revision": (lambda: answer(errors.RevisionNotFoundError), "no revision 'main': see its branches"),
    "broken server": (lambda: answer(errors.HfHubHTTPError), "the hub did not give org/tiny: long story; try again"),
    "offline": (lambda: errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE forbids downloads.*unset HF_HUB_OFFLINE"),
    "no network": (lambda: errors.HTTPError("no route"), r"cannot be reached \(no route\)"),
    "nothing cached": (lambda: errors.LocalEntryNotFoundError("none"), r"cannot be reached \(none\)"),
    "network lost": (lambda: RuntimeError("Data processing error: x\nand more"), "org/tiny broke off: .*: x; run the same"),
    "file cut off": (lambda: OSError("Consistency check failed: 7 bytes"), "org/tiny broke off: Consistency check failed"),
    "disk": (lambda: OSError(30, "read-only"), "could not be written to .*read-only; HF_HOME names another"),
}  # fmt: skip


@pytest.mark.parametrize("at", ["listing", "files"])
@pytest.mark.parametrize("case", REFUSALS)
def test_every_refusal_is_one_sentence(served: list[str], refuse: Refuse, case: str, at: str) -> None:
    """Some models are listed for everyone and refuse their files; a transfer breaks off, and a disk is full, only there."""
    make, message = REFUSALS[case]
    refuse(make(), at)
    if at == "files":  # which are asked for by the commit that the listing named
        message = message.replace("no revision 'main'", f"no revision '{COMMIT}'")
    with pytest.raises(InputError, match=message) as caught:
        load(REPO)
    assert "\n" not in str(caught.value)


def spoil(folder: Path, **changes: object) -> None:
    edit_json(folder / "config.json", **changes)


def pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.rename(folder / "pytorch_model.bin")


UNUSABLE = {
    "no index": (lambda f: (f / hub.INDEX).unlink(), "has no file model.safetensors, where its weights should be"),
    "a shard of the index": (lambda f: next(f.glob("*-00002-*")).unlink(), r"has no file model-00002-of-\d+.safetensors"),
    "pickled": (pickle, r"org/tiny: its weights are pickled \(pytorch_model.bin\)"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json, so it is no model"),
    "not causal": (lambda f: spoil(f, architectures=["BertModel"]), "not a causal language model"),
    "unknown": (lambda f: spoil(f, model_type="unheard_of"), "^org/tiny could not be loaded: .*its architecture known"),
    "other parts": (lambda f: spoil(f, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]), "unknown arch.*: GPTNeoX"),
    "own code": (lambda f: spoil(f, model_type="unheard_of", auto_map={"A": "m.M"}), "type --trust-remote-code"),
    "quantized": (lambda f: spoil(f, quantization_config={"bits": 4}), "holds quantized weights"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
    "too large": (lambda f: spoil(f, intermediate_size=2**30, num_hidden_layers=400), "^org/tiny is too large for cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_no_weights_of_an_unusable_model_are_fetched(own, cache, monkeypatch, case):
    damage, message = UNUSABLE[case]
    damage(own)
    fetched = serve(monkeypatch, own, cache, COMMIT)
    with pytest.raises(InputError, match=message):
        prepare_model(REPO, "cpu", "float32")
    assert not [name for name in fetched if is_weight(name) or name.endswith(".py")]


def test_no_room_on_the_disk(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"needs 0\.\d GB below .*set HF_HOME to a folder on a larger disk"):
        prepare_model(REPO, "cpu", "float32")
    assert not any(map(is_weight, served))


def test_a_judge_needs_no_copy(source: Path, served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.run_memory(memory.on_meta(source, torch.bfloat16), copies=1).total
    monkeypatch.setattr(memory, "free_memory", lambda device: free / memory.USABLE + 1)
    with pytest.raises(InputError, match=r"too large for cpu: .*with the copy that it"):
        prepare_model(REPO, "cpu", "bfloat16")
    assert not any(map(is_weight, served))
    assert prepare_model(REPO, "cpu", "bfloat16", copies=1) == PINNED


def test_the_manifest_names_commit_and_file_hashes(source, cache, served, monkeypatch, capsys):
    for name, refs in ((PINNED, []), (REPO, ["main"]), (PINNED, ["main"])):  # a commit moves no branch
        assert prepare_model(name, "cpu", "float32") == hub.pinned(name) == PINNED
        assert [path.name for path in cache.rglob("refs/*")] == refs
    assert capsys.readouterr().out.count("billion parameters; memory needed at most") == 3, "once a call"
    given = {"MODEL": PINNED, "PROMPTS": "embedded", "DEVICE": "cpu", "DTYPE": "float32", "PROFILE": "full", "PAIRS": 0}
    freshness.write_manifest(cache, given, {})
    model = json.loads((cache / "manifest.json").read_text())["model"]
    assert (model["name"], model["revision"]) == (REPO, COMMIT) and "remote_code" not in model
    assert {path.name for path in source.iterdir()} == set(model["sha256"])
    monkeypatch.setenv(hub.TRUST, "1")  # remote code is only trusted where that was typed
    for typed in (False, True, False):
        hub.set_variable(hub.TRUST, "1" if typed else None)
        assert hub.trusts_code() is typed
