"""Sums per topic, tests and rates: against hand-computed values, other libraries, and simulations of their error rates."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats as st

from companion.base.errors import InputError
from companion.stats import rates
from companion.stats.clusters import cluster_sums, clustered_t, contrast, mean, ratio

# ---- clusters ----


def test_cluster_sums_of_a_long_table(table):
    result = cluster_sums(table, "te", by=["treatment", "layer"], strata="treatment")
    assert list(result.clusters) == ["a", "b", "c", "x", "y"]
    assert result.columns.values.tolist() == [["te", "B1", 0], ["te", "B1", 1], ["te", "T2", 0], ["te", "T2", 1]]
    expected = [[0, 0, 1, 2], [0, 0, 3, 0], [0, 0, 0, 4], [5, 0, 0, 0], [6, 7, 0, 0]]
    np.testing.assert_array_equal(result.sums, expected)
    np.testing.assert_array_equal(result.counts, np.array(expected) > 0)
    assert result.strata[0] == result.strata[1] == result.strata[2] != result.strata[3] == result.strata[4]
    both = pd.concat([table, table[table.topic == "a"].assign(treatment="B1")])  # topic a now serves two treatments
    strata = cluster_sums(both, "te", strata="treatment").strata
    assert len(set(strata)) == 3 and strata[1] == strata[2] != strata[0]


def test_cluster_sums_of_a_wide_table_keep_the_order_asked_for(table):
    result = cluster_sums(table.assign(harm=table["te"] > 3), ["te", "nie", "harm"])
    assert result.columns["value"].tolist() == ["te", "nie", "harm"]
    np.testing.assert_allclose(result.sums[:2], [[3, 0.3, 0], [3, 0.3, 0]])
    np.testing.assert_array_equal(result.sums[:, 2], [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(result.counts[:, 0], [2, 1, 1, 1, 2])


def test_statistics_by_hand():
    sums, counts = np.array([[6.0, 2.0, 5.0]]), np.array([[3.0, 4.0, 1.0]])
    np.testing.assert_allclose(mean(sums, counts), [[2, 0.5, 5]])
    np.testing.assert_allclose(contrast([[1, -1, 0], [0, 0, 2]])(sums, counts), [[1.5, 10]])
    np.testing.assert_allclose(ratio([0, 0, 1], [1, 1, 1])(sums, counts), [[5 / 7.5]])
    # An empty cell spoils the statistics that use it and no other.
    value = contrast([[1, 0], [0, 1]])(np.array([[6.0, 0.0]]), np.array([[3.0, 0.0]]))
    np.testing.assert_array_equal(value, [[2, np.nan]])


def clustered_noise(rng, n_cells, n_clusters=36):
    sizes = np.arange(n_clusters) % 6 + 3
    cluster = np.repeat(np.arange(n_clusters), sizes)
    return rng.normal(size=(n_clusters, n_cells))[cluster] + rng.normal(size=(sizes.sum(), n_cells)), cluster


def test_clustered_t_agrees_with_statsmodels():
    values, cluster = clustered_noise(np.random.default_rng(14), 3)
    ours = clustered_t(values + 0.2, np.array([f"topic {c}" for c in cluster]))
    for cell in range(3):
        model = sm.OLS(values[:, cell] + 0.2, np.ones(len(values)))
        theirs = model.fit(cov_type="cluster", cov_kwds={"groups": cluster}, use_t=True)
        assert ours.mean[cell] == pytest.approx(theirs.params[0])
        assert ours.se[cell] == pytest.approx(theirs.bse[0])
        assert ours.p[cell] == pytest.approx(theirs.pvalues[0])
    assert ours.df == 35


def test_clustered_t_has_its_size_and_the_naive_test_has_not():
    values, cluster = clustered_noise(np.random.default_rng(15), 20_000)
    assert 0.04 < (clustered_t(values, cluster).p < 0.05).mean() < 0.065
    assert (st.ttest_1samp(values, 0).pvalue < 0.05).mean() > 0.25
    # Cells that do not vary.
    result = clustered_t(np.tile([0.0, 2.0], (6, 1)), np.repeat([0, 1, 2], 2))
    assert result.p.tolist() == [1, 0]


WRONG = [
    (lambda t: cluster_sums(t[:0], "te"), "no rows"),
    (lambda t: cluster_sums(t.assign(topic=[None, *t.topic[1:]]), "te"), "without a topic"),
    (lambda t: cluster_sums(t.assign(te=[np.inf, *t.te[1:]]), "te"), "1 of 7 entries of 'te' are not finite"),
    (lambda t: cluster_sums(t.assign(te="high"), "te"), "7 of 7 entries of 'te' are not finite"),
    (lambda _: clustered_t(np.full((4, 2), np.nan), np.arange(4)), "missing or infinite"),
    (lambda _: clustered_t(np.zeros((4, 2)), np.zeros(4)), "at least 2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_tables_and_calls(table, call, message):
    with pytest.raises(InputError, match=message):
        call(table)


# ---- rates ----


def outcomes(both: int, only_after: int, only_before: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    sizes = [both, only_after, only_before, neither]
    return np.repeat([True, False, True, False], sizes), np.repeat([True, True, False, False], sizes)


def test_rows_of_a_topic_carry_no_more_than_the_topic() -> None:
    x = np.random.default_rng(4).normal(size=20)
    once = rates.mean_change(x, np.arange(20))
    thrice = rates.mean_change(np.repeat(x, 3), np.repeat(np.arange(20), 3))
    np.testing.assert_allclose([once.low, once.high], [thrice.low, thrice.high])
    as_if_independent = rates.mean_change(np.repeat(x, 3), np.arange(60))
    assert as_if_independent.high - as_if_independent.low < 0.7 * (thrice.high - thrice.low)
    alone = rates.mean_change(x, np.zeros(20))
    assert (alone.estimate, alone.low, alone.high) == (pytest.approx(x.mean()), -np.inf, np.inf)


def test_newcombes_own_example_and_nothing_seen_is_not_nothing_possible() -> None:
    # Newcombe (1998), table III: 36, 12, 2, 0; method 10 gives 0.0569 to 0.3404.
    assert rates.newcombe(*outcomes(36, 12, 2, 0)) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    change = rates.rate_change(*outcomes(0, 0, 0, 300), np.arange(300))
    assert change.estimate == 0 and change.low < -1 and 1 < change.high < 2


def test_topics_widen_a_rate_change() -> None:
    topic, before = np.repeat(np.arange(30), 10), np.zeros(300, dtype=bool)
    clustered, free = (rates.rate_change(before, topic < 15, one) for one in (topic, np.arange(300)))
    assert clustered.n_topics == 30 and clustered.high - clustered.low > 2 * (free.high - free.low)


def test_a_change_has_the_sign_of_after_minus_before() -> None:
    change = rates.rate_change(*outcomes(50, 5, 45, 0), np.arange(100))
    assert change.estimate == -40 and change.high < 0
    assert change.p == pytest.approx(2 * st.binom.cdf(5, 50, 0.5))
    assert rates.rate_change(*outcomes(10, 1, 7, 5), np.arange(23)).p == pytest.approx(2 * (1 + 8) / 2**8)
    assert rates.rate_change(*outcomes(10, 0, 0, 5), np.arange(15)).p == 1


def test_refits_add_their_variance() -> None:
    change = rates.Change(10.0, 8.0, 13.0, 100, 20)
    wide, more = rates.with_refits(change, [9.0, 11.0]), 1.959964 * np.sqrt(2)
    assert (wide.low, wide.high) == pytest.approx((10 - np.hypot(2, more), 10 + np.hypot(3, more)))
    same = rates.with_refits(change, [10.0, 10.0])
    assert (same.low, same.high) == (8.0, 13.0)
    with pytest.raises(InputError, match="1 refits"):
        rates.with_refits(change, [1.0])


def test_holm_leaves_out_what_was_not_tested_and_a_rank_counts_the_effect_itself_and_a_tie_against_it() -> None:
    assert rates.holm([0.01, np.nan, 0.04]) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)
    assert [rates.rank_p(effect, np.zeros(100)) for effect in (5.0, -1.0, 0.0)] == pytest.approx([1 / 101, 1, 1])


def test_what_n_detects_is_seen_that_often() -> None:
    rng, topic = np.random.default_rng(0), np.repeat(np.arange(40), 5)
    noise = rng.normal(size=(2000, 200))
    size = rates.detectable(noise[0], topic)
    # 2.87 standard errors of the mean of 200: the textbook value for 80 %
    assert size == pytest.approx(0.2 * 2.87 / np.sqrt(40) * np.sqrt(5), rel=0.3)
    means = (noise + size).reshape(2000, 40, 5).mean(2)
    assert 0.6 < (st.ttest_1samp(means, 0, axis=1).pvalue < 0.05).mean() < 0.95
    assert np.isnan(rates.detectable(np.zeros(200), topic))

    # A ratio of means is no mean of ratios.
    top, bottom = np.array([1.0, 1.0, 9.0, 9.0]), np.array([1.0, 1.0, 3.0, 3.0])
    assert rates.ratio_change(top, bottom, np.array(["a", "b", "a", "b"])).estimate == pytest.approx(20 / 8)
