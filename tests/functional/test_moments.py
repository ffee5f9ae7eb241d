from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.functional.oracles import Ranks, f64, randn
from tests.helpers import assert_close
from trl.functional import Moments, update_moments


def test_worked_by_hand() -> None:
    moments = update_moments(Moments(), f64([1.0, 3.0]))
    assert moments == Moments(mean=2.0, squares=2.0, count=2.0)
    assert_close(moments.std, 2**0.5)
    moments = update_moments(moments, f64([5.0]))  # 1, 3, 5
    assert moments == Moments(mean=3.0, squares=8.0, count=3.0)
    assert_close(moments.std, 2.0)


def test_too_little_to_have_a_spread() -> None:
    assert Moments().std == 1.0
    assert update_moments(Moments(), f64([7.0])).std == 1.0
    assert update_moments(Moments(), f64([7.0, 7.0, 7.0])).std == 1.0


def test_nothing_new_changes_nothing() -> None:
    before = Moments(mean=2.0, squares=2.0, count=2.0)
    assert update_moments(before, torch.empty(0)) == before


@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), min_size=1, max_size=6))
def test_any_cut_of_a_stream_against_all_of_it_at_once(batches: list[list[float]]) -> None:
    moments = Moments()
    for batch in batches:
        moments = update_moments(moments, f64(batch))
    numbers = [x for batch in batches for x in batch]
    assert moments.count == len(numbers)
    if numbers:
        assert_close(f64(moments.mean), f64(statistics.fmean(numbers)), tol=1e-9)
    if len(numbers) > 1 and (variance := statistics.variance(numbers)) > 1e-6:
        assert_close(f64(moments.std), f64(variance**0.5), tol=1e-9)


def test_small_differences_of_large_numbers_survive() -> None:
    moments = Moments()
    for x in (1e6, 1e6 + 1, 1e6 + 2):
        moments = update_moments(moments, torch.tensor([x]))  # float32 in, float64 inside
    assert_close(f64(moments.std), f64(1.0), tol=1e-9)


@pytest.mark.parametrize("cuts", [[3, 3], [1, 5], [0, 4, 2]])
def test_the_same_on_every_process_however_the_batch_is_cut(cuts: list[int]) -> None:
    first, second = randn(6, seed=1), 10 + randn(6, seed=2)

    def two_updates(rank: int, reduce):  # type: ignore[no-untyped-def]
        moments = update_moments(Moments(), first.split(cuts)[rank], reduce)
        return update_moments(moments, second.split(cuts)[rank], reduce)

    numbers = first.tolist() + second.tolist()
    results = Ranks(len(cuts)).run(two_updates)
    assert len(set(results)) == 1
    assert_close(f64(results[0].mean), f64(statistics.fmean(numbers)), tol=1e-12)
    assert_close(f64(results[0].std), f64(statistics.stdev(numbers)), tol=1e-12)


def test_values_with_a_graph_are_only_read() -> None:
    values = f64([1.0, 3.0]).requires_grad_()
    assert update_moments(Moments(), values).mean == 2.0
    assert values.grad is None
