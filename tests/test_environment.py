"""What is installed, what is locked and what is asked for are the same everywhere."""

import re
import sys

import yaml

from companion.base.paths import ROOT
from companion.run import checks, freshness


def test_conda_and_pip_install_the_same() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda == ["python=3.11", "pip", {"pip": ["-r requirements.lock"]}]


def test_the_lock_holds_what_is_asked_for_and_nothing_else_names_versions() -> None:
    asked = freshness.requirement_names(ROOT / "requirements.in")
    assert set(map(checks.canonicalize_name, asked)) <= set(checks.pins())
    lines = (ROOT / "requirements.in").read_text().splitlines()
    assert not [line for line in lines if re.search(r"[=<>~]", line.split("#")[0])]


def test_the_lock_is_what_its_recipe_leaves() -> None:
    lines = checks.LOCK.read_text().splitlines()
    assert checks.locked(lines) == lines
    assert all(re.fullmatch(r"[a-z0-9._-]+==[^\s+]+( ; .+)?", line) for line in lines)


def test_what_is_installed_is_what_is_locked() -> None:
    assert sys.version_info[:2] == (3, 11)
    assert checks.disagreements(checks.pins()) == []
    assert checks.disagreements({"numpy": "0.1", "no-such": "1"})[1] == "no-such is missing, locked 1"


def test_the_citation_is_valid() -> None:
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(content)
    assert content["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2604.11663"
    assert "MIT License" in (ROOT / "LICENSE").read_text()
