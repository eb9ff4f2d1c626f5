"""Statistics of several seeds: the mean with its confidence interval, and the difference between two means."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

Z = statistics.NormalDist().inv_cdf(0.975)  # of a two-sided 95 % interval
POWER = statistics.NormalDist().inv_cdf(0.8)  # of finding a difference in four of five experiments


class Difference(NamedTuple):
    """The difference of two means, its 95 % interval, and the seeds each that would mostly distinguish it from 0."""

    mean: float
    low: float
    high: float
    seeds: float


def t_quantile(degrees: float) -> float:
    """Return the 97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom, within 0.004 from 3 on.

    The series is Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5. Fractions come from Welch's test.
    """
    if degrees < 2:
        return math.tan(math.pi * 0.475) if degrees <= 1 else t_between(1, 2, degrees)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    if degrees < 3:
        return t_between(2, 3, degrees)
    powers = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + sum(term / degrees ** (i + 1) for i, term in enumerate(powers))


def t_between(low: int, high: int, degrees: float) -> float:
    """Return the quantile between two whole degrees of freedom, interpolated linearly in 1 / degrees."""
    share = (1 / low - 1 / degrees) / (1 / low - 1 / high)
    return (1 - share) * t_quantile(low) + share * t_quantile(high)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of two values or more, by Student's t."""
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """Return the difference of the means, `other` minus `one`, of two values or more each (Welch, 1947)."""
    mean = statistics.mean(other) - statistics.mean(one)
    errors = [statistics.variance(values) / len(values) for values in (one, other)]
    error = math.sqrt(sum(errors))
    if not error:
        return Difference(mean, mean, mean, 2 if mean else math.inf)
    terms = (e**2 / (len(values) - 1) for e, values in zip(errors, (one, other), strict=True))
    half = t_quantile(sum(errors) ** 2 / sum(terms)) * error
    return Difference(mean, mean - half, mean + half, seeds_needed(mean, [*map(statistics.variance, (one, other))]))


def seeds_needed(mean: float, variances: Sequence[float]) -> float:
    """Return how many seeds each would distinguish a difference of this mean from 0 in four of five experiments.

    variances: of the two groups.
    """
    if abs(mean) < 1e-6:  # percent, so equal means but for rounding
        return math.inf
    # A few more are needed, as Student's t is larger than Z.
    count = max(2, math.ceil((Z + POWER) ** 2 * sum(variances) / mean**2))
    degrees = sum(variances) ** 2 / sum(variance**2 for variance in variances)  # for each seed after the first
    while (t_quantile((count - 1) * degrees) + POWER) * math.sqrt(sum(variances) / count) > abs(mean):
        count += 1
    return count
