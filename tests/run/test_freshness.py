"""What a run notes beside its results: a damaged manifest is made again, damaged times are only forgotten."""

import json
from pathlib import Path

import pytest
from toys import Toy

from companion.run import freshness

TIMES, MANIFEST = "results/embedded/run_times.json", "results/embedded/manifest.json"


def test_a_lost_manifest_is_made_again_and_a_whole_one_stays(toy: Toy) -> None:
    path = toy.root / MANIFEST
    whole, inode = path.read_bytes(), path.stat().st_ino
    assert toy.run().returncode == 0 and path.stat().st_ino == inode
    path.unlink()
    assert toy.run().returncode == 0 and path.read_bytes() == whole


def test_times_are_read_as_far_as_they_can_be(tmp_path: Path) -> None:
    path = tmp_path / "run_times.json"
    torn = ("", '{"01_toy": 3', "[1]", "7", "null", '"x"', '{"01_toy": ' + "9" * 5000 + "}")
    for text in (*torn, '{"01_toy": "3", "02_toy": null, "03_toy": true, "08_toy": 1e999, "00_toy": -1}'):
        path.write_text(text)
        assert freshness.run_times(tmp_path) == {}
        freshness.note_time(tmp_path, "02_toy", 5.0)
        assert json.loads(path.read_text()) == {"02_toy": 5}
    path.write_text('{"01_toy": 3, "02_toy": "x"}')
    assert freshness.run_times(tmp_path) == {"01_toy": 3}
    freshness.mend_times(tmp_path)
    assert json.loads(path.read_text()) == {"01_toy": 3}
    path.unlink()
    freshness.mend_times(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"01_toy": 3}x', '{"01_toy": [3]}'])
def test_damaged_times_are_no_times(toy: Toy, content: str) -> None:
    (toy.root / TIMES).write_text(content)
    done = toy.run("--list")
    assert (done.returncode, done.stderr, done.stdout.count(" - ")) == (0, "", 5)
