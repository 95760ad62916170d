"""Where a decision is computed, what carries it on, and where a difference can arrive."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import BIAS, FAMILIES, FIRST, N_LAYERS, OUT, SIZE, Program, compiled, random_pairs, tiny_subject
from models import tokens as some_tokens
from oracles import cue_study, true_float64

from companion.calibration.truths import decider
from companion.evidence import layers
from companion.mediation import mechanisms, study, summaries, tokens
from companion.mediation.study import Study
from companion.model import activations, interventions
from companion.model.activations import on_output
from companion.model.architecture import Subject
from organisms import compiled as organisms

# ---- mechanisms ----


@pytest.mark.parametrize("kind", ["early", "middle", "late", "skip_only", "attention", "early_carrier"])
def test_the_component_that_decides_is_found_and_copies_are_not(kind: str) -> None:
    organism = organisms.draw(kind, 5, topics=20, pairs_per_topic=1)
    table = summaries.signed(mechanisms.interaction_effects(organisms.study(organism)))
    share = table.groupby(["site", "layer"]).nie.mean() / table.te.mean()
    assert share.idxmax() == decider(organism.design)
    side = organism.design.side
    making = list({decider(organism.design), ("mlp_out", side.layer)} if side else {decider(organism.design)})
    assert share.drop(making).abs().max() < 0.02 and share[making].sum() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_component_that_reads_its_own_input_writes_its_own_output(family: str) -> None:
    subject = tiny_subject(family, torch.float64)
    with true_float64(subject.model):
        run = activations.clean_run(subject, some_tokens(seed=1))
        for site in ("attn_out", "mlp_out"):
            hidden = run.resid_pre[2] + (run.attn_out[2] if site == "mlp_out" else 0)
            written = interventions.component_output(subject, run, site, 2, hidden)
            assert torch.allclose(written, run.site(site, 2), atol=1e-10), site


def test_it_is_one_full_forward_with_what_is_computed_taken_away() -> None:
    organism = organisms.draw("late", 3, topics=10, pairs_per_topic=1, dtype=torch.float64)
    this = organisms.study(organism)
    table, (pair, twin) = mechanisms.interaction_effects(this), this.with_twins(this.of("T2"))[0]
    subject, openers = this.subject, this.openers["T2"]
    ids = {"00": twin.control, "01": twin.treated, "10": pair.control, "11": pair.treated}
    runs = {name: activations.clean_run(subject, torch.tensor(side[None])) for name, side in ids.items()}
    site, layer = decider(organism.design)
    extra = mechanisms.interaction_output(subject, runs, site, layer)

    def odds(*, less: bool) -> float:
        with torch.no_grad(), on_output(subject.layers[layer].mlp_write, lambda out: out - extra if less else None):
            logits = subject.model(torch.tensor(pair.treated[None])).logits[0, -1]
        return float(logits[list(openers.comply)].logsumexp(0) - logits[list(openers.refuse)].logsumexp(0))

    own = table[(table.pair_id == pair.pair.id) & (table.site == site) & (table.layer == layer)]
    assert own.nie1.item() == pytest.approx(odds(less=False) - odds(less=True), abs=1e-9) and own.nie1.item() > 1


def test_a_linear_component_computes_nothing_and_without_twins_of_one_length_there_are_no_rows() -> None:
    organism = organisms.draw("late", 3, topics=10, pairs_per_topic=1)
    this = organisms.study(organism)
    pair, twin = this.with_twins(this.of("T2"))[0]
    longer = replace(twin, control=np.append(twin.control, 0), treated=np.append(twin.treated, 0))
    changed = replace(this, pairs=tuple(longer if one is twin else one for one in this.pairs))
    kept = [one for one, _ in changed.with_twins(changed.of("T2"))]
    assert pair not in kept and len(kept) == len(this.of("T2")) - 1
    none = mechanisms.interaction_effects(replace(this, twins={}))
    assert none.empty and layers.evidence_c1_computed(none, "m", 6) == []
    site, layer = decider(organism.design)
    with torch.no_grad():
        this.subject.model.model.layers[layer].mlp.down_proj.weight.zero_()
    table = mechanisms.interaction_effects(this)
    assert table[(table.site == site) & (table.layer == layer)][["nie0", "nie1"]].abs().max().max() == 0


def shares(subject: Subject, layer: int) -> dict[str, float]:
    """Each path's share of the effect of the last token's residual stream after a layer, cue A changed."""
    table = summaries.averaged(mechanisms.path_effects(cue_study(subject)))
    found = table[(table.outcome == "Y1") & (table.layer == layer)].groupby("site")["nie"].mean()
    weights = mechanisms.PATHS | mechanisms.WITH_OWN
    sums = {name: float(sum(w * found[held] for held, w in path.items())) for name, path in weights.items()}
    return {name: value / found["live"] if found["live"] else value for name, value in sums.items()}


SHARES = ("MLPs", "attention", "skip", "MLPs, attention live", "MLPs from this layer on")
PLAIN, HALF = Program(), Program(skip=0.4)
SKIPPED = HALF.skip / (HALF.log_odds(1, 0) - HALF.log_odds(0, 0))


KNOWN = [
    (Program(gain=0.0, skip=1.5), 1, (0, 0, 1, 0, 0)),  # nothing but the skip path
    (PLAIN, 0, (0, 0, 0, 0, 0)),  # the signal has not arrived at the last token: no effect at all
    (PLAIN, 1, (1, 0, 0, 1, 1)),  # layer 2's MLP carries everything
    (PLAIN, 2, (0, 0, 1, 0, 1)),  # it has decided: nothing is left to the MLPs above, all to it and them together
    (PLAIN, 3, (0, 0, 1, 0, 0)), (HALF, 1, (1 - SKIPPED, 0, SKIPPED, 1 - SKIPPED, 1 - SKIPPED)),
]  # fmt: skip


@pytest.mark.parametrize(("program", "layer", "known"), KNOWN)
def test_shares_of_compiled_models(program: Program, layer: int, known: tuple[float, ...]) -> None:
    found = shares(compiled(program), layer)
    assert found == pytest.approx(dict(zip(SHARES, known, strict=True)), abs=1e-4)
    assert (known != (0, 0, 1, 0, 0) or layer == 3) or (found["MLPs"], found["attention"]) == (0, 0)  # exactly


def test_paths_are_drawn_from_the_layer_where_the_last_token_holds_something_and_for_a_set_without_wrappers() -> None:
    this = cue_study(compiled(HALF))
    renamed = tuple(replace(one, pair=replace(one.pair, treatment="B1")) for one in this.pairs)
    table = mechanisms.path_effects(replace(this, pairs=renamed, openers={"B1": this.openers["T2"]}))
    assert set(table.treatment) == {"B1"}
    found = mechanisms.shares_by_layer(table, "B1")
    assert ({*found.layer}, {*found.path}, {*found.hand_over}) == ({1, 2}, {"MLPs", "attention", "skip"}, {1})
    assert found.groupby("layer").estimate.sum().tolist() == pytest.approx([1, 1])
    assert found.estimate[found.path == "skip"].tolist() == pytest.approx([SKIPPED, 1], abs=1e-4)


def test_an_attention_carried_signal_is_no_mlps() -> None:
    """After layer 1 the last token knows FIRST; at layer 2 attention reads it from its own token into OUT; no MLP works."""
    subject = compiled(Program(gain=0.0))
    attention = subject.model.model.layers[2].self_attn
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        # The key is FIRST itself, so that a token that knows it looks at tokens that know it: itself above all.
        attention.q_proj.weight[3, BIAS] = 10.0 / SIZE
        attention.k_proj.weight[3, FIRST] = 10.0
        attention.v_proj.weight[0, FIRST] = 1.0
        attention.o_proj.weight[OUT, 0] = 2.0
    found = shares(subject, 1)
    assert abs(found["MLPs"]) < 1e-6 and found["attention"] == pytest.approx(1, abs=1e-4)


# ---- tokens ----

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
    costly = dataclasses.replace(this, is_costly=True, is_smoke=False)
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
