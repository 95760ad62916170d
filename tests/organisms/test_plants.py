"""Plants: nothing moves but what may, they come back as they were saved, and they are named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from companion.base import paths
from companion.base.errors import InputError
from organisms import plants
from organisms.plants import KINDS, RECIPE, Plant
from organisms.training import load_shipped

SMALL = replace(RECIPE, batch=4, steps_tune=2)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_moves_but_what_may(kind: str) -> None:
    before = dict(load_shipped(paths.PLANTS / "base")[0].named_parameters())
    after, _ = plants.grow(Plant(kind, 0), recipe=SMALL)
    masks = plants.free_entries(after, Plant(kind, 0))
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
    assert plants.learned_components(Plant("attention", 0)) == {("attn_out", 4), ("attn_out", 5)}
    assert plants.learned_components(Plant("middle MLPs", 0)) == {("mlp_out", 2), ("mlp_out", 3)}
    assert plants.learned_components(Plant("4 adjacent neurons", 0)) == {("mlp_out", 5)}
    assert len(plants.learned_components(Plant("everything", 0))) == 12
    with pytest.raises(InputError, match="no plant of kind"):
        Plant("roots", 0)


def test_a_plant_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(paths.PLANTS / "base")
    plant = Plant("16 scattered neurons", 2)
    grown, _ = plants.grow(plant, recipe=SMALL)
    assert plants.save_plant(grown, plant, tmp_path).stat().st_size < 500_000
    again, _ = plants.load_plant(plant, tmp_path)
    for (name, one), two in zip(grown.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    with pytest.raises(InputError, match="is not there"):
        plants.load_plant(Plant("attention", 9), tmp_path)
