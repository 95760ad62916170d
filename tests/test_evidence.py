"""Evidence from effect tables with known shares and centroids, from a compiled model, and from thin prompt sets."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp
from synthetic import LATE_MLP, N_LAYERS, benign_tables, effect_table, shifted

from companion.base import thresholds
from companion.base.errors import InputError
from companion.base.thresholds import deepest_early_layer, depth
from companion.evidence import layers
from companion.mediation import summaries
from companion.mediation.summaries import signed

COMPONENTS = thresholds.COMPONENTS


@pytest.mark.parametrize(
    ("n_layers", "early", "late"), [(6, [0, 1], [4, 5]), (3, [0], [2]), (12, [0, 1, 2, 3], [8, 9, 10, 11])]
)
def test_early_and_late_thirds(n_layers: int, early: list[int], late: list[int]) -> None:
    at = depth(np.arange(n_layers), n_layers)
    assert np.flatnonzero(at < 1 / 3).tolist() == early
    assert np.flatnonzero(at > 2 / 3).tolist() == late
    assert deepest_early_layer(n_layers) == early[-1]


# ---- signs and subsets ----


def test_effects_take_the_sign_of_te_on_discover() -> None:
    table = shifted(effect_table(), "test", te=-1, nie0=-1)
    flipped = table.assign(te=-table.te, nie0=-table.nie0, nie1=-table.nie1, treatment="T1")
    made = signed(pd.concat([table, flipped], ignore_index=True))
    for name in ("T1", "T2"):
        part = made[made.treatment == name]
        assert (part.loc[part.split == "discover", "te"] > 0).all()
        assert (part.loc[part.split == "test", "te"] < 0).all()  # not its own sign
        np.testing.assert_allclose(part[["te", "nie0", "nie1"]], table[["te", "nie0", "nie1"]])
        np.testing.assert_allclose(part.nie, (table.nie0 + table.nie1) / 2)
        np.testing.assert_allclose(part[["y00", "y11"]], table[["y00", "y11"]])


def test_every_outcome_has_its_own_sign() -> None:
    table = effect_table()
    other = table.assign(te=-table.te, nie0=-table.nie0, outcome="Y2")
    made = signed(pd.concat([table, other], ignore_index=True))
    assert (made.te > 0).all()
    np.testing.assert_allclose(made.loc[made.outcome == "Y2", "nie1"], -table.nie1)


def test_a_sign_needs_the_discover_split() -> None:
    table = effect_table()
    with pytest.raises(InputError, match="T2 has no pair in the discover split, which fixes its sign"):
        signed(table[table.split != "discover"])


def test_unsaturated_pairs() -> None:
    bound = np.log(0.98 / 0.02)
    y = {"a": (-bound + 0.01, 0), "b": (-bound - 0.01, 0), "c": (0, bound + 0.01), "d": (0.5, bound - 0.01)}
    rows = [(name, layer, "Y1", *cells) for name, cells in y.items() for layer in (0, 1)]
    rows += [(name, 0, "Y2", 100.0, 100.0) for name in y]
    table = pd.DataFrame(rows, columns=["pair_id", "layer", "outcome", "y00", "y11"])
    assert summaries.unsaturated_ids(table) == {"a", "d"}
    assert summaries.unsaturated_ids(table[::-1]) == {"a", "d"}


# ---- shares ----


def test_known_shares() -> None:
    table = signed(effect_table())
    total = sum(LATE_MLP.values())
    late, mlp = summaries.late_share(table, N_LAYERS), summaries.mlp_share(table)
    for found, share in ((late, 4.0 / total), (mlp, 3.6 / total)):
        np.testing.assert_allclose([found.estimate, found.low, found.high], [[share]] * 3, atol=1e-9)
        assert found.n_clusters == 15


def test_shares_sum_the_test_pairs_effects() -> None:
    table = signed(effect_table(noise=0.4, seed=3))
    found = summaries.late_share(table, N_LAYERS)
    # Topics have two pairs each, so that the clustered test is the plain one of topic means.
    topics = table[table.split == "discover"].groupby(["site", "layer", "topic"]).nie.mean().unstack("topic")
    chosen = topics.index[ttest_1samp(topics, 0, axis=1, alternative="greater").pvalue < 0.05]
    sums = table[table.split == "test"].groupby(["site", "layer"]).nie.sum()[chosen]
    assert found.estimate[0] == pytest.approx(sums[sums.index.get_level_values("layer") >= 4].sum() / sums.sum())
    assert found.low[0] < found.estimate[0] < found.high[0]
    assert 0.02 < found.high[0] - found.low[0] < 0.3
    assert found.low[0] < 0.8 < found.high[0]


@pytest.mark.parametrize("value", ["nie", "nie0", "nie1"])
def test_each_direction_has_its_own_share(value: str) -> None:
    table = signed(effect_table({("mlp_out", 5): (3.0, 1.0), ("attn_out", 0): (1.0, 2.0)}))
    known = {"nie": 2 / 3.5, "nie0": 3 / 4, "nie1": 1 / 3}[value]
    assert summaries.late_share(table, N_LAYERS, value).estimate[0] == pytest.approx(known)
    assert summaries.mlp_share(table, value).estimate[0] == pytest.approx(known)


def test_cells_are_chosen_on_discover_only() -> None:
    plain = {("mlp_out", 5): 3.0, ("attn_out", 0): 1.0, ("mlp_out", 1): 1.0, ("attn_out", 5): -1.0}
    table = signed(effect_table(plain))
    known = 3 / 5  # the negative cell takes no part
    assert summaries.late_share(table, N_LAYERS).estimate[0] == pytest.approx(known)
    flip = (table.split == "test") & table.site.isin(["mlp_out"]) & (table.layer == 1)
    turned = table.assign(nie=np.where(flip, -table.nie, table.nie))
    assert summaries.late_share(turned, N_LAYERS).estimate[0] == pytest.approx(3 / 3)  # 3 + 1 - 1
    lifted = table.assign(nie=np.where((table.split == "test") & (table.layer == 5), table.nie.abs(), table.nie))
    assert summaries.late_share(lifted, N_LAYERS).estimate[0] == pytest.approx(known)


def test_cells_that_are_noise_do_not_count() -> None:
    """Twelve cells of pure noise beside one of effect: with all positive means in it the share would be far off."""
    shares, naive = [], []
    for seed in range(20):
        table = signed(effect_table({("mlp_out", 5): 0.6}, noise=1.0, seed=seed))
        shares.append(summaries.late_share(table, N_LAYERS).estimate[0])
        positive = table[table.split == "discover"].groupby(["site", "layer"]).nie.mean() > 0
        means = table[table.split == "test"].groupby(["site", "layer"]).nie.mean()[positive]
        naive.append(means[means.index.get_level_values("layer") >= 4].sum() / means.sum())
    assert np.median(np.abs(np.array(shares) - 1)) < np.median(np.abs(np.array(naive) - 1))


def test_the_validate_split_and_the_order_of_rows_do_not_matter() -> None:
    table = effect_table(noise=0.5, seed=5)
    other = shifted(table, "validate", te=-9, nie0=7, nie1=-3).sample(frac=1, random_state=0)
    first, second = (summaries.late_share(signed(one), N_LAYERS) for one in (table, other))
    np.testing.assert_allclose([first.estimate, first.low, first.high], [second.estimate, second.low, second.high])


def test_normalised_shares() -> None:
    table = signed(effect_table())
    index = pd.MultiIndex.from_product([COMPONENTS, range(N_LAYERS)], names=["site", "layer"])
    scale = pd.Series(np.where(index.get_level_values(0) == "mlp_out", 4.0, 1.0), index=index)
    found = summaries.mlp_share(table, scale=scale.sample(frac=1, random_state=1))
    assert found.estimate[0] == pytest.approx((3.6 / 4) / (3.6 / 4 + 1.4))
    scale[("mlp_out", 0)] = 0.4
    assert summaries.mlp_share(table, scale=scale).estimate[0] == pytest.approx(
        (3 / 4 + 0.6 / 0.4) / (3 / 4 + 0.6 / 0.4 + 1.4)
    )


def test_a_component_that_never_differs_has_a_patch_of_length_0() -> None:
    index = pd.MultiIndex.from_product([COMPONENTS, range(N_LAYERS)], names=["site", "layer"])
    scale = pd.Series(np.where(index.get_level_values(1) == 2, 0.0, 2.0), index=index)
    found = summaries.mlp_share(signed(effect_table()), scale=scale)
    assert found.estimate[0] == pytest.approx(3.6 / 5)


def test_no_share_where_nothing_is_positive() -> None:
    assert summaries.late_share(signed(effect_table({})), N_LAYERS) is None
    assert summaries.mlp_share(signed(effect_table({("mlp_out", 3): -1.0}))) is None


# ---- centroids ----


def test_centroids_by_hand() -> None:
    harm = signed(effect_table({("mlp_out", 5): 3.0, ("attn_out", 3): 1.0, ("mlp_out", 0): -2.0}))
    first = benign_tables(1, {("mlp_out", 2): 2.0, ("attn_out", 3): 2.0})
    second = benign_tables(2, {("attn_out", 1): 5.0})
    benign = signed(pd.concat([first, second[second.treatment == "B2"]], ignore_index=True))
    found, n_pairs, names = summaries.centroids(harm, benign, N_LAYERS)
    assert names == ["T2", "B1", "B2"]
    assert n_pairs == 30
    own = [(3 * 5.5 + 3.5) / 4 / 6, 3 / 6, 1.5 / 6]
    np.testing.assert_allclose(found.estimate, [own[0] - (own[1] + own[2]) / 2, *own])
    np.testing.assert_allclose(found.low, found.high, atol=1e-9)


def test_the_centroid_difference_has_an_interval() -> None:
    harm, benign = signed(effect_table(noise=1.0)), signed(benign_tables(noise=1.0))
    found, _, _ = summaries.centroids(harm, benign, N_LAYERS)
    known = (3 * 5.5 + 4.5 + 0.6 * 0.5 + 0.4 * 1.5) / 5 / 6 - 3 / 6
    assert found.low[0] < known < found.high[0]
    assert 0.01 < found.high[0] - found.low[0] < 0.2
    # Harm and benign topics are drawn apart, so the errors of independent parts add up in squares.
    own = np.sqrt(found.se[1] ** 2 + (found.se[2:] ** 2).sum() / 36)
    assert found.se[0] == pytest.approx(own, rel=0.5)


def test_benign_behaviours_must_pass_the_gate_on_discover() -> None:
    weak = effect_table(te=0.4, treatment="B7", topics="benign")
    late = shifted(effect_table(te=0.4, treatment="B8", topics="benign"), "test", te=10)
    negative = effect_table({("mlp_out", 2): -0.4}, te=-0.6, treatment="B9", topics="benign")
    table = pd.concat([effect_table(), benign_tables(2), weak, late, negative], ignore_index=True)
    assert sorted(layers.usable_benign(table).treatment.unique()) == ["B1", "B2", "B9"]
    assert layers.usable_benign(effect_table()).empty
