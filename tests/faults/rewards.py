"""Rewards of the runs that are put to the test. Standard library only: worker processes import this."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence

BAD = "w20"  # prompts that begin with this word are those on which the misbehaving rewards misbehave


def words(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A number that every word of prompt and completion changes."""
    return [_number(f"{prompt} {completion}") for prompt, completion in zip(prompts, completions)]


def raises(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return _unless_bad(prompts, completions, _raise)


def hangs(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return _unless_bad(prompts, completions, lambda: time.sleep(10_000))


def crashes(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return _unless_bad(prompts, completions, lambda: ctypes.string_at(0))


def exits(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return _unless_bad(prompts, completions, lambda: exit(0))


def wrong_length(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    scores = words(prompts, completions)
    return [*scores, 1.0] if prompts[0].split()[0] == BAD else scores


def _raise() -> None:
    raise ZeroDivisionError("no score to be had")


def _unless_bad(prompts: Sequence[str], completions: Sequence[str], misbehave: Callable[[], object]) -> list[float]:
    if any(prompt.split()[0] == BAD for prompt in prompts):
        misbehave()
    return words(prompts, completions)


def _number(text: str) -> float:
    numbers = [int(word.removeprefix("w")) for word in text.split()]
    return sum((i + 1) * number for i, number in enumerate(numbers)) % 23 / 23
