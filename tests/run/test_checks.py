"""Committed results against fresh ones: the same processor must give the same numbers, another one the same verdicts.

And a lock that cannot be installed everywhere is not written.
"""

import json
from pathlib import Path

import pytest

from companion.run import checks, freshness


def write(folder: Path, number: float, verdict: str, processor: str = "") -> None:
    (folder / "embedded").mkdir(parents=True, exist_ok=True)
    (folder / "embedded" / "claims.csv").write_text(f"model,claim,rule,answer\nembedded,C1,corrected,{verdict}\n")
    (folder / "embedded" / "manifest.json").write_text(json.dumps({"processor": processor or freshness.processor()}))
    (folder / "embedded" / "02_layers.csv").write_text(f"site,te\nhead,{number}\n")


@pytest.mark.parametrize(
    ("number", "verdict", "processor", "passes"),
    [
        (1.0, "supported", "", True), (1.0005, "supported", "", True), (1.01, "supported", "", False),
        (1.01, "supported", "another", True), (1.01, "contradicted", "another", False),
    ],
)  # fmt: skip
def test_another_processor_may_differ_in_numbers_only(tmp_path, monkeypatch, number, verdict, processor, passes):
    monkeypatch.setattr(checks, "RESULTS", tmp_path / "old")
    write(tmp_path / "old", number, verdict, processor)
    write(tmp_path / "new", 1.0, "supported")
    assert checks.compare(tmp_path / "new", "embedded")[1] is passes
    (tmp_path / "new" / "embedded" / "02_layers.csv").unlink()
    assert checks.compare(tmp_path / "new", "embedded")[1] is (passes and bool(processor))


def test_a_lock_without_wheels_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, uv = tmp_path / "requirements.lock", tmp_path / "uv"
    lock.write_text("numpy==2 ; python_version > '3'\n")
    uv.write_text('#!/bin/sh\ncase "$*" in *3.13*) exit 1 ;; esac\n')
    uv.chmod(0o755)
    monkeypatch.setattr(checks, "LOCK", lock)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"wheel for Python 3\.13 on linux"):
        checks.make_lock([])
    assert lock.read_text() == "numpy==2 ; python_version > '3'\n"
    uv.write_text("#!/bin/sh\n")
    assert checks.make_lock([]) == 0 and lock.read_text() == "numpy==2\n"
