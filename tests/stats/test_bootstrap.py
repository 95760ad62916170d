"""Intervals: against scipy, hand-computed values, and simulations of their coverage on data whose truth is known."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as st

from companion.base.errors import InputError
from companion.stats import bootstrap
from companion.stats.clusters import ClusterSums, cluster_sums, contrast, mean, ratio


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


def test_bca_agrees_with_scipy_when_every_row_is_a_cluster():
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


def test_strata_agree_with_scipy_for_two_independent_samples():
    rng = np.random.default_rng(1)
    x, y = rng.lognormal(size=50), 2 * rng.lognormal(size=12)
    strata = np.repeat([0, 1], [50, 12])
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


@pytest.fixture(scope="module")
def skewed():
    """2,000 data sets as columns: log-normal cluster effects, 2 to 12 rows a cluster, noise; true mean and ratio."""
    rng = np.random.default_rng(10)
    sizes = np.broadcast_to(rng.permuted(np.arange(CLUSTERS) % 11 + 2)[:, None], (CLUSTERS, DATA_SETS))
    effect = rng.lognormal(0, LOG_SD, (CLUSTERS, DATA_SETS))
    other = 2 * effect**0.5 * rng.lognormal(0, LOG_SD / 2, (CLUSTERS, DATA_SETS))
    cluster = np.repeat(np.arange(CLUSTERS), sizes[:, 0])
    rows = effect[cluster] + rng.normal(0, 0.5, (len(cluster), DATA_SETS))
    sums = np.stack([rows[cluster == g].sum(0) for g in range(CLUSTERS)])
    true_mean = np.exp(LOG_SD**2 / 2)
    return rows, sums, other * sizes, sizes, true_mean, true_mean / (2 * np.exp((LOG_SD / 2) ** 2))


def coverage(result: bootstrap.Estimates, truth: float) -> float:
    return ((result.low <= truth) & (truth <= result.high)).mean()


def test_coverage_for_skewed_clustered_data(skewed):
    # BCa is second-order accurate: with 36 skewed clusters its error of order 1/36 is still 2-3 points, no resampling
    # of 36 log-normal values shows their tail. 2,000 data sets that share 2,000 resamples add about 0.8 points.
    rows, sums, other, sizes, true_mean, true_ratio = skewed
    both = arrays(np.hstack([sums, other]), np.hstack([sizes, sizes]))
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


WRONG = [
    ([[1.0]], [0], mean, "1 clusters in strata of"), ([[1.0], [2.0], [3.0]], [0, 0, 1], mean, "at least 2 in each"),
    ([[1.0], [2.0]], [0, 0], lambda s, c: s[:, 0], "expected"),
    ([[1.0], [2.0]], [0, 0], lambda s, c: s / (s - s), "0/0 on the whole table"),
    ([[1.0], [np.nan]], [0, 0], mean, "0/0 on the whole table"),
]  # fmt: skip


@pytest.mark.parametrize(("sums", "strata", "statistic", "message"), WRONG)
def test_wrong_bootstraps(sums, strata, statistic, message):
    with pytest.raises(InputError, match=message):
        bootstrap.bootstrap(arrays(sums, strata=strata), statistic)
