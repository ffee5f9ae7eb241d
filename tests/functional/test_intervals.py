"""Confidence intervals against printed tables and examples."""

from __future__ import annotations

import math

import pytest

from tests.helpers import assert_close
from trl.functional.intervals import mean_estimate, proportion_estimate, t_quantile


@pytest.mark.parametrize(
    ("freedom", "confidence", "expected"),
    [  # Abramowitz and Stegun 1964, table 26.10, and the NIST handbook, 1.3.6.7.2
        (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.99, 4.604), (10, 0.90, 1.812), (10, 0.95, 2.228),
        (30, 0.99, 2.750), (60, 0.95, 2.000), (100, 0.95, 1.984), (1000, 0.95, 1.962), (10**7, 0.95, 1.960),
    ],
)  # fmt: skip
def test_quantiles_of_student(freedom: int, confidence: float, expected: float) -> None:
    assert abs(t_quantile(freedom, confidence) - expected) < 6e-4


def test_the_series_and_the_expansion_meet() -> None:
    assert abs(t_quantile(1000, 0.99) - t_quantile(1001, 0.99)) < 5e-6


def test_students_own_example() -> None:
    """Student 1908, section IX: additional hours of sleep, paired; mean 1.58, s = 1.230 (n - 1), n = 10."""
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    estimate = mean_estimate(gained)
    half = 2.2622 * 1.22999 / math.sqrt(10)
    assert_close(estimate.value, 1.58)
    assert_close([estimate.low, estimate.high], [1.58 - half, 1.58 + half], tol=1e-4)


def test_few_values() -> None:
    assert math.isnan(mean_estimate([]).value)
    assert (mean_estimate([2.0]).low, mean_estimate([2.0]).high) == (-math.inf, math.inf)
    assert (mean_estimate([2.0, 2.0]).low, mean_estimate([2.0, 2.0]).high) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    ],
)  # fmt: skip
def test_wilsons_interval(successes: int, trials: int, low: float, high: float) -> None:
    estimate = proportion_estimate(successes, trials)
    assert_close([estimate.value, estimate.low, estimate.high], [successes / trials, low, high], tol=5e-5)


def test_no_trials_and_all_successes() -> None:
    assert math.isnan(proportion_estimate(0, 0).low)
    assert proportion_estimate(20, 20).high == 1.0


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -0.5])
def test_a_wrong_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        mean_estimate([1.0, 2.0], confidence)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        proportion_estimate(1, 2, confidence)
