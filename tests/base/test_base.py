"""Chat templates, devices, files and the names of runs."""

from datetime import datetime
from pathlib import Path

import models
import numpy as np
import pandas as pd
import pytest
import torch

from companion.base import chat, device, files, paths
from companion.base.device import free_memory
from companion.base.display import NotDefined
from companion.base.errors import InputError

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


def system(place: Path, monkeypatch: pytest.MonkeyPatch, own: str, groups: dict[str, tuple[str, int, int]]) -> int:
    """Free memory on a machine with 100 GB of it and these control groups: limit, GB used, GB of them files."""
    (place / "meminfo").write_text(f"MemTotal: {128 * GB // 1024} kB\nMemAvailable: {100 * GB // 1024} kB\n")
    (place / "own").write_text(own)
    for folder, (limit, used, cached) in groups.items():
        names = device.VERSIONS[folder.startswith("memory")][1:]
        texts = (f"{limit}\n", f"{used * GB}\n", f"anon 1\n{names[2]} {cached * GB}\n")
        (place / "groups" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in zip((*names[:2], "memory.stat"), texts, strict=True):
            (place / "groups" / folder / name).write_text(text)
    for name, file in (("MEMINFO", "meminfo"), ("OWN_GROUPS", "own"), ("GROUPS", "groups")):
        monkeypatch.setattr(device, name, place / file)
    return round(free_memory(torch.device("cpu")) / GB)


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
    assert system(tmp_path, monkeypatch, own, groups) == free


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
        assert files.write_table(missing, path) is missing
        assert not list(tmp_path.iterdir())
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


def test_a_missing_result_names_its_notebook() -> None:
    with pytest.raises(
        InputError, match=r"results/m/02_no\.csv is not there; notebook 02 .*--only 02 --force with .* made 'm'"
    ):
        files.read_table(paths.RESULTS / "m" / "02_no.csv", COLUMNS)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_torn_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    files.write_json({"a": 1}, path) if suffix == "json" else files.write_table(table(), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=rf"t\.{suffix}"):
        files.read_json(path) if suffix == "json" else files.read_table(path, COLUMNS)


@both
def test_a_missing_column_and_a_wrong_kind_are_named(tmp_path: Path, suffix: str) -> None:
    path, words = files.write_table(table(), tmp_path / f"t.{suffix}"), table().assign(layer=["a", "b"])
    with pytest.raises(InputError, match="no column 'topic'"):
        files.read_table(path, {"topic": "str"})
    wrong = [("te", "int"), ("site", "float")] + [("layer", "bool"), ("te", "str")] * (suffix == "parquet")
    for column, kind in wrong:
        with pytest.raises(InputError, match=f"column '{column}'"):
            files.read_table(path, {column: kind})
    with pytest.raises(InputError, match="column 'layer' should hold whole numbers"):
        files.read_table(files.write_table(words, path), COLUMNS)


# ---- paths ----


def test_slugs_that_leave_their_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for slug in ("", ".", "..", ".hidden", "a/b", "a b", "a\n", "ä", "../x", "x" * 101):
        with pytest.raises(InputError, match="cannot name a run"):
            paths.results_dir(slug)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "r")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "f")
    assert paths.results_dir("a-b_c.1").is_dir()
    assert paths.figures_dir("a-b_c.1") == tmp_path / "f" / "a-b_c.1"
