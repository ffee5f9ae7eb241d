"""Extension points as small structural protocols: any object with these methods works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from trl.types import Experience, Loss, Minibatch, Rollout, Sample, Sampling, Scored

C = TypeVar("C", bound=Experience, contravariant=True)


class RolloutEngine(Protocol):
    """Samples responses from the policy: our own decoding loop, transformers' `generate`, or a server."""

    def generate(self, queries: Sequence[Tensor], sampling: Sampling) -> Rollout:
        """Samples one response to each of `B` 1-D queries, in order.

        The rollout's mask covers every response token. It includes what the engine computed: `sampler_logprobs` under
        the sampling distribution, the critic's `values` if the engine has a critic, and the `policy_version`.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Makes the next `generate` sample from the policy's current weights, which are numbered `version`."""
        ...


class RewardFn(Protocol):
    """A function that scores completions."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> Sequence[float | None]:
        """Returns one score per completion; None if a completion cannot be scored."""
        ...


class Reward(Protocol):
    """A source of scores that handles its own failures; `trl.rewards.as_reward` wraps a function as one."""

    def score(self, samples: Sequence[Sample]) -> Scored:
        """Scores the samples, in order."""
        ...

    def close(self) -> None:
        """Stops background workers; the next `score` restarts them."""
        ...


class Sandbox(Protocol):
    """Runs untrusted programs in isolation."""

    def run(self, program: str, text: str, *, seconds: float) -> str | None:
        """Runs the Python source `program` with `text` on stdin.

        Returns:
            Its stdout, possibly only the tail, even if the program failed; None if it was killed after `seconds`.
        """
        ...


class LossFn(Protocol[C]):
    """The loss of one microbatch, as sums over its counted tokens."""

    def __call__(self, experience: C) -> Loss: ...


class Algorithm(Protocol):
    """A way to learn from scored rollouts: everything between sampling and the optimizer."""

    def experience(self, rollout: Rollout, scored: Scored) -> Any:
        """Evaluates the rollout and turns its scores into advantages: an `Experience`. Changes nothing."""
        ...

    def minibatches(self, experience: Any) -> Iterator[Minibatch[Any]]:
        """Yields the data of one optimizer step after another."""
        ...

    def loss(self, experience: Any) -> Loss:
        """The loss of one microbatch: a forward pass of the policy, and sums over the counted tokens.

        Managed runs read its metric `loss/total`, early stopping `policy/policykl`, ratio_threshold
        `policy/mean_ratio`.
        """
        ...


class Reduce(Protocol):
    """Sums a tensor over all processes."""

    def __call__(self, tensor: Tensor) -> Tensor: ...


class Tracker(Protocol):
    """Displays or records a run's statistics."""

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Logs one step's statistics by name: numbers, and any other values that the tracker supports."""
        ...

    def close(self) -> None:
        """Called once, after the last row."""
        ...


class Callback(Protocol):
    """Hooks into a managed run (`PPOTrainer.train`), called on every process; `trl.TrainCallback` has no-op defaults.

    A callback must not draw from the global random generators, which the run uses, nor make collective calls.
    """

    def on_start(self, trainer: Any, step: int) -> None:
        """Called before the first step of this `train` call; `step` steps are already done."""
        ...

    def on_step(self, trainer: Any, step: int, row: Mapping[str, Any]) -> bool | None:
        """Called after each step with its metrics. Return True to stop the run cleanly."""
        ...

    def on_save(self, trainer: Any, step: int, path: Path) -> None:
        """Called when a checkpoint is complete."""
        ...

    def on_end(self, trainer: Any, result: Any) -> None:
        """Called when the run ends, with the return value of `train`; not after an error or a signal."""
        ...
