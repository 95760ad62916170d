"""Sums per topic and tests: against hand-computed values, other libraries, and simulations of their error rates."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats as st
from statsmodels.stats.multitest import multipletests

from companion.base.errors import InputError
from companion.stats.clusters import cluster_sums, clustered_t, contrast, mean, ratio, wilson


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
    np.testing.assert_array_equal([result.t, result.p], [[0, np.inf], [1, 0]])


def test_by_controls_false_discoveries():
    rng, shares, unadjusted, found = np.random.default_rng(16), [], [], []
    for _ in range(100):
        values, cluster = clustered_noise(rng, 400)
        values += rng.normal(size=(36, 1))[cluster]  # dependent tests: one more effect that all cells share
        values[:, :40] += 1.5
        p = clustered_t(values, cluster).p
        adjusted = multipletests(p, method="fdr_by")[1]  # as for neurons
        for chosen, out in ((adjusted <= 0.05, shares), (p <= 0.05, unadjusted)):
            out.append(chosen[40:].sum() / max(1, chosen.sum()))
        found.append((adjusted[:40] <= 0.05).mean())
    assert np.mean(shares) <= 0.05 and np.mean(unadjusted) > 0.15 and np.mean(found) > 0.5


WRONG = [
    (lambda t: cluster_sums(t[:0], "te"), "no rows"),
    (lambda t: cluster_sums(t.assign(topic=[None, *t.topic[1:]]), "te"), "without a topic"),
    (lambda t: cluster_sums(t.assign(te=[np.nan, *t.te[1:]]), "te"), "1 of 7 entries of 'te' are not finite"),
    (lambda t: cluster_sums(t.assign(te=[np.inf, *t.te[1:]]), "te"), "1 of 7 entries of 'te' are not finite"),
    (lambda t: cluster_sums(t.assign(te="high"), "te"), "7 of 7 entries of 'te' are not finite"),
    (lambda _: clustered_t(np.zeros(4), np.arange(4)), r"expected \[row, cell\]"),
    (lambda _: clustered_t(np.zeros((4, 2)), np.arange(3)), r"expected \[row, cell\]"),
    (lambda _: clustered_t(np.full((4, 2), np.nan), np.arange(4)), "missing or infinite"),
    (lambda _: clustered_t(np.zeros((4, 2)), np.zeros(4)), "at least 2"),
    (lambda _: wilson(5, 4), "0 <= successes <= n"), (lambda _: wilson(0, 0), "n > 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_tables_and_calls(table, call, message):
    with pytest.raises(InputError, match=message):
        call(table)
