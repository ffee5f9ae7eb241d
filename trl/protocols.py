"""What plugs into the library, as small protocols: any object with these methods will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from trl.types import Experience, Loss, Sample, Scored

C = TypeVar("C", bound=Experience, contravariant=True)


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


class LossFn(Protocol[C]):
    """The loss of one microbatch, as sums over its counted tokens."""

    def __call__(self, experience: C) -> Loss: ...


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


class Callback(Protocol):
    """Watches a managed run (`PPOTrainer.train`), on every process; `trl.TrainCallback` has empty methods to start from.

    A callback must not draw from the global random generators, which the run draws from, nor make collective calls.
    """

    def on_start(self, trainer: Any, step: int) -> None:
        """Before the first step of this call; `step` steps are done already."""
        ...

    def on_step(self, trainer: Any, step: int, row: Mapping[str, Any]) -> bool | None:
        """After a step, with its row of metrics. True ends the run here, in order."""
        ...

    def on_save(self, trainer: Any, step: int, path: Path) -> None:
        """A checkpoint is complete."""
        ...

    def on_end(self, trainer: Any, result: Any) -> None:
        """The run is over; `result` is what `train` returns. Not called after an error or a signal."""
        ...
