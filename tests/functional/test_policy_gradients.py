"""The choices of a critic-free policy gradient, worked out by hand."""

from __future__ import annotations

import math

import torch

from tests.helpers import assert_close, poison
from trl.functional.policy_gradients import (
    clipped_surrogate,
    group_moments,
    group_normalised,
    per_sequence,
    per_token,
    token_ratio,
)

SCORES = torch.tensor([1.0, 4.0, 3.0, 2.0, 5.0])
GROUP = torch.tensor([7, 2, 7, 7, 2])
ALL = torch.ones(5).bool()


def test_moments_are_those_of_each_group() -> None:
    mean, std, size = group_moments(SCORES, GROUP, ALL)
    assert_close(mean, [2.0, 4.5, 2.0, 2.0, 4.5])
    assert_close(std, [1.0, math.sqrt(0.5), 1.0, 1.0, math.sqrt(0.5)])
    assert size.tolist() == [3, 2, 3, 3, 2]


def test_a_score_that_does_not_count_is_not_read() -> None:
    counted = torch.tensor([True, True, False, True, True])
    mean, std, size = group_moments(SCORES.masked_fill(~counted, math.nan), GROUP, counted)
    assert_close(mean, [1.5, 4.5, 1.5, 1.5, 4.5])
    assert_close(std, [math.sqrt(0.5)] * 5)
    assert size.tolist() == [2, 2, 2, 2, 2]
    nobody = group_moments(SCORES, GROUP, torch.zeros(5).bool())
    assert all(bool((part == 0).all()) for part in nobody)


def test_advantages_of_a_group() -> None:
    assert_close(group_normalised(SCORES, GROUP, ALL)[[0, 2, 3]], torch.tensor([-1.0, 1.0, 0.0]) / 1.0001)
    equal = group_normalised(torch.full((5,), 3.3), GROUP, ALL)
    assert_close(equal, torch.zeros(5))


def test_advantages_do_not_change_with_the_scale_or_the_order() -> None:
    advantages = group_normalised(1000 * SCORES + 7, GROUP, ALL)
    assert_close(advantages, group_normalised(1000 * SCORES, GROUP, ALL), tol=1e-4)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_close(group_normalised(SCORES[order], GROUP[order], ALL), group_normalised(SCORES, GROUP, ALL)[order])


def test_ratio_is_one_where_nothing_is_predicted() -> None:
    mask = torch.tensor([[True, True, False]])
    logprobs = poison(torch.tensor([[math.log(0.5), math.log(0.2), 0.0]]), mask)
    old = poison(torch.tensor([[math.log(0.25), math.log(0.4), 0.0]]), mask)
    assert_close(token_ratio(logprobs, old, mask), [[2.0, 0.5, 1.0]])


def test_surrogate_is_the_smaller_of_the_plain_and_the_clipped_one() -> None:
    ratio = torch.tensor([[2.0, 2.0, 0.5, 0.5]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert_close(clipped_surrogate(ratio, advantages, low=0.2, high=0.3), [[1.3, -2.0, 0.5, -0.8]])


def test_weights_add_up_to_what_they_are_divided_by() -> None:
    mask = torch.tensor([[True, True, False, True], [False, True, False, False], [False] * 4])
    weights, total = per_sequence(mask)
    assert_close(weights, [[1 / 3, 1 / 3, 0, 1 / 3], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert int(total) == 2 and math.isclose(float(weights.sum()), 2)
    weights, total = per_token(mask)
    assert torch.equal(weights, mask.float()) and int(total) == 4


def test_equal_scores_are_equal_in_groups_of_any_size() -> None:
    for size in (2, 3, 5, 6, 7, 11):
        group = torch.arange(3).repeat_interleave(size)
        for score in (0.1, 10.1, 101.3, 1000.1, 12345.6):
            advantages = group_normalised(torch.full((3 * size,), score), group, torch.ones(3 * size).bool())
            assert not bool(advantages.any()), (size, score)
