"""Intervals over seeds, next to scipy's tests and the printed table of Student's t."""

import math

import pytest
from scipy.stats import ttest_1samp, ttest_rel

from inlay.study.statistics import mean_interval, paired_interval

SCORES, BEST = [0.81, 0.79, 0.85, 0.80, 0.83], [0.84, 0.83, 0.86, 0.82, 0.83]


def test_a_mean_has_the_interval_of_the_t_test():
    mean, low, high = mean_interval(SCORES)
    wanted = ttest_1samp(SCORES, 0).confidence_interval(0.95)
    assert mean == pytest.approx(0.816) and (low, high) == pytest.approx((wanted.low, wanted.high))


def test_by_hand():
    """The table of t says 12.706 for one degree of freedom and 2.776 for four, at 97.5 %."""
    assert mean_interval([1.0, 3.0]) == pytest.approx((2, 2 - 12.706, 2 + 12.706), rel=1e-4)
    _, low, high = mean_interval([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert high == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3) and low == -high


def test_a_difference_is_paired_by_seed():
    mean, low, high = paired_interval([score - best for score, best in zip(SCORES, BEST, strict=True)])
    wanted = ttest_rel(SCORES, BEST).confidence_interval(0.95)
    assert mean == pytest.approx(-0.02) and (low, high) == pytest.approx((wanted.low, wanted.high))


def test_one_seed_has_no_interval():
    mean, low, high = mean_interval([0.5])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)
