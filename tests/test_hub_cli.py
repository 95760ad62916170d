"""The command line with a model of the hub, offline, in real processes: from the cache it runs, else one clear line."""

import json
from pathlib import Path

import pytest
from hub_cache import chat_folder, put
from test_cli import pair, prompt_set
from toys import Toy

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
PAIRS = [pair(n, f"w5 w{20 + n}", control=f"w4 w{20 + n}") for n in range(12)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub")
    source = chat_folder(place / "source")
    put(place / "cache", source, [path.name for path in source.iterdir()], COMMIT)
    return place / "cache"


def test_a_cached_model_runs_offline_and_its_commit_is_kept(toy: Toy, tmp_path: Path, cache: Path) -> None:
    prompts = prompt_set(tmp_path / "set", PAIRS, outcome='{"comply": [" w11"], "refuse": [" w12"]}')
    flags = ("--model", "org/tiny", "--prompts", str(prompts), "--only", "01")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    first = toy.run(*flags, **offline)
    assert first.returncode == 0, first.stderr
    assert "org/tiny (89abcdef0123): 0.00 billion parameters" in first.stdout
    assert "12 of 12 pairs usable" in first.stdout
    manifest = json.loads((toy.root / "results" / "org--tiny-set" / "manifest.json").read_text())
    assert (manifest["model"]["name"], manifest["model"]["revision"]) == ("org/tiny", COMMIT)
    book = (toy.root / "results" / "org--tiny-set" / "notebooks" / "01_toy.ipynb").read_text()
    assert f"org/tiny@{COMMIT}" in book and str(cache) not in book
    assert toy.run("--list", *flags, **offline).stdout.count("fresh") == 1


def test_what_cannot_be_had_is_one_line(toy_done: Toy, tmp_path: Path, cache: Path) -> None:
    before = toy_done.contents()
    away = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    cases = {
        ("--model", "org/tiny"): "HF_HUB_OFFLINE forbids downloads, and it is not in the cache",
        ("--list", "--model", "org/tiny"): "is not in the hub's cache yet",
        ("--model", "org/tiny@../x"): "names no revision behind its @",
        ("--prompts", "xstest,nosuch"): "public sets, each once, joined by commas; known are jailbreakbench",
        ("--judge", "nowhere"): "no model 'nowhere': give a folder",
        ("--judge", "org/tiny"): "HF_HUB_OFFLINE forbids downloads",
        ("--wrappers", "nowhere"): "expected a file of JSON lines",
    }
    for flags, message in cases.items():
        done = toy_done.run(*flags, **away)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    assert toy_done.contents() == before


def test_a_cached_judge_is_checked_before_anything_runs(toy_done: Toy, cache: Path) -> None:
    before = toy_done.contents()
    done = toy_done.run("--judge", "org/tiny", "--only", "01", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(cache))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--judge: org/tiny: in its tokenizer Yes and No do not begin with known tokens" in done.stderr
    assert toy_done.contents() == before


def test_a_public_set_offline_is_one_line(toy_done: Toy, tmp_path: Path) -> None:
    variables = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = toy_done.run("--prompts", "maliciousinstruct", **variables)
    assert done.returncode == 2 and "none of these sets could be loaded" in done.stderr
    assert "left out: maliciousinstruct" in done.stdout and "the hub cannot be reached" in done.stdout
