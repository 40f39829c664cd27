"""Intervals over seeds: of a mean, and of the mean difference of two methods that ran with the same seeds.

Each 95 % interval is of one mean by itself. Among many methods some differences exclude 0 by chance: 1 in 20 of those
that are none. The intervals are not widened for that, so that a row says the same whatever else was compared; who
needs one error rate for the whole table divides 5 % by the number of rows (Holm 1979, https://www.jstor.org/stable/4615733).
"""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student_t

LEVEL = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % t-interval; both ends are NaN for a single value.

    Source: Student 1908, https://doi.org/10.1093/biomet/6.1.1; `scipy.stats.t`.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    quantile = float(student_t.ppf((1 + LEVEL) / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """As `mean_interval`, of the differences of two methods, one for each seed that both ran with."""
    return mean_interval(differences)
