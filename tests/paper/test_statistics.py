"""Means, paired intervals and rank correlations against SciPy and NumPy."""

import math

import numpy as np
import pytest
from scipy import stats

from convnorm_jax.paper import statistics


def test_the_paired_interval_is_scipys():
    random = np.random.default_rng(0)
    first, second = random.normal(50, 3, 5), random.normal(48, 3, 5)
    found = statistics.paired_difference(dict(enumerate(first)), dict(enumerate(second)))
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.mean, found.count) == (pytest.approx((first - second).mean()), 5)
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-12)


def test_only_common_seeds_are_paired():
    found = statistics.paired_difference({0: 1.0, 1: 5.0, 2: 9.0}, {2: 8.0, 0: 2.0, 7: 100.0})
    assert (found.mean, found.count) == (0.0, 2)
    one = statistics.paired_difference({0: 1.0}, {0: 3.0})
    assert (one.mean, one.count, one.sign) == (-2.0, 1, 0) and math.isnan(one.low)
    assert statistics.paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(('shift', 'sign'), [(5, 1), (-5, -1), (0, 0)])
def test_the_sign_needs_an_interval_without_zero(shift, sign):
    values = {0: 1.0, 1: -1.0, 2: 0.5}
    found = statistics.paired_difference(
        {seed: value + shift for seed, value in values.items()}, dict.fromkeys(values, 0.0)
    )
    assert found.sign == sign


def test_mean_and_deviation():
    found = statistics.mean({0: 1.0, 3: 2.0, 4: 6.0})
    assert (found.mean, found.deviation, found.count) == (3.0, pytest.approx(np.std([1, 2, 6], ddof=1)), 3)
    assert math.isnan(statistics.mean({0: 1.0}).deviation)


def test_the_rank_correlation_is_that_of_the_ranks():
    first, second = np.random.default_rng(1).normal(size=(2, 7))
    ranks = [stats.rankdata(values) for values in (first, second)]
    found = statistics.rank_correlation(list(zip(first, second)))
    assert (found.correlation, found.count) == (pytest.approx(np.corrcoef(*ranks)[0, 1]), 7)
    assert statistics.rank_correlation([(1, 2), (2, 3)]) is None
    assert statistics.rank_correlation([(1, 2), (1, 3), (1, 4)]) is None
