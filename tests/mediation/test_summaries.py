"""Summaries against numbers known by hand."""

import numpy as np
import pandas as pd
import pytest
from synthetic import LATE_MLP, N_LAYERS, benign_tables, effect_table

from companion.mediation import summaries
from companion.mediation.summaries import averaged, signed
from companion.stats import bootstrap, clusters


def by_cell(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_index(["site", "layer"])


def test_cell_means_are_means_over_all_pairs_given() -> None:
    table = averaged(effect_table(noise=0.5))
    frame = by_cell(summaries.cell_means(table))
    assert len(frame) == 2 * N_LAYERS
    means = table.groupby(["site", "layer"]).nie.mean()
    np.testing.assert_allclose(frame.estimate, means[frame.index])
    for column in ("low", "band_low"):
        assert (frame[column] < frame.estimate).all()
    for column in ("high", "band_high"):
        assert (frame[column] > frame.estimate).all()
    # The band holds all cells together, so it is wider than the intervals of single ones.
    assert ((frame.band_high - frame.band_low) > (frame.high - frame.low)).all()
    test = table[table.split == "test"]
    again = by_cell(summaries.cell_means(test))
    np.testing.assert_allclose(again.estimate, test.groupby(["site", "layer"]).nie.mean()[again.index])


def test_cells_that_are_zero_by_structure_take_no_part_in_the_band() -> None:
    frame = by_cell(summaries.cell_means(averaged(effect_table())))
    silent = frame.index.difference(pd.MultiIndex.from_tuples(LATE_MLP))
    assert (frame.loc[silent, ["estimate", "low", "high", "band_low", "band_high"]] == 0).all(axis=None)
    few = averaged(effect_table(n_layers=1, cells={("mlp_out", 0): 1.0, ("attn_out", 0): 0.5}))
    many = pd.concat([few, few.assign(layer=1, nie=0.0)], ignore_index=True)
    one, both = by_cell(summaries.cell_means(few)), by_cell(summaries.cell_means(many))
    np.testing.assert_allclose(one.band_high, both.band_high[one.index])


def test_cell_means_by_another_key_and_value() -> None:
    table = effect_table()
    frame = summaries.cell_means(table, "te", by=["split"])
    np.testing.assert_allclose(frame.estimate, table.groupby("split").te.mean()[frame.split])
    assert list(frame.columns[:4]) == ["split", "estimate", "low", "high"]


def test_per_group_bands_hold_within_a_group() -> None:
    parts = {name: averaged(effect_table(noise=0.5, treatment=name, seed=i)) for i, name in enumerate(("T2", "T1"))}
    frame = summaries.per_group(pd.concat(parts.values(), ignore_index=True), "treatment")
    assert list(dict.fromkeys(frame.treatment)) == ["T2", "T1"]
    for name, part in parts.items():
        columns = ["estimate", "low", "high", "band_low", "band_high"]
        alone = summaries.cell_means(part)
        np.testing.assert_allclose(frame.loc[frame.treatment == name, columns], alone[columns])


def test_share_of_te_is_a_ratio_of_sums() -> None:
    table = averaged(effect_table(noise=0.5, spread=0.8))
    frame = by_cell(summaries.share_of_te(table))
    total = table.drop_duplicates("pair_id").te.sum()
    sums = table.groupby(["site", "layer"]).nie.sum()
    np.testing.assert_allclose(frame.estimate, (sums / total)[frame.index])
    exact = by_cell(summaries.share_of_te(averaged(effect_table(spread=0.8))))
    np.testing.assert_allclose(exact.estimate[("mlp_out", 5)], 3 / 4)
    np.testing.assert_allclose(exact.low, exact.high, atol=1e-9)


@pytest.mark.parametrize("value", ["nie0", "nie1"])
def test_share_of_te_in_each_direction(value: str) -> None:
    table = averaged(effect_table({("mlp_out", 5): (3.0, 1.0)}))
    share = by_cell(summaries.share_of_te(table, value)).estimate[("mlp_out", 5)]
    assert share == pytest.approx({"nie0": 0.75, "nie1": 0.25}[value])


def curve() -> dict[tuple[str, int], float]:
    return {("resid_post", layer): value for layer, value in enumerate((0.0, 1.0, 1.0, 0.5, 3.0, 4.0))}


def test_increments_add_up_to_the_last_point() -> None:
    table = averaged(effect_table(curve(), sites=("resid_post",)))
    frame = summaries.increments(table)
    assert frame.layer.tolist() == list(range(6))
    np.testing.assert_allclose(frame.estimate, [0, 0.25, 0, -0.125, 0.625, 0.25], atol=1e-12)
    assert frame.estimate.sum() == pytest.approx(1)


def test_increments_have_paired_intervals() -> None:
    """Neighbouring layers share their pairs: the interval is that of the difference, not of two curves."""
    table = averaged(effect_table(curve(), sites=("resid_post",), noise=0.2, seed=1))
    frame = summaries.increments(table)
    wide = table.pivot(index=["topic", "pair_id", "te"], columns="layer", values="nie").reset_index()
    steps = wide.assign(step=wide[4] - wide[3])
    sums = clusters.cluster_sums(steps, ["step", "te"])
    wanted = bootstrap.bootstrap(sums, clusters.ratio([1, 0], [0, 1]))
    row = frame.loc[frame.layer == 4]
    np.testing.assert_allclose(
        row[["estimate", "low", "high"]], [[wanted.estimate[0], wanted.low[0], wanted.high[0]]], rtol=1e-6
    )


def test_te_weighted_shares_are_a_slope() -> None:
    rng = np.random.default_rng(0)
    pairs = pd.DataFrame(
        {"pair_id": [f"p{i}" for i in range(60)], "topic": [f"t{i // 2}" for i in range(60)], "te": rng.normal(size=60)}
    )
    table = pairs.assign(site="resid_post", layer=0, nie0=0.4 * pairs.te, nie1=0.8 * pairs.te)
    frame = summaries.share_of_te(summaries.te_weighted(averaged(table)))
    assert frame.estimate[0] == pytest.approx(0.6)
    noisy = averaged(table.assign(nie0=table.nie0 + rng.normal(size=60)))
    slope = np.linalg.lstsq(noisy[["te"]].to_numpy(), noisy.nie.to_numpy(), rcond=None)[0][0]
    assert summaries.share_of_te(summaries.te_weighted(noisy)).estimate[0] == pytest.approx(slope)


def test_harm_minus_benign_by_hand() -> None:
    harm = effect_table({("mlp_out", 5): 3.0, ("attn_out", 1): 1.0})
    first = benign_tables(1, {("mlp_out", 5): 1.0}, te=2.0)
    second = benign_tables(2, {("mlp_out", 5): -3.0, ("attn_out", 2): -1.0}, te=-3.0)
    benign = pd.concat([first, second[second.treatment == "B2"]], ignore_index=True)
    frame = summaries.harm_minus_benign(harm, benign).set_index(["contrast", "site", "layer"])
    assert len(frame) == 3 * 2 * N_LAYERS
    for cell, own, other in (
        (("mlp_out", 5), 3 / 4, (1 / 2 + 3 / 3) / 2),
        (("attn_out", 2), 0, (0 + 1 / 3) / 2),
        (("attn_out", 1), 1 / 4, 0),
    ):
        assert frame.estimate[("harm", *cell)] == pytest.approx(own)
        assert frame.estimate[("benign", *cell)] == pytest.approx(other)
        assert frame.estimate[("difference", *cell)] == pytest.approx(own - other)
    assert (frame.low <= frame.estimate + 1e-12).all()


def test_harm_minus_benign_rests_on_the_test_split() -> None:
    harm, benign = effect_table(noise=0.5), benign_tables(2, noise=0.5)
    moved = harm.assign(nie0=np.where(harm.split == "validate", 9.0, harm.nie0))
    columns = ["estimate", "low", "high"]
    first, second = (summaries.harm_minus_benign(one, benign)[columns] for one in (harm, moved))
    np.testing.assert_allclose(first, second)
    test = signed(harm)[harm.split == "test"]
    share = test.groupby(["site", "layer"]).nie.sum() / test.drop_duplicates("pair_id").te.sum()
    frame = summaries.harm_minus_benign(harm, benign)
    own = by_cell(frame[frame.contrast == "harm"])
    np.testing.assert_allclose(own.estimate, share[own.index])


def test_harm_minus_benign_with_a_topic_of_its_own() -> None:
    benign = benign_tables(3)
    benign = benign[~((benign.treatment == "B2") & (benign.topic == "benign 49"))]
    frame = summaries.harm_minus_benign(effect_table(), benign)
    assert np.isfinite(frame[["low", "high"]]).all(axis=None)


@pytest.mark.parametrize("make", [summaries.cell_means, summaries.share_of_te, summaries.increments])
def test_the_order_of_rows_does_not_matter(make) -> None:
    table = averaged(effect_table(curve(), sites=("resid_post",), noise=0.3))
    pd.testing.assert_frame_equal(make(table), make(table.sample(frac=1, random_state=2)), check_exact=False, rtol=1e-9)


def test_one_topic_gives_intervals_without_limits() -> None:
    table = averaged(effect_table(curve(), sites=("resid_post",)))
    table = table[table.topic == "topic 0"]
    for frame in (summaries.cell_means(table), summaries.share_of_te(table), summaries.increments(table)):
        limits = frame.filter(regex="low|high").to_numpy()
        assert np.isinf(limits).all()
        assert np.isfinite(frame.estimate).all()
    last = summaries.share_of_te(table).estimate.iloc[-1]
    assert last == pytest.approx(1)
