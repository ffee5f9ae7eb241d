from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.functional.oracles import POISONS, Ranks, f64, kept, masked_arrays, ragged_mask, randn, variance
from tests.helpers import assert_close, poison
from trl.functional import masked_mean, masked_moments, masked_sum, masked_var, masked_whiten
from trl.functional.masked import masked_count

VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
MASK = torch.tensor([[True, False, True], [False, True, True]])  # counts 1, 3, 5, 6
NOWHERE = torch.zeros(2, 3, dtype=torch.bool)


def test_worked_by_hand() -> None:
    assert_close(masked_sum(VALUES, MASK), 15.0)
    assert_close(masked_mean(VALUES, MASK), 3.75)
    # deviations -2.75, -0.75, 1.25, 2.25; their squares add up to 14.75
    assert_close(masked_var(VALUES, MASK), 14.75 / 3)
    assert_close(masked_var(VALUES, MASK, unbiased=False), 14.75 / 4)
    mean, var, count = masked_moments(VALUES, MASK)
    assert (float(mean), float(count)) == (3.75, 4.0)
    assert_close(var, 14.75 / 3)


@pytest.mark.parametrize(
    ("dim", "total", "mean"),
    [
        (1, [4.0, 11.0], [2.0, 5.5]),
        (-1, [4.0, 11.0], [2.0, 5.5]),
        (0, [1.0, 5.0, 9.0], [1.0, 5.0, 4.5]),
        ((0, 1), 15.0, 3.75),
    ],
)
def test_along_dimensions(dim: int | tuple[int, ...], total: list[float], mean: list[float]) -> None:
    assert_close(masked_sum(VALUES, MASK, dim=dim), total)
    assert_close(masked_mean(VALUES, MASK, dim=dim), mean)


def test_whitening_worked_by_hand() -> None:
    two = torch.tensor([[1.0, 3.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])  # mean 2, variance 2
    half = 1 / math.sqrt(2)
    assert_close(masked_whiten(two, mask), [[-half, half, 0.0]])
    assert_close(masked_whiten(two, mask, shift_mean=False), [[2 - half, 2 + half, 0.0]])
    assert_close(masked_whiten(two, mask, epsilon=6.0), [[-1 / math.sqrt(8), 1 / math.sqrt(8), 0.0]])


def test_a_mask_is_broadcast_before_it_is_counted() -> None:
    row = torch.tensor([True, False, True])  # counts 1, 3, 4, 6
    assert_close(masked_sum(VALUES, row), 14.0)
    assert_close(masked_mean(VALUES, row), 3.5)
    assert_close(masked_mean(VALUES, row, dim=0), [2.5, 0.0, 4.5])
    assert_close(masked_moments(VALUES, row[None])[2], 4.0)


def test_count_is_at_least_one_and_of_the_dtype_of_the_values() -> None:
    assert_close(masked_count(VALUES, NOWHERE), 1.0)
    assert_close(masked_count(VALUES, MASK, dim=0), [1.0, 1.0, 2.0])
    assert masked_count(VALUES.float(), MASK).dtype == torch.float32


def test_whole_numbers_have_a_fractional_mean() -> None:
    assert_close(masked_mean(torch.tensor([[1, 2, 7]]), torch.tensor([[True, True, False]])), 1.5)


def test_nothing_counted_gives_zero_not_nan() -> None:
    for result in (masked_sum, masked_mean, masked_var):
        assert float(result(VALUES, NOWHERE)) == 0.0
    assert float(masked_var(VALUES, NOWHERE, unbiased=False)) == 0.0
    assert_close(masked_mean(VALUES, NOWHERE, dim=1), [0.0, 0.0])
    for shift_mean in (True, False):
        assert_close(masked_whiten(VALUES, NOWHERE, shift_mean), torch.zeros(2, 3))


def test_a_single_value_has_no_spread_and_does_not_divide_by_zero() -> None:
    one = torch.tensor([[False, True, False], [False, False, False]])
    assert float(masked_var(VALUES, one)) == 0.0
    assert float(masked_var(VALUES, one, unbiased=False)) == 0.0
    assert_close(masked_whiten(VALUES, one), torch.zeros(2, 3))
    assert_close(masked_whiten(VALUES, one, shift_mean=False), [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])


def test_variance_of_large_close_numbers_keeps_its_digits_in_float32() -> None:
    """The mean of the squares less the square of the mean would give 0 or garbage here."""
    values = torch.tensor([[10000.0, 10001.0, 10002.0]])
    assert_close(masked_var(values, torch.ones(1, 3, dtype=torch.bool)), 1.0)


@given(masked_arrays())
def test_any_shape_and_mask_against_plain_python(drawn: tuple[torch.Tensor, ...]) -> None:
    mask, values = drawn
    numbers = kept(values, mask)
    mean = statistics.fmean(numbers) if numbers else 0.0
    assert_close(masked_sum(values, mask), f64(math.fsum(numbers)), tol=1e-12)
    assert_close(masked_mean(values, mask), f64(mean), tol=1e-12)
    assert_close(masked_var(values, mask), f64(variance(numbers)), tol=1e-12)
    spread = statistics.pvariance(numbers) if numbers else 0.0
    assert_close(masked_var(values, mask, unbiased=False), f64(spread), tol=1e-12)
    scale = 1 / math.sqrt(variance(numbers) + 1e-8)
    for shift_mean, added in ((True, 0.0), (False, mean)):
        white = masked_whiten(values, mask, shift_mean)
        assert_close(f64(kept(white, mask)), f64([(x - mean) * scale + added for x in numbers]), tol=1e-10)
        assert float(white.masked_fill(mask, 0).abs().sum()) == 0.0
    for b in range(len(mask)):
        row = kept(values[b : b + 1], mask[b : b + 1])
        assert_close(masked_mean(values, mask, dim=1)[b], f64(statistics.fmean(row) if row else 0.0), tol=1e-12)


@given(masked_arrays(), st.floats(0.5, 50.0), st.floats(-50.0, 50.0))
def test_whitening_forgets_scale_and_origin(drawn: tuple[torch.Tensor, ...], scale: float, shift: float) -> None:
    mask, values = drawn
    assume(variance(kept(values, mask)) > 1e-3)
    white = masked_whiten(values, mask, epsilon=0.0)
    assert_close(masked_whiten(values * scale + shift, mask, epsilon=0.0), white, tol=1e-9)
    assert_close(f64(statistics.fmean(kept(white, mask))), f64(0.0), tol=1e-9)
    assert_close(f64(variance(kept(white, mask))), f64(1.0), tol=1e-9)
    unmoved = masked_whiten(values, mask, shift_mean=False, epsilon=0.0)
    assert_close(f64(statistics.fmean(kept(unmoved, mask))), f64(statistics.fmean(kept(values, mask))), tol=1e-9)


FUNCTIONS = [
    masked_sum,
    masked_mean,
    masked_var,
    masked_whiten,
    lambda v, m: masked_sum(v, m, dim=1),
    lambda v, m: masked_mean(v, m, dim=0),
    lambda v, m: masked_var(v, m, unbiased=False),
    lambda v, m: masked_whiten(v, m, shift_mean=False),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("filling", POISONS)
def test_what_stands_off_the_mask_is_not_read(function: object, filling: float) -> None:
    for mask in (MASK, NOWHERE):
        assert torch.equal(function(poison(VALUES, mask, filling), mask), function(VALUES, mask))  # type: ignore[operator]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("filling", POISONS)
def test_what_stands_off_the_mask_does_not_reach_a_gradient(function: object, filling: float) -> None:
    """A masked sum of squares hides the trap: its value forgets the NaN, its derivative, 0 · NaN, does not."""
    slopes = []
    for values in (VALUES, poison(VALUES, MASK, filling)):
        leaf = values.clone().requires_grad_()
        result = function(leaf, MASK)  # type: ignore[operator]
        (result * randn(*result.shape, seed=5)).sum().backward()
        slopes.append(leaf.grad)
    assert torch.equal(slopes[1], slopes[0])
    assert float(slopes[1].masked_fill(MASK, 0).abs().sum()) == 0.0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_match_finite_differences(function: object) -> None:
    leaf = randn(3, 4, seed=1).requires_grad_()
    mask = ragged_mask([4, 1, 2], 4)
    assert torch.autograd.gradcheck(lambda v: function(v, mask), (leaf,))  # type: ignore[operator]


@pytest.mark.parametrize("cuts", [[1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
def test_statistics_span_all_processes(cuts: list[int]) -> None:
    values, mask = randn(5, 4, seed=2), ragged_mask([4, 0, 1, 3, 2], 4)
    numbers = kept(values, mask)
    shards = list(zip(values.split(cuts), mask.split(cuts)))

    def moments(rank: int, reduce):  # type: ignore[no-untyped-def]
        return masked_moments(*shards[rank], reduce)

    def whiten(rank: int, reduce):  # type: ignore[no-untyped-def]
        return masked_whiten(*shards[rank], reduce=reduce)

    for mean, var, count in Ranks(len(cuts)).run(moments):
        assert_close(mean, f64(statistics.fmean(numbers)), tol=1e-12)
        assert_close(var, f64(statistics.variance(numbers)), tol=1e-12)
        assert_close(count, float(len(numbers)))
    together = torch.cat(Ranks(len(cuts)).run(whiten))
    expected = [(x - statistics.fmean(numbers)) / math.sqrt(statistics.variance(numbers) + 1e-8) for x in numbers]
    assert_close(f64(kept(together, mask)), f64(expected), tol=1e-10)
