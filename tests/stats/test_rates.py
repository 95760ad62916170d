"""Paired changes, their limits where nothing was seen, refits, and what n detects."""

import numpy as np
import pytest
from scipy import stats as st

from companion.base.errors import InputError
from companion.stats import rates


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
    # 30 topics of ten prompts each that change together: the limits of 300 free prompts would be far too narrow.
    topic, before = np.repeat(np.arange(30), 10), np.zeros(300, dtype=bool)
    after = topic < 15
    clustered, free = rates.rate_change(before, after, topic), rates.rate_change(before, after, np.arange(300))
    assert clustered.estimate == free.estimate == 50
    assert clustered.high - clustered.low > 2 * (free.high - free.low)
    assert clustered.n_topics == 30


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
