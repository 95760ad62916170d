"""Both directions at once are the two interchanges that they stand for."""

import pytest
import torch
from families import tiny_subject
from handmade import random_pairs
from true_float64 import true_float64

from companion.mediation import estimands
from companion.mediation.path_specific import held_patches
from companion.model import replay
from companion.model.interventions import Patch
from companion.model.replay import both_ways


@pytest.mark.parametrize("n_pairs", [1, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2", "mistral"])
def test_both_ways_are_two_interchanges(family: str, n_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject(family, torch.float64)
    with true_float64(subject.model):
        batch = estimands.run_clean(subject, random_pairs(n_pairs, 9, 60))
        runs = (batch.control, batch.treated)
        where = torch.zeros_like(batch.control.tokens, dtype=torch.bool)
        where[0, 2:5], where[-1, 4:] = True, True  # other positions in other pairs
        plain = [Patch("resid_post", 0, where), Patch("attn_out", 1, where), Patch("neuron", 2, where, (0, 3))]
        # and values of the base's own, or of both
        lists = [[*plain, *held_patches(subject, *pair, [0, 2])] for pair in (runs, runs[::-1])]
        expected = [
            replay.interchange(subject, *order, some)[:, :, 0]
            for order, some in zip((runs, runs[::-1]), lists, strict=True)
        ]
        called = []
        monkeypatch.setattr(
            "companion.model.replay.interchange", lambda *a: called.append(len(a[1].tokens)) or replay.interchange(*a)
        )
        found = both_ways(subject, *runs, *lists, at_once=64)
        apart = both_ways(subject, *runs, *lists, at_once=1)
    assert called == [2 * n_pairs, n_pairs, n_pairs]
    for one, other, wanted in zip(found, apart, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-11)
        assert torch.equal(other, wanted)
    assert not torch.allclose(found[0], found[1])
