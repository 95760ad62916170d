"""Token groups by layer, words replaced in the prompt, prompts of unequal length, and where a difference can arrive."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny_subject
from handmade import N_LAYERS, Program, compiled, random_pairs
from neuron_tools import cue_study

from companion.base.errors import InputError
from companion.mediation import study, tokens
from companion.mediation.study import Study
from companion.model import activations
from companion.model.architecture import Subject
from companion.plots.tokens import groups
from companion.prompts import positions
from companion.prompts.pairs import Pair
from companion.prompts.tokens import TokenPair, token_pair

PROGRAM = Program(always=1.0, both=0.5, skip=0.4)
TOTAL = PROGRAM.log_odds(1, 0) - PROGRAM.log_odds(0, 0)


@pytest.fixture(scope="module")
def this() -> Study:
    return cue_study(compiled(PROGRAM))


def test_the_map_of_one_pair_has_the_cue_before_the_head_reads_it_and_the_last_token_after(this: Study) -> None:
    pair = this.pairs[0]
    found = tokens.position_effects(this, pair).set_index(["layer", "position"])
    cue, last = int(np.flatnonzero(pair.control != pair.treated)[0]), len(pair.control) - 1
    for layer in range(N_LAYERS):
        known = {cue: TOTAL if layer < 1 else 0.0, last: TOTAL if layer >= 1 else 0.0}
        for position in range(last + 1):
            assert found.loc[(layer, position), "nie"] == pytest.approx(known.get(position, 0.0), abs=1e-4)
    shown, earliest = found.loc[0, "token"], found.loc[0, "earliest"]
    assert shown[cue] == "off/on" and shown[last] == "<assistant>"
    assert (earliest[: cue - 1] == N_LAYERS).all() and (earliest[cue:] == 0).all()  # nothing reaches a token before
    assert tokens.earliest_by_group(this, "T2")["system"] == N_LAYERS
    names, missing = tokens.position_groups(this)
    assert {"wrapper", "distractor", "verb", "object"} == set(missing)
    assert names[-3:] == ["differ", "others", "all"] and "request" not in names


def test_the_map_holds_test_pairs_alone_and_fewer_layers_where_each_is_costly() -> None:
    this = study.begin("embedded", "embedded", "own", profile="smoke")
    costly = dataclasses.replace(this, is_costly=True)
    whole, few = (tokens.token_effects(one, ["T1", "T2"]) for one in (this, costly))
    is_test = few.split == "test"
    assert set(few.layer[is_test]) == {0, 2, 5} and set(whole.layer[whole.split == "test"]) == set(range(6))
    assert (few[~is_test].groupby("pair_id").size() == 1).all() and {"T1", "T2"} == set(few.treatment)
    assert set(few.site[few.treatment == "T1"]) == {"resid_post"} and "mlp_out" in set(few.site[few.treatment == "T2"])
    both = few[is_test].merge(whole, on=["pair_id", "site", "layer", "position"], suffixes=("", "_all"))
    assert len(both) == is_test.sum()
    np.testing.assert_allclose(both[["nie0", "nie1"]], both[["nie0_all", "nie1_all"]], atol=1e-5)
    means = tokens.group_means(costly, few, "T2", ["wrapper", "last"]).query("site == 'resid_post'")
    (dots,) = groups(means, panel="treatment", title="").axes[0].get_lines()
    sure = means.layer[(means.low > 0) | (means.high < 0)]
    assert [*dots.get_xdata()] == [[0, 2, 5].index(layer) for layer in sure]  # places in the grid, not layers
    (hatched,) = groups(means.assign(earliest=4.0).head(3), panel="treatment", title="").axes[0].patches
    assert hatched.get_width() == pytest.approx(2 / 3)  # layers 0 and 2 of 0, 2 and 5


def test_of_two_copies_each_is_enough_and_neither_needed() -> None:
    """An OR of two groups, 4 log-odds: sufficiency 4, necessity 0; a group that must have everything shows 4 twice."""
    key = {"treatment": "T2", "outcome": "Y1", "y00": 0.0, "y11": 4.0, "te": 4.0}
    effects = {("wrapper", 0): (4.0, 0.0), ("rest", 0): (4.0, 0.0), ("wrapper", 1): (0.0, 0.0), ("last", 1): (4.0, 4.0)}
    rows = [
        {**key, "pair_id": f"p{i}", "topic": f"t{i}", "split": "discover" if i < 3 else "test", "site": site, "layer": layer,
         "position": name, "nie0": nie0, "nie1": nie1, "y01": nie0, "y10": 4 - nie1}
        for i in range(6) for site in ("resid_post", "mlp_out") for (name, layer), (nie0, nie1) in effects.items()
    ]  # fmt: skip
    made = tokens.direction_means(pd.DataFrame(rows), "T2", ["wrapper", "system", "rest", "last"])
    assert [*made.index] == [(w, name) for w in ("sufficiency", "necessity") for name in ("wrapper", "rest", "last")]
    assert made[0].tolist()[:2] == [4, 4] and made[0].tolist()[3:5] == [0, 0]
    assert made.loc[("sufficiency", "last"), 1] == made.loc[("necessity", "last"), 1] == 4


def test_replaced_words_are_the_controls_where_they_differ_and_neutral_elsewhere(this: Study) -> None:
    pair = this.pairs[0]
    ids, is_swap = tokens.replaced_tokens(pair, pair.control != pair.treated, neutral=7)
    assert is_swap and (ids == pair.control).all()
    mask = positions.groups(pair, "<user> ")["last_instruction"]
    ids, is_swap = tokens.replaced_tokens(pair, mask, neutral=7)
    assert not is_swap and (ids[mask] == 7).all() and (ids[~mask] == pair.treated[~mask]).all()
    # The cue takes the whole effect, a filler none.
    found = tokens.input_effects(this, "T2", ["differ", "last_instruction"]).groupby("position")["effect"].mean()
    assert found[["differ", "last_instruction"]].tolist() == pytest.approx([TOTAL, 0], abs=1e-4)


def prompt(subject: Subject, cue: str, filler: str) -> TokenPair:
    """A prompt whose cue is a named span, behind as many filler words as wanted."""
    texts = [f"{filler} {word} low do it".strip() for word in (cue, "off" if cue == "on" else "on")]
    at = len(filler) + bool(filler)
    spans = {"control": {"wrapper": (at, at + len(cue))}, "treated": {"wrapper": (at, at + 2 + (cue == "on"))}}
    made, reason = token_pair(Pair("p", "T2", "t", *texts, spans=spans), subject.tokenizer)
    assert made is not None, reason
    return made


@pytest.mark.parametrize("fillers", [("", "please now"), ("please be kind", "now")])
def test_a_cue_moves_between_prompts_of_unequal_length(this: Study, fillers: tuple[str, str]) -> None:
    """A group that a prompt lacks is refused."""
    subject, named = this.subject, zip(("off", "on"), fillers, strict=True)
    base, source = (tokens.one_side(prompt(subject, *words), "control", "<user> ") for words in named)
    assert len(base.tokens) != len(source.tokens)
    names = ["wrapper", "last_instruction", "last"]
    found = tokens.interchange_ends(subject, base, source, this.openers["T2"], names)
    effect = (found.patched - found.base).to_numpy().reshape(3, N_LAYERS)
    known = np.zeros((3, N_LAYERS))
    known[0, 0] = known[2, 1:] = TOTAL  # before the head of layer 1 reads it, and after
    np.testing.assert_allclose(effect, known, atol=1e-4)
    assert (found.source - found.base).to_numpy() == pytest.approx(TOTAL, abs=1e-4)
    with pytest.raises(InputError, match="group verb is not in both"):
        tokens.interchange_ends(subject, base, source, this.openers["T2"], ["verb"])


def test_a_perfect_order_has_rank_correlation_one() -> None:
    sizes = enumerate(("wrapper", "verb", "rest"), start=1)
    rows = [(f"p{i}", f"t{i}", "test" if i % 2 else "discover", name, size) for size, name in sizes for i in range(20)]
    table = pd.DataFrame(rows, columns=["pair_id", "topic", "split", "position", "nie0"]).assign(treatment="T2")
    made = table.assign(effect=2.0 * table.nie0, swapped=True).query("split == 'test'").drop(columns="nie0")
    table = table.assign(nie1=table.nie0, te=6.0, site="resid_post", layer=0, outcome="Y1")
    views, rho = tokens.compare_views(table, made, "T2")
    assert rho == pytest.approx(1) and views.set_index(["view", "position"]).loc[("input", "rest"), "estimate"] == 6
    assert list(views.position) == ["wrapper", "verb", "rest"] * 2, "a figure shows groups in reading order"


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
