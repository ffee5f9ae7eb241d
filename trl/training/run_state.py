"""Protocols that a trainer implements for resuming and for the managed training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trl.state.fingerprints import Fingerprints
from trl.training.batch import Batch
from trl.training.compute import Compute
from trl.training.evaluator import Evaluated, Evaluator
from trl.training.guards import UpdateGuards
from trl.types import Evaluation, Experience, Rollout


class RunState(Protocol):
    """Everything that the rest of a run depends on: saved by `capture`, put back by `restore`."""

    accelerator: Any
    config: Any
    """A dataclass of settings with `batch_size`, `seed` and `init_kl_coef`."""
    model: nn.Module
    """The policy, wrapped for its processes."""
    ref_model: Any
    """The reference model; None if it is the policy with its adapter off."""
    optimizer: Any
    lr_scheduler: Any
    tokenizer: Any
    kl_ctl: Any
    _trl_fingerprints: Fingerprints
    _trl_generator: torch.Generator
    """Draws the order of minibatches."""
    _trl_optimizer_made_with: list[dict[str, Any]]
    """Settings of each parameter group when the trainer was made."""

    @property
    def _trl_choices(self) -> dict[str, str]:
        """Name and choices of the algorithm, in words."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns what the algorithm carries from step to step."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        ...


class PreparedBatch(Protocol):
    """An evaluated batch, ready for `learn`."""

    @property
    def experience(self) -> Experience:
        """The experience that `learn` trains on."""
        ...


class Learner(RunState, Protocol):
    """The trainer interface that the managed loop drives."""

    _trl_stats_prefix: str
    """Prefix of the statistics."""
    _trl_guards: UpdateGuards
    _trl_compute: Compute
    _trl_steps_done: int
    """Calls of `learn` so far."""
    current_device: Any
    is_encoder_decoder: bool

    def generate(self, query_tensor: list[Tensor], length_sampler: Any = None, **generation_kwargs: Any) -> Any:
        """Samples one response per query."""
        ...

    def _trl_generate_from_reference(
        self, query_tensor: list[Tensor], length_sampler: Any = None, **generation_kwargs: Any
    ) -> Any:
        """As `generate`, from the reference."""
        ...

    def _trl_replay(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> list[Tensor] | None:
        """Log-probabilities of responses, in the form `step` takes, as the sampler computes them.

        One process may call it. None if the sampler does not decode in trl's own loop.
        """
        ...

    def _trl_batch(self, queries: list[Tensor], responses: list[Tensor]) -> Batch:
        """Queries and responses, padded."""
        ...

    def _trl_evaluator(self, known: Evaluation | None = None) -> Evaluator:
        """Evaluates policy and reference, with the current settings."""
        ...

    def _trl_evaluation(self, batch: Batch, evaluator: Evaluator) -> Callable[[Rollout], Evaluated]:
        """`evaluator`, or a subclass's replacement for `batch`."""
        ...

    @property
    def _trl_uses_reference(self) -> bool:
        """Whether the algorithm compares the policy with a reference."""
        ...

    def _trl_prepare(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
        token_rewards: list[Tensor] | None = None,
        sampler_logprobs: list[Tensor] | None = None,
        *,
        group: Sequence[int] | None = None,
    ) -> PreparedBatch:
        """Evaluates a batch without side effects."""
        ...

    def _trl_learn(self, prepared: Any) -> dict[str, Any]:
        """Trains on a batch from `prepare` and returns statistics by name."""
        ...

    def reference_kl(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor | None:
        """`[B]` KL of each response to the reference; None without one."""
        ...

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Saves the policy to a folder in transformers format."""
        ...

    def _trl_stop_tokens(self) -> tuple[int, ...]: ...

    def _trl_open_trackers(self, folder: Path | None, step: int, settings: Mapping[str, Any]) -> list[Any]:
        """Starts the trackers that the settings name, for a run that writes to `folder`."""
        ...
