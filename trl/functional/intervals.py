"""Confidence intervals of means and of proportions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

_LARGE = 1000  # degrees of freedom above which the first terms of an expansion are exact to 1e-8


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


def mean_estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of independent values with Student's t interval (Student 1908): mean ± t · s / √n.

    For the mean of paired differences, pass the differences: the paired t interval.

    Returns:
        NaN everywhere without values; an infinite interval for one value.
    """
    _check(confidence)
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, -math.inf, math.inf)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1, confidence) * std / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def proportion_estimate(successes: float, trials: int, confidence: float = 0.95) -> Estimate:
    """Proportion of successes with the score interval of Wilson 1927, which stays inside [0, 1].

    Args:
        successes: number of successes; a tie may count as half of one.
        trials: number of trials. NaN everywhere for 0.
        confidence: coverage, between 0 and 1.
    """
    _check(confidence)
    if trials == 0:
        return Estimate(math.nan, math.nan, math.nan)
    p, z = successes / trials, NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def t_quantile(freedom: int, confidence: float) -> float:
    """The t with P(|T| <= t) = `confidence`, for Student's distribution with a whole number of degrees of freedom.

    Solves Abramowitz and Stegun 1964, 26.7.3 and 26.7.4, by bisection; above 1,000 degrees of freedom, 26.7.5.
    """
    if freedom > _LARGE:
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    low, high = 0.0, math.pi / 2  # of θ = atan(t / √freedom)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(theta: float, freedom: int) -> float:
    """P(|T| <= √freedom · tan θ)."""
    odd, sine, cosine = freedom % 2, math.sin(theta), math.cos(theta)
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(freedom // 2):
        total += term
        term *= cosine**2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must lie between 0 and 1, such as 0.95")
