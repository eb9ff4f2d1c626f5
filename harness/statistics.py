"""Statistics of several seeds: the mean with its confidence interval, and the difference between two means."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

Z = statistics.NormalDist().inv_cdf(0.975)  # of a two-sided 95 % interval
POWER = statistics.NormalDist().inv_cdf(0.8)  # of finding a difference in four of five experiments


class Difference(NamedTuple):
    """The difference of two means, its 95 % interval, and the seeds each that would mostly distinguish it from 0."""

    mean: float
    low: float
    high: float
    seeds: float


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of two values or more, by Student's t."""
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """Return the difference of the means, `other` minus `one`, of two values or more each, by Welch's t-test."""
    mean = statistics.mean(other) - statistics.mean(one)
    variances = [statistics.variance(values) for values in (one, other)]
    if not any(variances):
        return Difference(mean, mean, mean, 2 if mean else math.inf)
    error, degrees = welch(variances, [len(one), len(other)])
    half = t_quantile(degrees) * error
    return Difference(mean, mean - half, mean + half, seeds_needed(mean, variances))


def welch(variances: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return the standard error of the difference of two means, and its degrees of freedom in Welch's t-test.

    variances, counts: of the two groups. Not both variances are 0.
    """
    squares = [variance / count for variance, count in zip(variances, counts, strict=True)]
    degrees = sum(squares) ** 2 / sum(square**2 / (count - 1) for square, count in zip(squares, counts, strict=True))
    return math.sqrt(sum(squares)), degrees


def t_quantile(degrees: float) -> float:
    """Return the 97.5 % quantile of Student's t, which a two-sided 95 % interval needs."""
    return float(stats.t.ppf(0.975, degrees))


def seeds_needed(mean: float, variances: Sequence[float]) -> float:
    """Return how many seeds each would distinguish a difference of this mean from 0 in four of five experiments.

    variances: of the two groups.
    """
    if abs(mean) < 1e-6:  # percent, so equal means but for rounding
        return math.inf
    # A few more are needed, as Student's t is larger than Z.
    count = max(2, math.ceil((Z + POWER) ** 2 * sum(variances) / mean**2))
    while True:
        error, degrees = welch(variances, [count, count])
        if (t_quantile(degrees) + POWER) * error <= abs(mean):
            return count
        count += 1
