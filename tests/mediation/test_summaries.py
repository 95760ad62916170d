"""Shares, centroids, increments and means per cell against numbers known by hand."""

import numpy as np
import pandas as pd
import pytest
from rows import N_LAYERS, benign_tables, effect_table, scales, shifted
from scipy.stats import ttest_1samp

from companion.base.errors import InputError
from companion.base.thresholds import deepest_early_layer, depth
from companion.mediation import summaries
from companion.mediation.summaries import averaged, signed
from companion.stats.bootstrap import Quantity

LIMITS = ["estimate", "low", "high"]


def by_cell(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_index(["site", "layer"])


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
    found = summaries.late_share(table, N_LAYERS).estimates()
    # Topics have two pairs each, so that the clustered test is the plain one of topic means.
    topics = table[table.split == "discover"].groupby(["site", "layer", "topic"]).nie.mean().unstack("topic")
    chosen = topics.index[ttest_1samp(topics, 0, axis=1, alternative="greater").pvalue < 0.05]
    sums = table[table.split == "test"].groupby(["site", "layer"]).nie.sum()[chosen]
    assert found.estimate[0] == pytest.approx(sums[sums.index.get_level_values("layer") >= 4].sum() / sums.sum())
    assert found.low[0] < min(found.estimate[0], 0.8) and max(found.estimate[0], 0.8) < found.high[0]
    assert 0.02 < found.high[0] - found.low[0] < 0.3
    # Neither the validate split nor the order of rows matters.
    other = shifted(effect_table(noise=0.4, seed=3), "validate", te=-9, nie0=7, nie1=-3).sample(frac=1, random_state=0)
    again = summaries.late_share(signed(other), N_LAYERS).estimates()
    np.testing.assert_allclose([found.estimate, found.low, found.high], [again.estimate, again.low, again.high])


def estimate(share: Quantity) -> float:
    return share.estimates().estimate[0]


@pytest.mark.parametrize(("value", "known"), [("nie", 2 / 3.5), ("nie0", 3 / 4), ("nie1", 1 / 3)])
def test_each_direction_has_its_own_share(value: str, known: float) -> None:
    table = signed(effect_table({("mlp_out", 5): (3.0, 1.0), ("attn_out", 0): (1.0, 2.0)}))
    assert estimate(summaries.late_share(table, N_LAYERS, value)) == pytest.approx(known)
    assert estimate(summaries.mlp_share(table, value)) == pytest.approx(known)
    for cells in ({}, {("mlp_out", 3): -1.0}):  # nothing is positive
        assert summaries.late_share(signed(effect_table(cells)), N_LAYERS, value) is None


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
    frame = by_cell(summaries.share_of_te(table))
    sums = table.groupby(["site", "layer"]).nie.sum() / table.drop_duplicates("pair_id").te.sum()
    np.testing.assert_allclose(frame.estimate, sums[frame.index])
    exact = by_cell(summaries.share_of_te(averaged(effect_table(spread=0.8))))
    np.testing.assert_allclose(exact.loc[[("mlp_out", 5)], LIMITS], 3 / 4)
    two_ways = averaged(effect_table({("mlp_out", 5): (3.0, 1.0)}))
    for value, known in (("nie0", 0.75), ("nie1", 0.25)):
        assert by_cell(summaries.share_of_te(two_ways, value)).estimate[("mlp_out", 5)] == pytest.approx(known)


def test_te_weighted_shares_are_a_slope() -> None:
    rng = np.random.default_rng(0)
    pairs = pd.DataFrame({"pair_id": range(60), "topic": np.arange(60) // 2, "te": rng.normal(size=60)})
    nies = {"nie0": 0.4 * pairs.te + rng.normal(size=60), "nie1": 0.8 * pairs.te}
    noisy = averaged(pairs.assign(site="resid_post", layer=0, **nies))
    slope = np.linalg.lstsq(noisy[["te"]].to_numpy(), noisy.nie.to_numpy(), rcond=None)[0][0]
    assert summaries.share_of_te(summaries.te_weighted(noisy)).estimate[0] == pytest.approx(slope)


def test_centroids_by_hand() -> None:
    harm = signed(effect_table({("mlp_out", 5): 3.0, ("attn_out", 3): 1.0, ("mlp_out", 0): -2.0}))
    first = benign_tables(1, {("mlp_out", 2): 2.0, ("attn_out", 3): 2.0})
    second = benign_tables(2, {("attn_out", 1): 5.0})
    benign = signed(pd.concat([first, second[second.treatment == "B2"]], ignore_index=True))
    found, names = summaries.centroids(harm, benign, N_LAYERS)
    assert names == ["T2", "B1", "B2"]
    own = [(3 * 5.5 + 3.5) / 4 / 6, 3 / 6, 1.5 / 6]
    np.testing.assert_allclose(found.estimate, [own[0] - (own[1] + own[2]) / 2, *own])
    np.testing.assert_allclose(found.low, found.high, atol=1e-9)


def test_the_centroid_difference_has_an_interval() -> None:
    harm, benign = signed(effect_table(noise=1.0)), signed(benign_tables(noise=1.0))
    found, _ = summaries.centroids(harm, benign, N_LAYERS)
    known = (3 * 5.5 + 4.5 + 0.6 * 0.5 + 0.4 * 1.5) / 5 / 6 - 3 / 6
    assert found.low[0] < known < found.high[0] and 0.01 < found.high[0] - found.low[0] < 0.2
    # Harm and benign topics are drawn apart, so the errors of independent parts add up in squares.
    own = np.sqrt(found.se[1] ** 2 + (found.se[2:] ** 2).sum() / 36)
    assert found.se[0] == pytest.approx(own, rel=0.5)


def test_cell_means_are_means_over_all_pairs_given() -> None:
    table = averaged(effect_table(noise=0.5))
    frame = by_cell(summaries.cell_means(table))
    assert len(frame) == 2 * N_LAYERS
    np.testing.assert_allclose(frame.estimate, table.groupby(["site", "layer"]).nie.mean()[frame.index])
    assert (frame[["low", "band_low"]].max(axis=1) < frame.estimate).all()
    assert (frame[["high", "band_high"]].min(axis=1) > frame.estimate).all()
    # The band holds all cells together, so it is wider than the intervals of single ones.
    assert ((frame.band_high - frame.band_low) > (frame.high - frame.low)).all()
    wide = summaries.cell_means(table, "te", by=["split"])
    np.testing.assert_allclose(wide.estimate, table.groupby("split").te.mean()[wide.split])
