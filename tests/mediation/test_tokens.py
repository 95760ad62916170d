"""Shares of token groups and single tokens by layer, and where a difference can arrive."""

import dataclasses

import numpy as np
import pytest
import torch
from families import tiny_subject
from handmade import N_LAYERS, Program, compiled, random_pairs
from neuron_tools import cue_study

from companion.mediation import study, tokens
from companion.mediation.study import Study
from companion.model import activations
from companion.model.architecture import Subject
from companion.plots.tokens import groups

PROGRAM = Program(always=1.0, both=0.5, skip=0.4)


@pytest.fixture(scope="module")
def this() -> Study:
    return cue_study(compiled(PROGRAM))


def test_the_map_of_one_pair_has_the_cue_before_the_head_reads_it_and_the_last_token_after(this: Study) -> None:
    pair = this.pairs[0]
    found = tokens.position_effects(this, pair, ["resid_post"]).set_index(["layer", "position"])
    cue, last = int(np.flatnonzero(pair.control != pair.treated)[0]), len(pair.control) - 1
    for layer in range(N_LAYERS):
        known = {cue: float(layer < 1), last: float(layer >= 1)}
        for position in range(cue, last + 1):
            assert found.loc[(layer, position), "share"] == pytest.approx(known.get(position, 0.0), abs=1e-4)
    shown, earliest = found.loc[0, "token"], found.loc[0, "earliest"]
    assert shown[cue] == "off/on" and shown[last] == "<assistant>"
    assert (earliest == 0).all() and found.loc[0].index.min() == cue  # nothing reaches a token before
    assert tokens.earliest_by_group(this, "T2")["system"] == N_LAYERS
    names = tokens.position_groups(this)
    assert names[0] == "system" and names[-1] == "last" and not set(names) & {"wrapper", "differ", "all"}


def test_the_map_holds_test_pairs_alone_and_fewer_layers_where_each_is_costly() -> None:
    this = study.begin("embedded", "embedded", "own", profile="smoke")
    costly = dataclasses.replace(this, is_costly=True)
    whole, few = (tokens.token_effects(one, ["T1", "T2"]) for one in (this, costly))
    is_test = few.split == "test"
    assert set(few.layer[is_test]) == {0, 2, 5} and set(whole.layer[whole.split == "test"]) == set(range(6))
    assert (few[~is_test].groupby("pair_id").size() == 1).all() and {"T1", "T2"} == set(few.treatment)
    both = few[is_test].merge(whole, on=["pair_id", "layer", "position"], suffixes=("", "_all"))
    assert len(both) == is_test.sum()
    np.testing.assert_allclose(both[["nie0", "nie1"]], both[["nie0_all", "nie1_all"]], atol=1e-5)
    shares = tokens.group_shares(costly, few, "T2")
    part = few[is_test & (few.treatment == "T2") & (few.layer == 2) & (few.position == "wrapper")]
    of_wrapper = shares[shares.group == "wrapper"].set_index("layer").estimate
    assert of_wrapper[2] == pytest.approx((part.nie0 + part.nie1).sum() / 2 / part.te.sum())
    assert "system" not in set(shares.group) and list(shares.group)[-1] == "last"
    ax = groups(shares).axes[0]
    said = [text.get_text() for text in ax.texts]
    assert said == [f"{100 * one:.0f}" for one in shares.estimate if abs(one) >= 0.05]
    (hatched,) = groups(shares.assign(earliest=4.0).head(3)).axes[0].patches
    assert hatched.get_width() == pytest.approx(2 / 3)  # layers 0 and 2 of 0, 2 and 5


# Where a difference can arrive: change tokens of a sliding-window model and see which cells change a bit.
N_POS = 14


def changed(subject: Subject, ids: torch.Tensor, position: int) -> np.ndarray:
    """Which cells (layer, position) differ, bit for bit, from the given run under any of five other tokens there."""
    same, others = ids.repeat(5, 1), ids.repeat(5, 1)
    others[:, position] = (ids[0, position] + torch.arange(1, 6)) % 61
    # Both runs have one shape: rows of a matrix product may differ by their place in it.
    runs = [activations.clean_run(subject, side).resid_post for side in (same, others)]
    return np.stack([(a != b).any(-1).any(0).numpy() for a, b in zip(*runs, strict=True)])


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mistral", "llama"])
@pytest.mark.parametrize("attention", [None, "eager"])
def test_cells_that_a_token_reaches(family: str, attention: str | None) -> None:
    subject = tiny_subject(family, torch.float32, attention)
    ids = torch.randint(3, 61, (1, N_POS), generator=torch.Generator().manual_seed(3))
    visible = activations.visible_keys(activations.clean_run(subject, ids))
    for position in (0, 5, 12, 13):
        differ = np.arange(N_POS) == position
        assert (changed(subject, ids, position) == tokens.reached(visible, differ)).all()


def test_earliest_layers_of_pairs() -> None:
    subject = tiny_subject("qwen2")
    pairs = random_pairs(5, N_POS, 61)
    for pair, last in zip(pairs, (2, 9, 11, 13, 12), strict=True):
        pair.treated[:] = pair.control
        pair.treated[last] = (pair.control[last] + 1) % 61
    sides = [torch.tensor(np.stack([getattr(pair, side) for pair in pairs])) for side in ("control", "treated")]
    runs = [activations.clean_run(subject, ids) for ids in sides]
    found = tokens.earliest_layers(runs[0], pairs)
    assert found == [1, 1, 0, -1, 0]
    differ = torch.stack([(a != b).any(-1)[:, -1] for a, b in zip(runs[0].resid_post, runs[1].resid_post, strict=True)])
    assert [int(row.long().argmax()) for row in differ.T[:3]] == found[:3]
