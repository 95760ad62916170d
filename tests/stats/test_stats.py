"""Sums, tests, intervals, rates: against other libraries, hand-computed values, and simulations whose truth is known."""

import itertools

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats as st

from companion.base.errors import InputError
from companion.stats import bootstrap, rates
from companion.stats.clusters import ClusterSums, cluster_sums, clustered_t, contrast, mean, ratio

# ---- bootstrap ----


def arrays(sums, counts=None, strata=None) -> ClusterSums:
    """Cluster sums without a table; one row per cluster and cell unless counts are given."""
    sums = np.asarray(sums, dtype=float)
    counts = np.broadcast_to(1 if counts is None else counts, sums.shape).astype(float)
    strata = np.zeros(len(sums), dtype=int) if strata is None else np.asarray(strata)
    return ClusterSums(sums, counts, pd.DataFrame({"cell": range(sums.shape[1])}), pd.RangeIndex(len(sums)), strata)


def agrees(ours: bootstrap.Estimates, theirs, data) -> float:
    """Assert that the limits are those of scipy; returns the tolerance."""
    there = st.bootstrap(data, theirs, n_resamples=20_000, paired=len(set(map(len, data))) == 1, vectorized=True, rng=1)
    # A 2.5 % quantile of 20,000 draws has a Monte-Carlo error of 0.019 sd; two of them, four sigma.
    tolerance = 0.11 * there.standard_error
    assert abs(ours.low[0] - there.confidence_interval.low) < tolerance
    assert abs(ours.high[0] - there.confidence_interval.high) < tolerance
    return tolerance


def test_bca_agrees_with_scipy_when_every_row_is_a_cluster_and_for_strata():
    rng = np.random.default_rng(0)
    x, y = rng.lognormal(sigma=1.2, size=30), rng.lognormal(sigma=0.3, size=30)
    sums = arrays(np.stack([x, y, rng.permuted(y) + 0.01], 1))
    for ours, theirs in (
        (contrast([1, 0, 0]), lambda a, b, c, axis: a.mean(axis)),
        (ratio([1, 0, 0], [0, 1, 0]), lambda a, b, c, axis: a.sum(axis) / b.sum(axis)),
        # biased, so that the correction of bias shows
        (lambda s, c: s[:, 1:].max(1, keepdims=True), lambda a, b, c, axis: np.maximum(b.sum(axis), c.sum(axis))),
    ):
        here = bootstrap.bootstrap(sums, ours, n_boot=20_000, small_sample=False)
        tolerance = agrees(here, theirs, tuple(sums.sums.T))
        percentile = np.quantile(here.replicates[:, 0], 0.975)
        assert abs(here.high[0] - percentile) > 2 * tolerance, "data too symmetric to tell BCa from percentiles"

    # Strata: two independent samples.
    rng, strata = np.random.default_rng(1), np.repeat([0, 1], [50, 12])
    x, y = rng.lognormal(size=50), 2 * rng.lognormal(size=12)
    counts = np.eye(2)[strata]
    sums = arrays(np.concatenate([x, y])[:, None] * counts, counts, strata)
    ours = bootstrap.bootstrap(sums, contrast([1, -1]), n_boot=20_000, small_sample=False)
    agrees(ours, lambda a, b, axis: a.mean(axis) - b.mean(axis), (x, y))


@pytest.mark.parametrize("first", [8, 12])
def test_small_sample_quantile_is_that_of_the_strata_that_inform(first):
    # Only the first stratum has the cell, so its own number of clusters counts, not the total of 20.
    sums, counts = np.random.default_rng(1).normal(size=(20, 1)), np.ones((20, 1))
    sums[first:] = counts[first:] = 0
    clusters = arrays(sums, counts, np.repeat([0, 1], [first, 20 - first]))
    ours = bootstrap.bootstrap(clusters, mean)
    acceleration, *_ = bootstrap._shape(bootstrap._jackknife(clusters, mean), clusters.strata)
    z, ordered = st.t.isf(0.025, first - 1) * np.sqrt(first / (first - 1)), np.sort(ours.replicates, axis=0)
    limits = [bootstrap._bca_limit(ordered, ours.estimate, one, acceleration) for one in (-z, z)]
    np.testing.assert_allclose([ours.low, ours.high], limits)


def test_jackknife_in_closed_form_equals_leaving_clusters_out():
    rng, values = np.random.default_rng(2), np.empty(9)
    sums, counts, strata = rng.normal(3, 1, (9, 2)), rng.integers(1, 5, (9, 2)), np.repeat([0, 1], [5, 4])
    influence = bootstrap._jackknife(arrays(sums, counts, strata), ratio([1, 0], [0, 1]))[:, 0]
    for cluster in range(9):
        weight = np.where(strata == strata[cluster], 5 / 4 if cluster < 5 else 4 / 3, 1.0)
        weight[cluster] = 0
        s = (weight @ sums) / (weight @ counts)
        values[cluster] = s[0] / s[1]
    for stratum, n in ((0, 5), (1, 4)):
        own = values[strata == stratum]
        np.testing.assert_allclose(influence[strata == stratum], (n - 1) / n * (own.mean() - own))


def test_same_seed_and_strata_same_numbers_whatever_the_row_order(table):
    first = bootstrap.bootstrap(cluster_sums(table, "te"), mean, seed=5)
    again = bootstrap.bootstrap(cluster_sums(table.sample(frac=1, random_state=0), "te"), mean, seed=5)
    other = bootstrap.bootstrap(cluster_sums(table, "te"), mean, seed=6)
    np.testing.assert_array_equal(first.replicates, again.replicates)
    np.testing.assert_array_equal([first.low, first.high], [again.low, again.high])
    assert not np.array_equal(first.replicates, other.replicates)
    values = np.random.default_rng(0).lognormal(size=(20, 1))
    sums = arrays(values), arrays(values, strata=np.repeat([0, 1], 10)), arrays(values)
    one, two, same = (bootstrap.bootstrap(some, mean).replicates for some in sums)
    assert np.array_equal(one, same) and not np.array_equal(one, two)
    frame = first.to_frame(cluster_sums(table, "te").columns)
    assert list(frame) == ["value", "estimate", "low", "high", "n_clusters"] and frame.estimate.tolist() == [4.0]


def test_many_cells_in_blocks_equal_few_cells_and_their_standard_error_is_the_textbooks():
    sums = np.random.default_rng(6).normal(size=(12, 30_000))
    many, few = (bootstrap.bootstrap(arrays(some), lambda s, c: s[:, :3], n_boot=400) for some in (sums, sums[:, :3]))
    np.testing.assert_allclose(many.replicates, few.replicates, atol=1e-12)
    x = np.random.default_rng(3).normal(size=(30, 1))
    result = bootstrap.bootstrap(arrays(5 * x, 5), mean)
    np.testing.assert_allclose(result.se, x.std(ddof=1) / np.sqrt(30))
    np.testing.assert_allclose(result.replicates.std(), x.std() / np.sqrt(30), rtol=0.06)


def test_t_of_a_resample_is_the_t_statistic_of_its_clusters():
    strata, x = np.repeat([0, 1], [12, 8]), np.random.default_rng(7).normal(size=20)
    cells = np.eye(2)[strata]
    result = bootstrap.bootstrap(arrays(x[:, None] * cells, cells, strata), mean, n_boot=100)
    weights = bootstrap._weights(tuple(strata.tolist()), 100, 0).astype(int)
    for draw, stratum in itertools.product(range(0, 100, 9), (0, 1)):
        drawn = np.repeat(x, weights[draw] * (strata == stratum))
        expected = st.ttest_1samp(drawn, x[strata == stratum].mean()).statistic
        assert result.t[draw, stratum] == pytest.approx(expected)


def test_a_statistic_that_does_not_vary_has_no_width():
    # Constants without an exact binary form, whose sums round.
    sums = np.hstack([np.zeros((40, 1)), np.full((40, 9), np.linspace(0.1, 0.9, 9)), np.arange(40.0)[:, None]])
    sizes = np.arange(40)[:, None] % 7 + 1
    result = bootstrap.bootstrap(arrays(sums * sizes, sizes), mean)
    np.testing.assert_array_equal([result.low[:10], result.high[:10]], [result.estimate[:10]] * 2)
    assert not result.se[:10].any()
    assert result.low[10] < result.estimate[10] < result.high[10]
    band = np.array(bootstrap.max_t_band(result))
    np.testing.assert_array_equal(band[:, :10], [result.estimate[:10]] * 2)
    alone = bootstrap.max_t_band(bootstrap.bootstrap(arrays(sums[:, 10:] * sizes, sizes), mean))
    np.testing.assert_allclose(band[:, 10:], alone)


def test_undefined_resamples_are_reported_and_spoil_nothing_else():
    sums, counts = np.random.default_rng(7).normal(size=(30, 2)), np.ones((30, 2))
    sums[2:, 0] = counts[2:, 0] = 0
    result = bootstrap.bootstrap(arrays(sums, counts), mean)
    # Both clusters with the cell are missed with probability (28 / 30) ** 30 = 0.126.
    assert 200 < (~np.isfinite(result.replicates)).sum(0)[0] < 310 and np.isfinite(result.replicates[:, 1]).all()
    assert (result.low[0], result.high[0]) == (-np.inf, np.inf)
    assert np.isfinite(result.estimate).all()
    alone = bootstrap.bootstrap(arrays(sums[:, 1:]), mean)
    np.testing.assert_allclose([result.low[1], result.high[1]], [alone.low[0], alone.high[0]])
    low, high = bootstrap.max_t_band(result)
    assert (low[0], high[0]) == (-np.inf, np.inf) and high[1:] == pytest.approx(bootstrap.max_t_band(alone)[1])


def test_cells_that_few_clusters_inform_do_not_widen_the_band_of_the_others():
    sums = np.random.default_rng(8).normal(size=(30, 25))
    sums[3:, :20] = np.linspace(0, 1, 20)
    low, high = bootstrap.max_t_band(bootstrap.bootstrap(arrays(sums), mean))
    assert (low[:20] == -np.inf).all() and (high[:20] == np.inf).all()
    alone = bootstrap.max_t_band(bootstrap.bootstrap(arrays(sums[:, 20:]), mean))
    np.testing.assert_allclose([low[20:], high[20:]], alone)


# ---- error rates on data whose truth is known ----

DATA_SETS, CLUSTERS, LOG_SD = 2000, 36, 0.5


def coverage(result: bootstrap.Estimates, truth: float) -> float:
    return ((result.low <= truth) & (truth <= result.high)).mean()


def test_coverage_for_skewed_clustered_data():
    """2,000 data sets as columns: log-normal cluster effects, 2 to 12 rows a cluster, noise."""
    rng = np.random.default_rng(10)
    sizes = np.broadcast_to(rng.permuted(np.arange(CLUSTERS) % 11 + 2)[:, None], (CLUSTERS, DATA_SETS))
    effect = rng.lognormal(0, LOG_SD, (CLUSTERS, DATA_SETS))
    other = 2 * effect**0.5 * rng.lognormal(0, LOG_SD / 2, (CLUSTERS, DATA_SETS))
    cluster = np.repeat(np.arange(CLUSTERS), sizes[:, 0])
    rows = effect[cluster] + rng.normal(0, 0.5, (len(cluster), DATA_SETS))
    sums = np.stack([rows[cluster == g].sum(0) for g in range(CLUSTERS)])
    true_mean = np.exp(LOG_SD**2 / 2)
    true_ratio = true_mean / (2 * np.exp((LOG_SD / 2) ** 2))
    # BCa is second-order accurate: with 36 skewed clusters its error of order 1/36 is still 2-3 points, no resampling
    # of 36 log-normal values shows their tail. 2,000 data sets that share 2,000 resamples add about 0.8 points.
    both = arrays(np.hstack([sums, other * sizes]), np.hstack([sizes, sizes]))
    ours = coverage(bootstrap.bootstrap(arrays(sums, sizes), mean), true_mean)
    assert 0.91 <= ours <= 0.97
    share = lambda s, c: s[:, :DATA_SETS] / s[:, DATA_SETS:]  # noqa: E731
    assert 0.91 <= coverage(bootstrap.bootstrap(both, share), true_ratio) <= 0.97
    textbook = bootstrap.bootstrap(arrays(sums, sizes), mean, small_sample=False)
    assert coverage(textbook, true_mean) + 0.008 < ours, "the small-sample quantile mends undercoverage"
    assert coverage(bootstrap.bootstrap(arrays(rows), mean), true_mean) < 0.75, "rows are not independent"


@pytest.mark.parametrize(("of_families", "one_way"), [(0.7, (0.3, 0.8)), (0.0, (0.92, 0.97))])
def test_two_crossed_samples_are_covered_and_topics_alone_are_not(of_families: float, one_way: tuple) -> None:
    """Thirty topics, each in three of six families, as in a prompt set; the truth is the mean over all topics and families."""
    rng, n = np.random.default_rng(13), 1000
    topic, place = np.divmod(np.arange(90), 3)
    family = (topic + 2 * place) % 6
    random = rng.normal(0, 1, (30, n)), of_families * rng.normal(0, 1, (6, n)), rng.normal(0, 1, (90, n))
    cells = random[0][topic] + random[1][family] + random[2]
    both = bootstrap.two_way(arrays(cells), mean, topic, family)
    by_topic = np.stack([cells[topic == t].sum(0) for t in range(30)])
    alone = bootstrap.bootstrap(arrays(by_topic, 3), mean, n_boot=1000)
    assert 0.93 <= coverage(both, 0.0) <= 0.99 and one_way[0] <= coverage(alone, 0.0) <= one_way[1]
    widths = [np.median(one.high - one.low) for one in (both, alone)]
    assert 1 < widths[0] / widths[1] < (2.5 if of_families else 1.6)
    one_family = bootstrap.two_way(arrays(cells), mean, topic, 0 * family)
    assert np.isinf(one_family.high).all() and np.isfinite(one_family.estimate).all()


@pytest.mark.parametrize("log_sd", [0.0, 0.5])
def test_band_covers_all_cells_together(log_sd):
    rng, held, pointwise, trials = np.random.default_rng(12), 0, 0, 300
    sizes = rng.integers(2, 13, (40, 1))
    for trial in range(trials):
        z = (rng.normal(size=(40, 1)) + rng.normal(size=(40, 32))) / np.sqrt(2)
        x = np.exp(log_sd * z) - np.exp(log_sd**2 / 2) if log_sd else z
        x[:, 0] = 0
        result = bootstrap.bootstrap(arrays(x * sizes, sizes), mean, n_boot=500, seed=trial)
        low, high = bootstrap.max_t_band(result)
        held += ((low <= 0) & (high >= 0)).all()
        pointwise += ((result.low <= 0) & (result.high >= 0)).all()
    # Three binomial standard errors of 300 trials are 3.8 points.
    assert 0.90 <= held / trials <= 0.99
    assert pointwise / trials < 0.65


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

    # A wide table keeps the order asked for.
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
    (lambda _: bootstrap.bootstrap(arrays([[1.0]]), mean), "1 clusters in strata of"),
    (lambda _: bootstrap.bootstrap(arrays([[1.0]] * 3, strata=[0, 0, 1]), mean), "at least 2 in each"),
    (lambda _: bootstrap.bootstrap(arrays([[1.0], [2.0]]), lambda s, c: s[:, 0]), "expected"),
    (lambda _: bootstrap.bootstrap(arrays([[1.0], [2.0]]), lambda s, c: s / (s - s)), "0/0 on the whole table"),
    (lambda _: bootstrap.bootstrap(arrays([[1.0], [np.nan]]), mean), "0/0 on the whole table"),
    (lambda _: rates.with_refits(rates.Change(10.0, 8.0, 13.0, 100, 20), [1.0]), "1 refits"),
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


def test_topics_widen_a_rate_change_which_has_the_sign_of_after_minus_before() -> None:
    topic, before = np.repeat(np.arange(30), 10), np.zeros(300, dtype=bool)
    clustered, free = (rates.rate_change(before, topic < 15, one) for one in (topic, np.arange(300)))
    assert clustered.n_topics == 30 and clustered.high - clustered.low > 2 * (free.high - free.low)
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
