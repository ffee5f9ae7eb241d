from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.functional.oracles import randn
from tests.helpers import assert_close
from trl.functional.best_of_n import best_of_n_curve, best_of_n_kl, expected_maximum


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_mean_of_the_maximum_over_all_subsets(n: int) -> None:
    scores = randn(2, 6, seed=1)
    expected = [
        sum(max(subset) for subset in itertools.combinations(row, n)) / math.comb(6, n) for row in scores.tolist()
    ]
    assert_close(expected_maximum(scores, n), expected)


def test_one_is_the_mean_and_all_the_maximum() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0]])
    assert_close(expected_maximum(scores, 1), [3.0])
    assert_close(expected_maximum(scores, 3), [5.0])


@pytest.mark.parametrize("n", [0, 4])
def test_more_samples_than_there_are_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n={n} must be from 1 to the 3 samples"):
        expected_maximum(torch.zeros(1, 3), n)


def test_kl_by_hand() -> None:
    assert best_of_n_kl(1) == 0.0
    assert_close(best_of_n_kl(4), math.log(4) - 0.75)


def test_curve_by_hand() -> None:
    curve = best_of_n_curve(torch.tensor([[1.0, 2.0, 3.0], [5.0, 3.0, 4.0]]))
    assert [point.n for point in curve] == [1, 2, 3]
    assert_close([point.score for point in curve], [(2 + 4) / 2, (8 / 3 + 14 / 3) / 2, (3 + 5) / 2])
    assert_close([point.error for point in curve], [1.0, 1.0, 1.0])  # the prompts differ by 2: std √2, over √2
    assert_close([point.kl for point in curve], [0.0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    (only,) = best_of_n_curve(torch.tensor([[1.0, 3.0]]), sizes=[2])
    assert (only.n, only.score) == (2, 3.0)
    assert math.isnan(only.error)


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.zeros(0, 3), torch.tensor([[1.0, math.nan]])])
def test_curve_refuses(scores: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="scores must be finite and of shape"):
        best_of_n_curve(scores)
