"""The light cone against brute force: change tokens of a real sliding-window model and see which cells change a bit."""

import numpy as np
import pytest
import torch
from families import tiny_subject
from handmade import random_pairs
from torch import Tensor

from companion.mediation.reachability import (
    earliest_layers,
    earliest_possible_layer,
    reached,
    recomputed_cells,
    visible_keys,
)
from companion.model import activations, interventions, replay
from companion.model.architecture import Subject

N_POS = 14


def changed(subject: Subject, ids: Tensor, position: int, attention_mask: Tensor | None = None) -> np.ndarray:
    """Which cells (layer, position) differ, bit for bit, from the given run under any of five other tokens there."""
    same = ids.repeat(5, 1)
    others = same.clone()
    others[:, position] = (ids[0, position] + torch.arange(1, 6)) % 61
    mask = None if attention_mask is None else attention_mask.repeat(5, 1)
    # Both runs have one shape: rows of a matrix product may differ by their place in it.
    runs = [activations.clean_run(subject, tokens, mask).resid_post for tokens in (same, others)]
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
        columns = np.flatnonzero(predicted.any(axis=0))
        for target in range(N_POS):
            first = earliest_possible_layer(visible, differ, target)
            if target == position:
                assert first == -1
            elif target in columns:
                assert first == int(np.argmax(predicted[:, target]))
            else:
                assert first is None


def test_windows_hold_the_difference_back() -> None:
    """Two layers of window 3 and two of full attention, in turn: two positions a sliding layer, then everywhere."""
    subject = tiny_subject("qwen2")
    run = activations.clean_run(subject, torch.randint(3, 61, (1, N_POS), generator=torch.Generator().manual_seed(0)))
    differ = np.arange(N_POS) == 4
    cells = reached(visible_keys(run), differ)
    assert np.flatnonzero(cells[0]).tolist() == [4, 5, 6]
    assert np.flatnonzero(cells[1]).tolist() == list(range(4, N_POS))
    assert earliest_possible_layer(visible_keys(run), differ) == 1
    assert [earliest_possible_layer([visible_keys(run)[0]] * 4, differ, target) for target in (5, 8, 12, 13)] == [
        0,
        1,
        3,
        None,
    ]


def test_padding_is_not_seen() -> None:
    subject = tiny_subject("qwen2")
    ids = torch.randint(3, 61, (1, N_POS), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(ids)
    attention_mask[:, :3] = 0
    visible = visible_keys(activations.clean_run(subject, ids, attention_mask))
    assert not changed(subject, ids, 1, attention_mask)[:, 3:].any()
    assert not reached(visible, np.arange(N_POS) == 1)[:, 3:].any()
    differ = np.arange(N_POS) == 5
    assert (changed(subject, ids, 5, attention_mask)[:, 3:] == reached(visible, differ)[:, 3:]).all()


def test_earliest_layers_of_pairs() -> None:
    subject = tiny_subject("qwen2")
    pairs = random_pairs(4, N_POS, 61)
    for pair, last in zip(pairs, (2, 9, 11, 13), strict=True):
        pair.treated[:] = pair.control
        pair.treated[last] = (pair.control[last] + 1) % 61
    tokens = [torch.tensor(np.stack([getattr(pair, side) for pair in pairs])) for side in ("control", "treated")]
    runs = [activations.clean_run(subject, ids) for ids in tokens]
    found = earliest_layers(runs[0], pairs)
    assert found == [1, 1, 0, -1]
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
