"""Protocol through which the doctor (`trl.doctor`) observes a managed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trl.data import Prompt
from trl.runs.samples import Drawn
from trl.trackers import Finding
from trl.training.run_state import Learner
from trl.types import Experience


class UnfitRun(ValueError):
    """Raised when the doctor finds that a run cannot train correctly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstBatch:
    """The main process's first batch, evaluated and scored, before its update."""

    drawn: Drawn
    scores: Sequence[float | None]  # totals
    experience: Experience


class Watch(Protocol):
    """Observes a managed run on its main process. Must not draw random numbers, change modes or call collectives."""

    def begin(
        self,
        trainer: Learner,
        prompts: Sequence[Prompt],
        generation: Mapping[str, Any],
        config: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
    ) -> list[Finding]:
        """Called before the first step.

        Args:
            trainer: the run's trainer.
            prompts: all prompts.
            generation: arguments of `generate`.
            config: the run's settings, as in `config.resolved.yaml`.
            rows: metrics rows of the completed steps.
        """
        ...

    def first_batch(self, trainer: Learner, batch: FirstBatch) -> list[Finding]:
        """Called before the update of step 1; not called in a resumed run."""
        ...

    def row(self, row: Mapping[str, Any]) -> list[Finding]:
        """Called with the metrics row of each step, which includes `step`."""
        ...


class NoWatch:
    """A `Watch` that checks nothing, for `train(doctor=False)`."""

    def begin(self, *_: Any) -> list[Finding]:
        """Returns []."""
        return []

    def first_batch(self, *_: Any) -> list[Finding]:
        """Returns []."""
        return []

    def row(self, *_: Any) -> list[Finding]:
        """Returns []."""
        return []
