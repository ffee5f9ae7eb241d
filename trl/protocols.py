"""What plugs into the library, as small protocols: any object with these methods will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from trl.types import Experience, Loss, Sample, Scored


class RewardFn(Protocol):
    """Scores finished texts."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> Sequence[float | None]:
        """One score per completion; None where there is none to be had."""
        ...


class Reward(Protocol):
    """A source of scores that knows what to do when scoring fails; `trl.rewards.as_reward` makes one of a function."""

    def score(self, samples: Sequence[Sample]) -> Scored:
        """Scores in the order of the samples."""
        ...

    def close(self) -> None:
        """Ends what runs beside the process. Scoring again starts it again."""
        ...


class Sandbox(Protocol):
    """Runs programs that nobody trusts, where they can do no harm."""

    def run(self, program: str, text: str, *, seconds: float) -> str | None:
        """What the Python source `program` wrote to its standard output, or the end of it, having been given `text` on
        its standard input; None if it was stopped for taking longer than `seconds`. It may have failed.
        """
        ...


class LossFn(Protocol):
    """The loss of one microbatch, as sums over its counted tokens."""

    def __call__(self, experience: Experience) -> Loss: ...


class Reduce(Protocol):
    """Sums a tensor over all processes."""

    def __call__(self, tensor: Tensor) -> Tensor: ...


class Tracker(Protocol):
    """Shows or keeps the statistics of a run."""

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Takes the statistics of a step by name: numbers, and whatever else the tracker can show."""
        ...

    def close(self) -> None:
        """Called once, after the last row."""
        ...
