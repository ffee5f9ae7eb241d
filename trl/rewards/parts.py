"""Small rewards to mix with others."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

# Longer texts are not searched: a pattern's time may grow faster than the text, which a model wrote.
_LONGEST = 100_000


class LengthPenalty:
    """Minus `per_unit` for each token (or character) too few or too many, at most `most` in all; otherwise 0.

    Args:
        shortest: units below which a completion is too short.
        longest: units above which it is too long; None is no limit.
        per_unit: taken off for each unit; >= 0.
        most: the largest penalty; >= 0.
        unit: what is counted: the policy's "token"s or "character"s.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        longest: int | None = None,
        shortest: int = 0,
        per_unit: float = 0.01,
        most: float = 1.0,
        unit: Literal["token", "character"] = "token",
    ) -> None:
        if unit not in ("token", "character"):
            raise ValueError(f"unit={unit!r} must be 'token' or 'character'")
        if shortest < 0 or (longest is not None and longest < shortest):
            raise ValueError(f"shortest={shortest} and longest={longest} leave no length without a penalty")
        for name, value in (("per_unit", per_unit), ("most", most)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a number of at least 0")
        self.longest = longest
        self.shortest = shortest
        self.per_unit = per_unit
        self.most = most
        self.unit = unit

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        """Scores completions by their length."""
        lengths = [len(c) for c in (completion_ids if self.unit == "token" else completions)]
        return [self._score(length) for length in lengths]

    def _score(self, length: int) -> float:
        over = 0 if self.longest is None else max(length - self.longest, 0)
        units = over + max(self.shortest - length, 0)
        return -min(self.per_unit * units, self.most) if units else 0.0


class FormatReward:
    """`bonus` for a completion that has a format, minus `penalty` for one that has not.

    Args:
        pattern: a regular expression, with its flags if it is compiled.
        bonus: the score of a match.
        penalty: taken off where there is none; >= 0.
        whole: whether the whole completion must match, but for white space around it; otherwise any part of it.

    Raises:
        ValueError: if an argument is out of range, or the pattern is none.
    """

    def __init__(
        self, pattern: str | re.Pattern[str], bonus: float = 1.0, penalty: float = 0.0, whole: bool = False
    ) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from error
        if not math.isfinite(bonus) or not 0 <= penalty < math.inf:
            raise ValueError(f"bonus={bonus!r} must be finite and penalty={penalty!r} finite and at least 0")
        self.bonus = bonus
        self.penalty = penalty
        self.whole = whole

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Scores completions by their format; one of more than 100,000 characters has none."""
        return [self.bonus if self._matches(text) else 0.0 - self.penalty for text in completions]

    def _matches(self, text: str) -> bool:
        if len(text) > _LONGEST:
            return False
        return bool(self.pattern.fullmatch(text.strip()) if self.whole else self.pattern.search(text))
