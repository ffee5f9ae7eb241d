"""What plugs into the library, as small protocols: any object with these methods will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from trl.types import Experience, Loss


class RewardFn(Protocol):
    """Scores finished texts."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> Sequence[float]:
        """One score per completion."""
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
