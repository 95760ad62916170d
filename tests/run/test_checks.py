"""Committed results against fresh ones: the same processor must give the same numbers, another one the same verdicts."""

import json
from pathlib import Path

import pytest

from companion.run import checks, freshness


def write(folder: Path, number: float, verdict: str, processor: str = "") -> None:
    (folder / "embedded").mkdir(parents=True, exist_ok=True)
    (folder / "embedded" / "claims.csv").write_text(f"model,claim,verdict\nembedded,C1,{verdict}\n")
    (folder / "embedded" / "manifest.json").write_text(json.dumps({"processor": processor or freshness.processor()}))
    (folder / "embedded" / "02_layers.csv").write_text(f"site,te\nhead,{number}\n")


@pytest.mark.parametrize(
    ("number", "verdict", "processor", "passes"),
    [
        (1.0, "supported", "", True),
        (1.0005, "supported", "", True),
        (1.01, "supported", "", False),
        (1.01, "supported", "another", True),
        (1.01, "contradicted", "another", False),
    ],
)
def test_another_processor_may_differ_in_numbers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: float, verdict: str, processor: str, passes: bool
) -> None:
    monkeypatch.setattr(checks, "RESULTS", tmp_path / "old")
    write(tmp_path / "old", number, verdict, processor)
    write(tmp_path / "new", 1.0, "supported")
    assert checks.compare(tmp_path / "new")[1] is passes
    (tmp_path / "new" / "embedded" / "02_layers.csv").unlink()
    assert checks.compare(tmp_path / "new")[1] is (passes and bool(processor))
