"""The light cone against brute force: change tokens of a real sliding-window model and see which cells change a bit."""

import numpy as np
import pytest
import torch
from families import tiny_subject
from handmade import random_pairs
from torch import Tensor

from companion.mediation.reachability import earliest_layers, reached, recomputed_cells, visible_keys
from companion.model import activations, interventions, replay
from companion.model.architecture import Subject

N_POS = 14


def changed(subject: Subject, ids: Tensor, position: int) -> np.ndarray:
    """Which cells (layer, position) differ, bit for bit, from the given run under any of five other tokens there."""
    same = ids.repeat(5, 1)
    others = same.clone()
    others[:, position] = (ids[0, position] + torch.arange(1, 6)) % 61
    # Both runs have one shape: rows of a matrix product may differ by their place in it.
    runs = [activations.clean_run(subject, tokens).resid_post for tokens in (same, others)]
    return np.stack([(a != b).any(-1).any(0).numpy() for a, b in zip(*runs, strict=True)])


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mistral", "llama"])
@pytest.mark.parametrize("attention", [None, "eager"])
def test_cells_that_a_token_reaches(family: str, attention: str | None) -> None:
    subject = tiny_subject(family, torch.float32, attention)
    ids = torch.randint(3, 61, (1, N_POS), generator=torch.Generator().manual_seed(3))
    visible = visible_keys(activations.clean_run(subject, ids))
    for position in (0, 5, 12, 13):
        differ = np.arange(N_POS) == position
        predicted = reached(visible, differ)
        assert (changed(subject, ids, position) == predicted).all()


def test_windows_hold_the_difference_back() -> None:
    """Two layers of window 3 and two of full attention, in turn: two positions a sliding layer, then everywhere."""
    subject = tiny_subject("qwen2")
    run = activations.clean_run(subject, torch.randint(3, 61, (1, N_POS), generator=torch.Generator().manual_seed(0)))
    differ = np.arange(N_POS) == 4
    cells = reached(visible_keys(run), differ)
    assert np.flatnonzero(cells[0]).tolist() == [4, 5, 6]
    assert np.flatnonzero(cells[1]).tolist() == list(range(4, N_POS))
    steps = reached([visible_keys(run)[0]] * 4, differ)
    assert [int(row.nonzero()[0].max()) for row in steps] == [6, 8, 10, 12]  # 13 is out of reach


def test_earliest_layers_of_pairs() -> None:
    subject = tiny_subject("qwen2")
    pairs = random_pairs(4, N_POS, 61)
    pairs += random_pairs(1, N_POS, 61, seed=1)
    for pair, last in zip(pairs, (2, 9, 11, 13, 12), strict=True):
        pair.treated[:] = pair.control
        pair.treated[last] = (pair.control[last] + 1) % 61
    tokens = [torch.tensor(np.stack([getattr(pair, side) for pair in pairs])) for side in ("control", "treated")]
    runs = [activations.clean_run(subject, ids) for ids in tokens]
    found = earliest_layers(runs[0], pairs)
    assert found == [1, 1, 0, -1, 0]
    differ = torch.stack([(a != b).any(-1)[:, -1] for a, b in zip(runs[0].resid_post, runs[1].resid_post, strict=True)])
    assert [int(row.long().argmax()) for row in differ.T[:3]] == found[:3]


def test_recomputed_cells_are_those_above_and_to_the_right() -> None:
    subject = tiny_subject("llama")
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(2))
    base, source = activations.clean_run(subject, ids[:1]), activations.clean_run(subject, ids[1:])
    table = recomputed_cells(4, list("abcde"), {"one": (1, 2), "two": (3, 0)})
    assert table.groupby("panel").size().tolist() == [20, 20]
    states = table[table.panel == "one"].pivot(index="layer", columns="position", values="state")
    patch = interventions.Patch("resid_post", 1, torch.arange(5)[None] == 2)
    after = replay.interchange(subject, base, source, [patch], read=range(5))[0, 0]
    moved = (after != base.resid_post[-1][0]).any(-1)
    assert [state != "clean" for state in states.loc[3]] == moved.tolist()
    assert states.loc[1, 2] == "patched"
    assert states.loc[3, 4] == "read"
    assert (states.loc[0] == "clean").all()
    assert (states.loc[2].to_numpy() == ["clean", "clean", "recomputed", "recomputed", "recomputed"]).all()
