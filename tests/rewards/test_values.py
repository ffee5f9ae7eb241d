"""What a reward may return, element by element."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from trl.rewards.failures import Failure
from trl.rewards.values import decode, encode, fits_float32, read_answer

LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    "answer",
    [
        [1, 0.5, True],
        (1, 0.5, 1),
        np.array([1.0, 0.5, 1.0]),
        torch.tensor([1.0, 0.5, 1.0]),
        [np.int64(1), torch.tensor(0.5), 1],
    ],
)
def test_numbers_of_any_kind(answer: Any) -> None:
    rows = read_answer(answer, [1, 1, 1])
    assert rows == [1.0, 0.5, 1.0] and all(type(row) is float for row in rows)


def test_none_tokens_and_exceptions() -> None:
    rows = read_answer([None, [1, 2.5], np.array([3.0]), KeyError("k")], [1, 2, 1, 1])
    assert rows[:3] == [None, [1.0, 2.5], [3.0]]
    assert isinstance(rows[3], Failure) and rows[3].line == "KeyError: 'k'"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (math.nan, "ValueError: the score is nan; expected a finite number"),
        (-math.inf, "ValueError: the score is -inf; expected a finite number"),
        (1e39, "ValueError: the score is 1e+39; expected a number that float32 can hold (up to 3.4e38)"),
        (10**400, "ValueError: the score is a whole number too large for a float"),
        ("7", "TypeError: the score is '7' of type str; expected a number"),
        ({}, "TypeError: the score is an object of type dict; expected a number"),
        ([1.0], "ValueError: the reward has 1 values for a completion of 2 tokens"),
        ([1.0, None], "TypeError: the reward of token 1 is None; expected a number"),
        ([LARGEST, LARGEST], "ValueError: the rewards of 2 tokens add up to more than float32 can hold"),
    ],
)
def test_an_invalid_element_fails_alone(value: Any, line: str) -> None:
    failed, other = read_answer([value, 1.0], [2, 1])
    assert isinstance(failed, Failure) and failed.line == line
    assert other == 1.0


@pytest.mark.parametrize(
    ("answer", "error", "reason"),
    [
        (None, TypeError, "returned None; expected a list of 2 numbers"),
        (1.0, TypeError, r"returned 1\.0 of type float"),
        ("ab", TypeError, "returned 'ab' of type str"),
        (iter([1.0, 2.0]), TypeError, "returned an object of type list_iterator"),
        ([1.0], ValueError, "returned 1 values for 2 samples"),
    ],
)
def test_an_answer_that_is_no_list_of_the_batch(answer: Any, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        read_answer(answer, [1, 1])


def test_rows_survive_a_pipe_and_are_validated_again() -> None:
    rows = [1.5, None, [0.5, -1.0], Failure("KeyError: 'k'", "Traceback\nKeyError: 'k'")]
    lengths = [1, 1, 2, 1]
    assert decode(json.loads(json.dumps(encode(rows))), lengths) == rows
    forged = decode([math.nan, 1.0, 1.0, 1.0], lengths)[0]
    assert isinstance(forged, Failure) and "the score is nan" in forged.line
    with pytest.raises(ValueError, match="returned 1 values for 4 samples"):
        decode([1.0], lengths)


def test_sums_count_against_float32() -> None:
    assert fits_float32() and fits_float32(LARGEST) and fits_float32(-LARGEST / 2, LARGEST / 2)
    assert not fits_float32(LARGEST, LARGEST) and not fits_float32(-LARGEST, 1e32) and not fits_float32(math.nan)
