"""Committed results against fresh ones: the same processor must give the same numbers, another one the same verdicts."""

from pathlib import Path

import pytest

from companion.base import files
from companion.run import checks, freshness


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("old", "new"):
        write(tmp_path / name, 1.0, "supported")
    monkeypatch.setattr(checks, "RESULTS", tmp_path / "old")
    return tmp_path


def write(folder: Path, number: float, verdict: str, processor: str = "") -> None:
    files.write_json([{"model": "embedded", "claim": "C1", "verdict": verdict}], folder / "claims.json")
    files.write_json({"processor": processor or freshness.processor()}, folder / "embedded" / "manifest.json")
    files.write_json({"estimate": number}, folder / "embedded" / "02_layers.json")


@pytest.mark.parametrize(
    ("number", "verdict", "processor", "passes"),
    [
        (1.0, "supported", "", True),
        (1.01, "supported", "", False),
        (1.01, "supported", "another", True),
        (1.01, "contradicted", "another", False),
    ],
)
def test_another_processor_may_differ_in_numbers_only(
    results: Path, number: float, verdict: str, processor: str, passes: bool
) -> None:
    write(results / "old", number, verdict, processor)
    assert checks.compare(results / "new")[1] is passes


def test_the_processor_is_named_by_what_rounds(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(
        "processor\t: 0\nmodel name\t: X\nmodel\t: 7\nflags\t: sse avx2 avx512f\n\nprocessor\t: 1\n", encoding="utf-8"
    )
    assert freshness.processor(path) == "X, 7, avx2, avx512f"
    assert freshness.processor()
