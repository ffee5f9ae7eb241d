"""Errors and tolerances of logits, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import assert_close
from trl.functional.probes import logits_error, logits_tolerance, probe_tokens


@pytest.mark.parametrize(
    ("vocabulary_size", "expected"), [(100, [50, 51, 52, 53]), (8, [4, 5, 4, 5]), (3, [1, 1, 1, 1])]
)
def test_tokens_stay_in_the_middle_of_the_vocabulary(vocabulary_size: int, expected: list[int]) -> None:
    assert probe_tokens(vocabulary_size, 4) == expected


def test_the_error_is_that_of_the_worst_row() -> None:
    expected = torch.tensor([[0.0, 2.0], [0.0, 20.0]])  # standard deviations sqrt(2) and sqrt(200)
    logits = torch.tensor([[3.0, 5.0], [3.0, 23.0]], dtype=torch.bfloat16)  # RMS errors of 3
    assert_close(logits_error(logits, expected), 3 / math.sqrt(2))
    assert_close(logits_error(logits[1:], expected[1:]), 3 / math.sqrt(200))
    assert logits_error(expected, expected) == 0


def test_an_error_that_is_not_a_number_is_within_no_tolerance() -> None:
    assert math.isnan(logits_error(torch.tensor([[math.nan, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wide_weights_leave_rounding_little_room(dtype: torch.dtype) -> None:
    assert logits_tolerance(torch.zeros(1, dtype=dtype)) == 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_narrow_weights_move_logits_by_half_a_standard_deviation(dtype: torch.dtype) -> None:
    assert logits_tolerance(torch.zeros(1, dtype=dtype)) == 0.5
