"""What is installed, what is locked and what is asked for are the same everywhere."""

import re
import sys
from importlib import metadata
from itertools import product

import yaml
from packaging.markers import Marker
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from companion.base.paths import ROOT
from companion.run import checks, freshness


def pins(target: dict[str, str] | None = None) -> dict[str, str]:
    """Version by canonical package name, of the lines of the lock that hold on a machine (this one by default); one each."""
    parts = [line.partition(" ; ") for line in checks.LOCK.read_text(encoding="utf-8").splitlines()]
    hold = [pin.partition("==") for pin, _, marker in parts if not marker or Marker(marker).evaluate(target)]
    found = {canonicalize_name(name): version for name, _, version in hold}
    assert len(found) == len(hold)
    return found


def test_conda_and_pip_install_the_same() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda == ["python=3.11", "pip", {"pip": ["-r requirements.lock"]}]


def test_the_lock_holds_what_is_asked_for_and_nothing_else_names_versions() -> None:
    asked = set(map(canonicalize_name, freshness.requirement_names(ROOT / "requirements.in")))
    assert not [target for target in checks.TARGETS if not asked <= set(pins(target))]
    lines = (ROOT / "requirements.in").read_text().splitlines()
    assert not [line for line in lines if re.search(r"[=<>~]", line.split("#")[0])]


def test_the_lock_is_what_its_recipe_leaves() -> None:
    lines = checks.LOCK.read_text().splitlines()
    assert checks.locked(lines) == lines
    assert all(re.fullmatch(r"[a-z0-9._-]+==[^\s+]+( ; .+)?", line) for line in lines)


def test_what_is_installed_is_what_is_locked() -> None:
    assert "{}.{}".format(*sys.version_info) in checks.PYTHONS
    installed = {canonicalize_name(one.name): one.version.partition("+")[0] for one in metadata.distributions()}
    assert {name: installed.get(name, "missing") for name in pins()} == pins()


def test_every_supported_python_is_one_that_the_packages_admit() -> None:
    assert f'supported="{" ".join(checks.PYTHONS)}"' in (ROOT / "run_all.sh").read_text()
    asked = {name: SpecifierSet(metadata.metadata(name).get("Requires-Python", "")) for name in pins()}
    refused = [(name, python) for name, python in product(asked, checks.PYTHONS) if f"{python}.99" not in asked[name]]
    assert not refused


def test_the_citation_is_valid() -> None:
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(content)
    assert content["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2604.11663"
    assert "MIT License" in (ROOT / "LICENSE").read_text()
