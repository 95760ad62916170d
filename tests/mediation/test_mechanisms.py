"""Where a decision is computed, what carries it on, and where a difference can arrive; shares and means known by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from models import BIAS, FAMILIES, FIRST, N_LAYERS, OUT, SIZE, Program, compiled, random_pairs, tiny_subject
from models import tokens as some_tokens
from oracles import cue_study, log_odds, passed, true_float64
from rows import benign_tables, effect_table, scales, shifted
from scipy.stats import ttest_1samp

from companion.base.errors import InputError
from companion.base.thresholds import deepest_early_layer, depth
from companion.calibration.truths import decider
from companion.evidence import layers
from companion.mediation import estimands, mechanisms, study, summaries
from companion.mediation.study import Study
from companion.mediation.summaries import averaged, signed
from companion.model import activations, interventions
from companion.model.architecture import Subject
from companion.stats.bootstrap import Quantity
from organisms import compiled as organisms

# ---- mechanisms ----


@pytest.mark.parametrize("kind", ["early", "middle", "late", "skip_only", "attention", "early_carrier"])
def test_the_component_that_decides_is_found_and_copies_are_not(kind: str) -> None:
    organism = organisms.draw(kind, 5, topics=20, pairs_per_topic=1)
    table = signed(mechanisms.interaction_effects(organisms.study(organism)))
    share = table.groupby(["site", "layer"]).nie.mean() / table.te.mean()
    assert share.idxmax() == decider(organism.design)
    making = list({decider(organism.design), *([("mlp_out", side.layer)] if (side := organism.design.side) else [])})
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
    extra, module = mechanisms.interaction_output(subject, runs, site, layer), subject.layers[layer].mlp_write
    less = passed(subject.model, runs["11"].tokens, module, lambda out: out - extra)[0]
    outputs = (subject.model(runs["11"].tokens), less)
    whole, rest = (float(log_odds(output.logits[0, -1], openers)) for output in outputs)
    own = table[(table.pair_id == pair.pair.id) & (table.site == site) & (table.layer == layer)]
    assert own.nie1.item() == pytest.approx(whole - rest, abs=1e-9) and own.nie1.item() > 1


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
    table = averaged(mechanisms.path_effects(cue_study(subject)))
    found, weights = table[(table.outcome == "Y1") & (table.layer == layer)], mechanisms.PATHS | mechanisms.WITH_OWN
    found = found.groupby("site")["nie"].mean()
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
    found = mechanisms.position_effects(this, pair, ["resid_post"]).set_index(["layer", "position"])
    cue, last = int(np.flatnonzero(pair.control != pair.treated)[0]), len(pair.control) - 1
    known = np.zeros((N_LAYERS, last + 1))
    known[:1, cue], known[1:, last] = 1, 1
    np.testing.assert_allclose(found.share.unstack().loc[:, cue:last], known[:, cue:], atol=1e-4)
    shown, earliest = found.loc[0, "token"], found.loc[0, "earliest"]
    assert shown[cue] == "off/on" and shown[last] == "<assistant>"
    assert (earliest == 0).all() and found.loc[0].index.min() == cue  # nothing reaches a token before
    assert mechanisms.earliest_by_group(this, "T2")["system"] == N_LAYERS
    names = mechanisms.position_groups(this)
    assert names[0] == "system" and names[-1] == "last" and not set(names) & {"wrapper", "differ", "all"}


def test_the_map_holds_test_pairs_alone_and_fewer_layers_where_each_is_costly() -> None:
    this = study.begin("embedded", "embedded", "own", profile="smoke")
    costly = replace(this, is_costly=True, is_smoke=False)
    whole, few = (mechanisms.token_effects(one, ["T1", "T2"]) for one in (this, costly))
    is_test = few.split == "test"
    assert set(few.layer[is_test]) == {0, 2, 5} and set(whole.layer[whole.split == "test"]) == set(range(6))
    assert (few[~is_test].groupby("pair_id").size() == 1).all() and {"T1", "T2"} == set(few.treatment)
    both = few[is_test].merge(whole, on=["pair_id", "layer", "position"], suffixes=("", "_all"))
    assert len(both) == is_test.sum()
    np.testing.assert_allclose(both[["nie0", "nie1"]], both[["nie0_all", "nie1_all"]], atol=1e-5)
    shares = mechanisms.group_shares(costly, few, "T2")
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
        assert (changed(subject, ids, position) == mechanisms.reached(visible, differ)).all()


def test_earliest_layers_of_pairs() -> None:
    subject = tiny_subject("qwen2")
    pairs = random_pairs(5, N_POS, 61)
    for pair, last in zip(pairs, (2, 9, 11, 13, 12), strict=True):
        pair.treated[:] = pair.control
        pair.treated[last] = (pair.control[last] + 1) % 61
    runs = [activations.clean_run(subject, ids) for ids in estimands.prompt_tokens(subject, pairs)]
    found = mechanisms.earliest_layers(runs[0], pairs)
    assert found == [1, 1, 0, -1, 0]
    differ = torch.stack([(a != b).any(-1)[:, -1] for a, b in zip(*(run.resid_post for run in runs), strict=True)])
    assert [int(row.long().argmax()) for row in differ.T[:3]] == found[:3]


# ---- summaries ----

DEPTH = 6  # layers of the tables of `rows`
CELL = ["site", "layer"]


@pytest.mark.parametrize("n", [3, 6, 12])
def test_early_and_late_thirds(n: int) -> None:
    at = depth(np.arange(n), n)
    assert (at < 1 / 3).tolist() == (at[::-1] > 2 / 3).tolist() == [True] * (n // 3) + [False] * (n - n // 3)
    assert deepest_early_layer(n) == n // 3 - 1


def test_effects_take_the_sign_of_te_on_discover() -> None:
    table = shifted(effect_table(), "test", te=-1, nie0=-1)
    flipped = table.assign(te=-table.te, nie0=-table.nie0, nie1=-table.nie1, treatment="T1")
    other = flipped.assign(treatment="T2", outcome="Y2")
    made = signed(pd.concat([table, flipped, other], ignore_index=True))
    for _, part in made.groupby(["treatment", "outcome"]):  # every treatment and outcome has its own sign
        assert (part.loc[part.split == "discover", "te"] > 0).all()
        assert (part.loc[part.split == "test", "te"] < 0).all()  # not its own sign
        np.testing.assert_allclose(part[["te", "nie0", "nie1", "y00"]], table[["te", "nie0", "nie1", "y00"]])
        np.testing.assert_allclose(part.nie, (table.nie0 + table.nie1) / 2)
    with pytest.raises(InputError, match="T2 has no pair in the discover split, which fixes its sign"):
        signed(table[table.split != "discover"])


def test_unsaturated_pairs() -> None:
    bound = np.log(0.98 / 0.02)
    y = {"a": (-bound + 0.01, 0), "b": (-bound - 0.01, 0), "c": (0, bound + 0.01), "d": (0.5, bound - 0.01)}
    rows = [(name, 0, "Y1", *cells) for name, cells in y.items()] + [(name, 0, "Y2", 100.0, 100.0) for name in y]
    table = pd.DataFrame(rows, columns=["pair_id", "layer", "outcome", "y00", "y11"])
    assert summaries.unsaturated_ids(table) == summaries.unsaturated_ids(table[::-1]) == {"a", "d"}


def test_shares_sum_the_test_pairs_effects() -> None:
    table = signed(effect_table(noise=0.4, seed=3))
    found = summaries.late_share(table, DEPTH).estimates()
    # Topics have two pairs each, so that the clustered test is the plain one of topic means.
    topics = table[table.split == "discover"].groupby(["site", "layer", "topic"]).nie.mean().unstack("topic")
    chosen = topics.index[ttest_1samp(topics, 0, axis=1, alternative="greater").pvalue < 0.05]
    sums = table[table.split == "test"].groupby(CELL).nie.sum()[chosen]
    assert found.estimate[0] == pytest.approx(sums[sums.index.get_level_values("layer") >= 4].sum() / sums.sum())
    assert found.low[0] < min(found.estimate[0], 0.8) and max(found.estimate[0], 0.8) < found.high[0]
    assert 0.02 < found.high[0] - found.low[0] < 0.3
    # Neither the validate split nor the order of rows matters.
    other = shifted(effect_table(noise=0.4, seed=3), "validate", te=-9, nie0=7, nie1=-3).sample(frac=1, random_state=0)
    again = summaries.late_share(signed(other), DEPTH).estimates()
    np.testing.assert_allclose([found.estimate, found.low, found.high], [again.estimate, again.low, again.high])


def estimate(share: Quantity) -> float:
    return share.estimates().estimate[0]


@pytest.mark.parametrize(("value", "known"), [("nie", 2 / 3.5), ("nie0", 3 / 4), ("nie1", 1 / 3)])
def test_each_direction_has_its_own_share(value: str, known: float) -> None:
    table = signed(effect_table({("mlp_out", 5): (3.0, 1.0), ("attn_out", 0): (1.0, 2.0)}))
    assert estimate(summaries.late_share(table, DEPTH, value)) == pytest.approx(known)
    assert estimate(summaries.mlp_share(table, value)) == pytest.approx(known)
    for cells in ({}, {("mlp_out", 3): -1.0}):  # nothing is positive
        assert summaries.late_share(signed(effect_table(cells)), DEPTH, value) is None


def test_normalised_shares() -> None:
    table = signed(effect_table())
    scale = scales()["per patch norm"] ** 2  # 4 for an MLP, 1 for attention
    found = summaries.mlp_share(table, scale=scale.sample(frac=1, random_state=1))
    assert estimate(found) == pytest.approx((3.6 / 4) / (3.6 / 4 + 1.4))
    scale[("mlp_out", 0)] = 0.4
    mlps = 3 / 4 + 0.6 / 0.4
    assert estimate(summaries.mlp_share(table, scale=scale)) == pytest.approx(mlps / (mlps + 1.4))
    never_differs = pd.Series(np.where(scale.index.get_level_values(1) == 2, 0.0, 2.0), scale.index)
    assert estimate(summaries.mlp_share(table, scale=never_differs)) == pytest.approx(3.6 / 5)


def test_share_of_te_is_a_ratio_of_sums() -> None:
    table = averaged(effect_table(noise=0.5, spread=0.8))
    frame = summaries.share_of_te(table).set_index(CELL)
    sums = table.groupby(CELL).nie.sum() / table.drop_duplicates("pair_id").te.sum()
    np.testing.assert_allclose(frame.estimate, sums[frame.index])
    exact = summaries.share_of_te(averaged(effect_table(spread=0.8))).set_index(CELL)
    np.testing.assert_allclose(exact.loc[[("mlp_out", 5)], ["estimate", "low", "high"]], 3 / 4)
    two_ways = averaged(effect_table({("mlp_out", 5): (3.0, 1.0)}))
    for value, known in (("nie0", 0.75), ("nie1", 0.25)):
        share = summaries.share_of_te(two_ways, value).set_index(CELL)
        assert share.estimate[("mlp_out", 5)] == pytest.approx(known)


def test_te_weighted_shares_are_a_slope() -> None:
    rng = np.random.default_rng(0)
    pairs = pd.DataFrame({"pair_id": range(60), "topic": np.arange(60) // 2, "te": rng.normal(size=60)})
    nies = {"nie0": 0.4 * pairs.te + rng.normal(size=60), "nie1": 0.8 * pairs.te}
    noisy = averaged(pairs.assign(site="resid_post", layer=0, **nies))
    slope = np.linalg.lstsq(noisy[["te"]].to_numpy(), noisy.nie.to_numpy(), rcond=None)[0][0]
    assert summaries.share_of_te(summaries.te_weighted(noisy)).estimate[0] == pytest.approx(slope)


def test_centroids_by_hand_and_their_interval() -> None:
    harm = signed(effect_table({("mlp_out", 5): 3.0, ("attn_out", 3): 1.0, ("mlp_out", 0): -2.0}))
    first = benign_tables(1, {("mlp_out", 2): 2.0, ("attn_out", 3): 2.0})
    second = benign_tables(2, {("attn_out", 1): 5.0})
    benign = signed(pd.concat([first, second[second.treatment == "B2"]], ignore_index=True))
    found, names = summaries.centroids(harm, benign, DEPTH)
    assert names == ["T2", "B1", "B2"]
    own = [(3 * 5.5 + 3.5) / 4 / 6, 3 / 6, 1.5 / 6]
    np.testing.assert_allclose(found.estimate, [own[0] - (own[1] + own[2]) / 2, *own])
    np.testing.assert_allclose(found.low, found.high, atol=1e-9)
    found, _ = summaries.centroids(signed(effect_table(noise=1.0)), signed(benign_tables(noise=1.0)), DEPTH)
    known = (3 * 5.5 + 4.5 + 0.6 * 0.5 + 0.4 * 1.5) / 5 / 6 - 3 / 6
    assert found.low[0] < known < found.high[0] and 0.01 < found.high[0] - found.low[0] < 0.2
    # Harm and benign topics are drawn apart, so the errors of independent parts add up in squares.
    own = np.sqrt(found.se[1] ** 2 + (found.se[2:] ** 2).sum() / 36)
    assert found.se[0] == pytest.approx(own, rel=0.5)


def test_cell_means_are_means_over_all_pairs_given() -> None:
    table = averaged(effect_table(noise=0.5))
    frame = summaries.cell_means(table).set_index(CELL)
    assert len(frame) == 2 * DEPTH
    np.testing.assert_allclose(frame.estimate, table.groupby(CELL).nie.mean()[frame.index])
    assert (frame[["low", "band_low"]].max(axis=1) < frame.estimate).all()
    assert (frame[["high", "band_high"]].min(axis=1) > frame.estimate).all()
    # The band holds all cells together, so it is wider than the intervals of single ones.
    assert ((frame.band_high - frame.band_low) > (frame.high - frame.low)).all()
    wide = summaries.cell_means(table, "te", by=["split"])
    np.testing.assert_allclose(wide.estimate, table.groupby("split").te.mean()[wide.split])
