"""What a run notes beside its results: damaged times are only forgotten, and files that are no longer written are known."""

import json
from pathlib import Path

from companion.run import freshness


def test_times_are_read_as_far_as_they_can_be(tmp_path: Path) -> None:
    path = tmp_path / "run_times.json"
    torn = ("", '{"01_toy": 3', "[1]", "7", "null", '"x"', '{"01_toy": ' + "9" * 5000 + "}")
    for text in (*torn, '{"01_toy": "3", "02_toy": null, "03_toy": true, "08_toy": 1e999, "00_toy": -1}'):
        path.write_text(text)
        assert freshness.run_times(tmp_path) == {}
        freshness.note_time(tmp_path, "02_toy", 0.2)
        assert json.loads(path.read_text()) == {"02_toy": 1}
    path.write_text('{"01_toy": 3, "02_toy": "x"}')
    assert freshness.run_times(tmp_path) == {"01_toy": 3}


def test_what_another_notebook_writes_by_now_is_not_outdated(tmp_path: Path) -> None:
    old, new, both = (tmp_path / f"{name}.csv" for name in ("old", "new", "both"))
    for path in (old, new, both):
        path.write_text("a")
    freshness.remember(tmp_path, "02", "key", [old, both])
    assert freshness.outdated(tmp_path, "02", [new, both]) == [old]
    freshness.remember(tmp_path, "03", "key", [old])
    assert freshness.outdated(tmp_path, "02", [new, both]) == []
