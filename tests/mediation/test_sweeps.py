"""A sweep measured in shards is the sweep measured in one go; a part is trusted only if it is whole and its own."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from companion.base import paths
from companion.mediation import study, sweeps
from companion.mediation.study import Study


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


def files(results: Path) -> list[Path]:
    return sorted(results.rglob("*.parquet"))


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_shards_join_to_the_same_bits(small: Study, results: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = sweeps.run_sweep(small, name)
    assert not files(results)  # a run without shards keeps no parts
    n = len(sweeps.batches(small, name))
    assert [sweeps.run_shard(small, name, shard, 2)[0] for shard in (1, 0)] == [n // 2, n - n // 2]
    monkeypatch.setattr(sweeps.mediation, "run_clean", None)  # nothing is measured again
    monkeypatch.setattr(sweeps.full_response, "batch_effects", None)
    assert same(sweeps.run_sweep(small, name), alone)
    assert sweeps.run_shard(small, name, 0, 1) == (0, n)  # another number of shards finds the same parts


def test_what_a_shard_did_not_finish_is_measured_when_joined(small: Study, results: Path) -> None:
    alone = sweeps.run_sweep(small, "layers")
    sweeps.run_shard(small, "layers", 0, 2)
    before = len(files(results))
    assert same(sweeps.run_sweep(small, "layers"), alone)
    assert len(files(results)) > before  # and kept


def test_a_part_is_made_again_unless_it_is_whole_and_its_own(small: Study, results: Path) -> None:
    sweeps.run_shard(small, "layers", 0, 1)
    place = sweeps.part_folder(small, "layers")
    assert place is not None
    effects, clean = (place / f"00001.{name}.parquet" for name in ("effects", "clean"))
    good = effects.read_bytes()
    other = (place / "00000.effects.parquet").read_bytes()
    unstamped = results / "unstamped.parquet"
    changed = pd.read_parquet(effects)
    changed.loc[3, "y01"] += 1e-12  # under the stamp of the true content
    changed.to_parquet(results / "changed.parquet")
    table = pd.read_parquet(effects)
    table.attrs = {}
    table.to_parquet(unstamped)
    for damage in (
        good[:100],
        b"",
        b"no parquet",
        other,
        (results / "changed.parquet").read_bytes(),
        unstamped.read_bytes(),
    ):
        effects.write_bytes(damage)
        assert sweeps.read_part(place, 1, ("effects", "clean")) is None
        assert sweeps.run_shard(small, "layers", 0, 1) == (1, len(sweeps.batches(small, "layers")) - 1)
        assert effects.read_bytes() == good
    clean.unlink()
    assert sweeps.read_part(place, 1, ("effects", "clean")) is None


def test_the_key_changes_with_all_that_numbers_rest_on(small: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small.pairs[0]
    moved = replace(first, control=first.control[::-1])
    others = [
        small,
        replace(small, pairs=small.pairs[1:]),
        replace(small, pairs=(moved, *small.pairs[1:])),
        replace(small, subject=replace(small.subject, sha256="0" * 64)),
        replace(small, openers={name: replace(one, comply=(1,)) for name, one in small.openers.items()}),
    ]
    keys = [sweeps.part_key(one, "layers") for one in others] + [sweeps.part_key(small, "modules")]
    monkeypatch.setattr(sweeps, "_code", lambda: "another version")
    keys.append(sweeps.part_key(small, "layers"))
    assert len(set(keys)) == len(keys)
    assert sweeps.part_key(replace(small, slug="elsewhere"), "layers") == keys[-1]


def test_halved_chunks_are_known_to_the_run_that_joins(small: Study, results: Path) -> None:
    place = sweeps.make_part_folder(small, "layers")
    sweeps.write_part(pd.DataFrame({"a": [1]}), place, 0, "effects", ["out of memory once"])
    assert sweeps.read_part(place, 0, ["effects"]) is not None
    assert sweeps.memory_plan(small)["events"][-1:] == ["out of memory once"]  # type: ignore[index]
