"""A sweep measured in shards is the sweep measured in one go; a part is trusted only if it is whole and its own."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from neuron_tools import tiny_study

from companion.base import paths
from companion.mediation import study, sweeps
from companion.mediation.study import Study
from companion.model import activations


@pytest.fixture(scope="module")
def small() -> Study:
    """Twelve pairs of each of three treatments."""
    whole = study.begin("embedded", "embedded", "sharded", profile="smoke")
    chosen = [pair for name in ("T1", "T2", "T2b") for pair in whole.of(name)[:12]]
    return replace(whole, pairs=tuple(chosen))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return tmp_path


def same(one: sweeps.Tables, other: sweeps.Tables) -> bool:
    return set(one) == set(other) and all(one[name].equals(other[name]) for name in one)


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_shards_join_to_the_same_bits(small: Study, results: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = sweeps.run_sweep(small, name)
    assert not list(results.rglob("*.zip"))  # a run without shards keeps no parts
    n = len(sweeps.sweep_batches(small, name))
    assert [sweeps.run_shard(small, name, shard, 2)[0] for shard in (1, 0)] == [n // 2, n - n // 2]
    next(results.rglob("*.zip")).unlink()  # what a shard did not finish is measured when joined, and kept
    assert same(sweeps.run_sweep(small, name), alone) and len(list(results.rglob("*.zip"))) == n
    monkeypatch.setattr(activations, "clean_run", None)  # nothing is measured again
    assert same(sweeps.run_sweep(small, name), alone)
    assert sweeps.run_shard(small, name, 0, 1) == (0, n)  # another number of shards finds the same parts


def test_a_part_is_made_again_unless_it_is_whole_and_its_own(small: Study, results: Path) -> None:
    sweeps.run_shard(small, "layers", 0, 1)
    place, n = sweeps.part_folder(small, "layers"), len(sweeps.sweep_batches(small, "layers"))
    part, other = (place / f"{i:05d}.zip" for i in (1, 0))
    good, foreign = part.read_bytes(), sweeps.write_part(sweeps.read_part(place, 1), results, 1).read_bytes()
    at = len(good) // 2
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    for damage in (good[:100], b"", b"no part", other.read_bytes(), foreign, flipped):
        part.write_bytes(damage)
        assert sweeps.read_part(place, 1) is None and sweeps.run_shard(small, "layers", 0, 1) == (1, n - 1)
        assert part.read_bytes() == good
    part.unlink()
    assert sweeps.read_part(place, 1) is None
    sweeps.write_part({"effects": pd.DataFrame({"a": [1]})}, results, 0, ["out of memory once"])
    assert sweeps.read_part(results, 0) is not None  # halved chunks are known to the run that joins
    assert sweeps.memory_plan(small)["events"][-1:] == ["out of memory once"]


def test_the_key_changes_with_all_that_numbers_rest_on(small: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = replace(small.pairs[0], control=small.pairs[0].control[::-1])
    others = [
        small,
        replace(small, pairs=small.pairs[1:]),
        replace(small, pairs=(moved, *small.pairs[1:])),
        replace(small, subject=replace(small.subject, sha256="0" * 64)),
        replace(small, openers={name: replace(one, comply=(1,)) for name, one in small.openers.items()}),
    ]
    keys = [sweeps.part_folder(one, "layers") for one in others] + [sweeps.part_folder(small, "modules")]
    monkeypatch.setattr(sweeps.files, "hash_folder", lambda *_: "another version")
    keys.append(sweeps.part_folder(small, "layers"))
    assert len(set(keys)) == len(keys)
    assert sweeps.part_folder(replace(small, slug="elsewhere"), "layers").name == keys[-1].name


def test_modules_are_measured_where_the_contrast_needs_them_and_everywhere_without_it() -> None:
    this = tiny_study(treatments=("T1", "T2", "T2b"))
    only = replace(this, pairs=tuple(this.of("T1")))
    for one, wanted in ((this, {"T2", "T2b"}), (only, {"T1"})):
        assert {p.pair.treatment for group in sweeps.sweep_batches(one, "modules") for p in group} == wanted
