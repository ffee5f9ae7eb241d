"""Spike handling in a managed run: warn, skip the batch, or roll back to a checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from trl.runs.keeper import Keeper
from trl.runs.memory import MemoryCheckpoint
from trl.runs.options import TrainOptions
from trl.runs.spikes import SpikeDetector, SpikeSettings
from trl.state.rng import preserved_generators
from trl.training.processes import sum_over_processes
from trl.training.resume import load_step, restore
from trl.training.run_state import Learner
from trl.types import Experience

logger = logging.getLogger(__name__)


class SpikePolicy:
    """Checks the KL before an update and the loss after it, and applies `on_spike`. Every process decides alike.

    A rollback restores the weights of the anchor, which is the newest checkpoint at a multiple of `every` steps, and
    continues with the next prompts and random numbers. Checkpoints at other steps are never anchors, so that a run that
    was stopped and resumed rolls back to the same step as an uninterrupted one.

    Args:
        trainer: the run's trainer.
        options: options of the run.
        keeper: writer of the run's checkpoints; if it has no folder, the anchor is kept in memory.
        every: steps between anchors.
    """

    def __init__(self, trainer: Learner, options: TrainOptions, keeper: Keeper, every: int) -> None:
        self._trainer, self._keeper, self._every = trainer, keeper, every
        self._on_spike = options.on_spike
        self._detector = SpikeDetector(options.spike or SpikeSettings())
        self._anchor = 0
        self._memory_anchor: MemoryCheckpoint | None = None
        self._previous_anchor = 0  # restored if saving the current one fails
        self._kl_spike: str | None = None  # why the last batch's KL is a spike, if it is
        self._mean_kl = 0.0
        self.rollbacks = 0
        self.rolled_back = False
        """Whether the last batch's policy was discarded, so that its scores are not those of the current weights."""

    def begin(self, step: int, extra: Callable[[], Mapping[str, Any]]) -> None:
        """Creates the first anchor, at the start of the run."""
        if self._on_spike != "rollback":
            return
        if self._keeper.checkpoints is None:
            self._memory_anchor = MemoryCheckpoint.of(self._trainer)
        elif self._keeper.last_step is None:
            self._keeper.save(0, extra(), None)

    def reason_to_skip(self, experience: Experience) -> str | None:
        """Reason to skip a batch because of its KL, checked before the update; None to learn from it."""
        self.rolled_back = False
        if experience.kl is None:  # without a reference, only the loss can spike
            self._kl_spike, self._mean_kl = None, math.nan
            return None
        counted = experience.counted
        sums = torch.stack([experience.kl[counted].sum(), counted.sum().to(experience.kl)])
        total, count = sum_over_processes(self._trainer.accelerator, sums).tolist()
        self._mean_kl = mean = total / max(count, 1)
        self._kl_spike = reason = None if self._on_spike is None else self._detector.spike("kl", mean)
        if reason is None or self._on_spike == "warn":
            self._detector.remember("kl", mean)
        return None if self._on_spike == "warn" else reason

    def skip(self, step: int, reason: str) -> dict[str, float]:
        """Handles a skipped batch, rolling back if so configured; returns its known statistics.

        Raises:
            SpikeError: after too many spikes in a row.
        """
        self._report(step, f"{reason}: skipping the batch")
        self._detector.count(reason)
        if self._on_spike == "rollback":
            self._roll_back(step)
        return {"objective/kl": self._mean_kl}

    def after_update(self, step: int, loss: float) -> None:
        """Checks the mean loss of a completed update.

        Raises:
            SpikeError: after too many rollbacks in a row.
        """
        if self._on_spike is None:
            return
        if self._kl_spike is not None:
            self._report(step, self._kl_spike)
        # A non-finite loss was never applied; the update guards count it.
        reason = self._detector.spike("loss", loss) if math.isfinite(loss) else None
        if reason is None or self._on_spike != "rollback":
            self._detector.remember("loss", loss)
            if reason is not None:
                self._report(step, f"{reason}; the update is kept" if self._on_spike == "skip" else reason)
            self._detector.in_a_row = 0
            return
        self._report(step, reason)
        self._detector.count(reason)
        self._roll_back(step)

    def _report(self, step: int, text: str) -> None:
        logger.warning("step %d: %s", step, text)
        self._keeper.event(f"spike in step {step}: {text}")

    def _roll_back(self, step: int) -> None:
        """Restores the anchor but keeps the random generators: replaying their draws would repeat the same samples."""
        trainer, folder = self._trainer, self._keeper.checkpoints
        with preserved_generators(trainer.accelerator.device, trainer._trl_generator):
            if folder is not None:
                load_step(trainer, folder, self._anchor)
            else:
                assert self._memory_anchor is not None
                restore(trainer, self._memory_anchor)  # type: ignore[arg-type]
        self.rollbacks += 1
        self.rolled_back = True
        self._report(step, f"rolled back to step {self._anchor}; continuing with the next prompts")

    # Anchors ---------------------------------------------------------------------------------------------------------

    @property
    def protected_steps(self) -> Collection[int]:
        """Steps whose checkpoints must not be deleted."""
        return (self._anchor,) if self._on_spike == "rollback" else ()

    def before_save(self, step: int) -> None:
        """Moves the anchor to `step`, if due, before its checkpoint is saved, so that the checkpoint records it."""
        if self._on_spike == "rollback" and step % self._every == 0:
            self._previous_anchor, self._anchor = self._anchor, step

    def after_step(self, step: int) -> None:
        """Renews an in-memory anchor; with a folder, reverts to the previous anchor if the save failed."""
        if self._on_spike != "rollback" or step % self._every:
            return
        if self._keeper.checkpoints is None:
            self._memory_anchor, self._anchor = MemoryCheckpoint.of(self._trainer), step
        elif self._keeper.last_step != step:
            self._anchor = self._previous_anchor

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state, for checkpoints."""
        anchor = self._anchor if self._on_spike == "rollback" else None  # only runs that roll back have one
        return {"watch": self._detector.state_dict(), "rollbacks": self.rollbacks, "anchor": anchor}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Restores a `state_dict` saved at `step`, which becomes the anchor if the state has none."""
        self._detector.load_state_dict(state["watch"])
        self.rollbacks = state["rollbacks"]
        self._anchor = step if state["anchor"] is None else state["anchor"]
