"""Names of runs: a folder of their own, below the results, on every system."""

from pathlib import Path

import pytest

from companion.base import paths
from companion.base.errors import InputError


def test_slugs_that_leave_their_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for slug in ("", ".", "..", ".hidden", "a/b", "a b", "a\n", "ä", "../x", "x" * 101):
        with pytest.raises(InputError, match="cannot name a run"):
            paths.results_dir(slug)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "r")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "f")
    assert paths.results_dir("a-b_c.1").is_dir()
    assert paths.figures_dir("a-b_c.1") == tmp_path / "f" / "a-b_c.1"
