"""Validates the values a reward function returns. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from trl.rewards.failures import Failure

# One sample's result: a score, one reward per completion token, a failure, or None if unscorable.
Row: TypeAlias = float | list[float] | Failure | None

MAX_FLOAT32 = 3.4028234663852886e38  # largest float32, the dtype in which rewards are used


def fits_float32(*numbers: float) -> bool:
    """Whether every number, and any sum of them, fits in float32."""
    return sum(abs(number) for number in numbers) <= MAX_FLOAT32


def read_answer(answer: Any, lengths: Sequence[int]) -> list[Row]:
    """Validates what a reward returned for a batch.

    Args:
        answer: a list, tuple, array or tensor with one element per sample: a number that is finite in float32, None,
            one such number per completion token, or an exception.
        lengths: completion tokens per sample.

    Returns:
        One row per sample; exceptions and invalid elements become a `Failure`.

    Raises:
        TypeError: if `answer` is not a sequence.
        ValueError: if `answer` does not have one element per sample.
    """
    answer = _plain(answer)
    if not isinstance(answer, list | tuple):
        raise TypeError(f"the reward returned {_describe(answer)}; expected a list of {len(lengths)} numbers")
    if len(answer) != len(lengths):
        raise ValueError(f"the reward returned {len(answer)} values for {len(lengths)} samples")
    return [_row(value, length) for value, length in zip(answer, lengths, strict=True)]


def encode(rows: Sequence[Row]) -> list[Any]:
    """Converts rows to JSON-serializable values."""
    return [
        {"line": row.line, "traceback": row.traceback} if isinstance(row, Failure) else row for row in rows
    ]  # fmt: skip


def decode(rows: Any, lengths: Sequence[int]) -> list[Row]:
    """Reads rows from parsed JSON and validates them again: the process that wrote them ran untrusted user code."""
    if isinstance(rows, list):
        rows = [decode_failure(row) if isinstance(row, dict) else row for row in rows]
    return read_answer(rows, lengths)


def decode_failure(row: dict[str, Any]) -> Failure:
    """Reads a failure from parsed JSON."""
    return Failure(Failure.saying(str(row.get("line"))).line, str(row.get("traceback")))


def _row(value: Any, length: int) -> Row:
    value = _plain(value)
    if value is None or isinstance(value, Failure):
        return value
    if isinstance(value, BaseException):
        return Failure.of(value)
    if not isinstance(value, list | tuple):
        return _number(value, "the score")
    if len(value) != length:
        return Failure.saying(f"ValueError: the reward has {len(value)} values for a completion of {length} tokens")
    numbers = [_number(_plain(element), f"the reward of token {i}") for i, element in enumerate(value)]
    failures = [number for number in numbers if isinstance(number, Failure)]
    rewards = [number for number in numbers if not isinstance(number, Failure)]
    if not failures and not fits_float32(*rewards):
        return Failure.saying(f"ValueError: the rewards of {length} tokens add up to more than float32 can hold")
    return failures[0] if failures else rewards


def _number(value: Any, what: str) -> float | Failure:
    if not isinstance(value, int | float):  # a bool is an int: True scores 1
        return Failure.saying(f"TypeError: {what} is {_describe(value)}; expected a number")
    try:
        number = float(value)
    except OverflowError:
        return Failure.saying(f"ValueError: {what} is a whole number too large for a float")
    if not math.isfinite(number):
        return Failure.saying(f"ValueError: {what} is {number}; expected a finite number")
    if not fits_float32(number):
        return Failure.saying(f"ValueError: {what} is {number}; expected a number that float32 can hold (up to 3.4e38)")
    return number


def _plain(value: Any) -> Any:
    """Converts arrays, tensors and their scalars to lists and numbers; returns anything else unchanged."""
    convert = getattr(value, "tolist", None)
    return convert() if callable(convert) else value


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    text = repr(value) if isinstance(value, str | bytes | int | float) else "an object"
    return f"{text[:60]} of type {type(value).__name__}"
