"""Plants: nothing moves but what may, they come back as they were saved, and their tables join."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from companion.base import paths
from companion.base.errors import InputError
from companion.calibration.plants import _path, join_plants, plan_plants, read_plants
from organisms import plants
from organisms.plants import FLOAT32, KINDS, Plant
from organisms.shipping import load_shipped

SMALL = replace(FLOAT32, batch=4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_moves_but_what_may(kind: str) -> None:
    before = dict(load_shipped(paths.PLANTS / "base")[0].named_parameters())
    after, _ = plants.grow(Plant(kind, 0), steps=2, recipe=SMALL)
    masks = plants.free(after, Plant(kind, 0))
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= set(masks)
    for name, parameter in after.named_parameters():
        if name in masks:
            assert torch.equal(parameter[~masks[name]], before[name][~masks[name]]), name


def test_sets_of_neurons_are_what_they_are_called() -> None:
    for size in plants.SIZES:
        adjacent, scattered = (Plant(f"{size} {order} neurons", 1).neurons(384) for order in ("adjacent", "scattered"))
        assert (np.diff(adjacent) == 1).all() and len(adjacent) == len(set(scattered)) == size
        assert (np.diff(scattered) > 1).any() and max(scattered.max(), adjacent.max()) < 384
        assert not np.array_equal(scattered, Plant(f"{size} scattered neurons", 2).neurons(384))
    assert len(Plant("attention", 0).neurons(384)) == 0


def test_where_it_learned_names_components() -> None:
    assert plants.components(Plant("attention", 0)) == {("attn_out", 4), ("attn_out", 5)}
    assert plants.components(Plant("middle MLPs", 0)) == {("mlp_out", 2), ("mlp_out", 3)}
    assert plants.components(Plant("4 adjacent neurons", 0)) == {("mlp_out", 5)}
    assert len(plants.components(Plant("everything", 0))) == 12
    with pytest.raises(InputError, match="no plant of kind"):
        Plant("roots", 0)


def test_a_plant_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(paths.PLANTS / "base")
    plant = Plant("16 scattered neurons", 2)
    grown, _ = plants.grow(plant, steps=2, recipe=SMALL)
    assert plants.save(grown, plant, tmp_path).stat().st_size < 500_000
    again, _ = plants.load(plant, tmp_path)
    for (name, one), two in zip(grown.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    with pytest.raises(InputError, match="is not there"):
        plants.load(Plant("attention", 9), tmp_path)


def test_shipped_tables_have_every_plant_once() -> None:
    table = read_plants()
    wanted = {(plant.kind, plant.seed) for plant in plan_plants()}
    assert {(row.kind, row.seed) for row in table[["kind", "seed"]].drop_duplicates().itertuples()} == wanted
    assert not table.duplicated(["kind", "seed", "treatment", "effect", "site", "layer"]).any()
    direct = table[table.effect == "direct"].groupby(["kind", "seed", "treatment"]).share.sum()
    assert direct.between(0.9, 1.1).all(), "shares of the linear contrast add up"


def test_plants_are_joined_with_those_of_earlier_joins(tmp_path: Path) -> None:
    whole = read_plants()
    first = whole[whole.kind == KINDS[0]]
    for kind, part in whole[whole.kind.isin(KINDS[:2])].groupby("kind"):
        for name, table in {"plants": part, "plant_scores": None, "plant_evidence": None}.items():
            made = read_plants(table=name).iloc[:0] if table is None else table
            path = _path(tmp_path, Plant(str(kind), 0), name)
            path.parent.mkdir(exist_ok=True)
            made.to_parquet(path)
        join_plants(tmp_path)
        for path in (tmp_path / ".parts").iterdir():
            path.unlink()
    joined = read_plants(tmp_path)
    assert len(joined) == whole.kind.isin(KINDS[:2]).sum()
    pd.testing.assert_frame_equal(joined[joined.kind == KINDS[0]].reset_index(drop=True), first.reset_index(drop=True))
