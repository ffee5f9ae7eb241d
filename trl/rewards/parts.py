"""Simple rule-based rewards, length and format, to mix with others."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

# In characters. Longer completions are not searched: regex matching can take time superlinear in their length.
_MAX_SEARCHED = 100_000


class LengthPenalty:
    """Penalizes completions outside a length range: `-per_unit` per token (or character), capped at `-most`; else 0.

    Args:
        longest: maximum length without a penalty, in units; None is no limit.
        shortest: minimum length without a penalty, in units.
        per_unit: penalty per unit too many or too few; >= 0.
        most: largest penalty; >= 0.
        unit: unit of length: "token" (of the policy's tokenizer) or "character".

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
            raise ValueError(f"shortest={shortest} must be at least 0 and at most longest={longest}")
        for name, value in (("per_unit", per_unit), ("most", most)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a finite number of at least 0")
        self.longest = longest
        self.shortest = shortest
        self.per_unit = per_unit
        self.most = most
        self.unit = unit

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        """Returns one score per completion, 0 or negative."""
        lengths = [len(c) for c in (completion_ids if self.unit == "token" else completions)]
        return [self._score(length) for length in lengths]

    def _score(self, length: int) -> float:
        excess = 0 if self.longest is None else max(length - self.longest, 0)
        units = excess + max(self.shortest - length, 0)
        return -min(self.per_unit * units, self.most) if units else 0.0


class FormatReward:
    """Scores `bonus` for a completion that matches a pattern, `-penalty` for one that does not.

    Args:
        pattern: a regular expression, as a string or compiled with flags.
        bonus: score of a match.
        penalty: subtracted from 0 without a match; >= 0.
        whole: require the whole completion to match, ignoring surrounding whitespace; otherwise any part may match.

    Raises:
        ValueError: if an argument is out of range or the pattern is invalid.
    """

    def __init__(
        self, pattern: str | re.Pattern[str], bonus: float = 1.0, penalty: float = 0.0, whole: bool = False
    ) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern={pattern!r} is not a valid regular expression: {error}") from error
        if not math.isfinite(bonus) or not 0 <= penalty < math.inf:
            raise ValueError(f"bonus={bonus!r} must be finite and penalty={penalty!r} finite and at least 0")
        self.bonus = bonus
        self.penalty = penalty
        self.whole = whole

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Returns one score per completion; completions over 100,000 characters never match."""
        return [self.bonus if self._matches(text) else 0.0 - self.penalty for text in completions]

    def _matches(self, text: str) -> bool:
        if len(text) > _MAX_SEARCHED:
            return False
        return bool(self.pattern.fullmatch(text.strip()) if self.whole else self.pattern.search(text))
