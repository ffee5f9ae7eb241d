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
from trl.runs.spikes import SpikeSettings, SpikeWatch
from trl.state.rng import kept_generators
from trl.training.processes import sum_over_processes
from trl.training.resume import load_step, restore
from trl.training.run_state import Learner
from trl.types import Experience

logger = logging.getLogger(__name__)


class SpikePolicy:
    """Checks the KL before an update and the loss after it, and applies `on_spike`; the same on every process.

    A rollback restores the weights of the anchor, which is the newest checkpoint at a multiple of `every` steps, and
    continues with the next prompts and random numbers. Checkpoints at other steps are never anchors, so that a run that
    was stopped and resumed rolls back to the same step as an uninterrupted one.

    Args:
        trainer: a PPOTrainer.
        options: options of the run.
        keeper: writer of the run's checkpoints; if it has no folder, the anchor is kept in memory.
        every: steps between anchors.
    """

    def __init__(self, trainer: Learner, options: TrainOptions, keeper: Keeper, every: int) -> None:
        self._trainer, self._keeper, self._every = trainer, keeper, every
        self._policy = options.on_spike
        self._watch = SpikeWatch(options.spike or SpikeSettings())
        self._anchor = 0
        self._memory: MemoryCheckpoint | None = None
        self._previous = 0  # previous anchor, in case saving the current one fails
        self._why: str | None = None  # why the last batch's KL is a spike, if it is
        self._mean_kl = 0.0
        self.rollbacks = 0
        self.went_back = False
        """Whether the last batch's policy was discarded: its scores are not those of the weights now."""

    def begin(self, step: int, extra: Callable[[], Mapping[str, Any]]) -> None:
        """Creates the first anchor, at the start of the run."""
        if self._policy != "rollback":
            return
        if self._keeper.checkpoints is None:
            self._memory = MemoryCheckpoint.of(self._trainer)
        elif self._keeper.last_step is None:
            self._keeper.save(0, extra(), None)

    def refuse(self, experience: Experience) -> str | None:
        """Reason to skip a batch because of its KL, checked before the update; None to learn from it."""
        self.went_back = False
        if experience.kl is None:  # the algorithm has no reference
            self._why, self._mean_kl = None, math.nan
            return None
        counted = experience.counted
        sums = torch.stack([experience.kl[counted].sum(), counted.sum().to(experience.kl)])
        total, count = sum_over_processes(self._trainer.accelerator, sums).tolist()
        self._mean_kl = mean = total / max(count, 1)
        self._why = why = None if self._policy is None else self._watch.look("kl", mean)
        if why is None or self._policy == "warn":
            self._watch.remember("kl", mean)
        return None if self._policy == "warn" else why

    def declined(self, step: int, why: str) -> dict[str, float]:
        """Handles a skipped batch, rolling back if so configured; returns its known statistics.

        Raises:
            SpikeError: after too many spikes in a row.
        """
        self._say(step, f"{why}: the batch is not learnt from")
        self._watch.count(why)
        if self._policy == "rollback":
            self._go_back(step)
        return {"objective/kl": self._mean_kl}

    def after_update(self, step: int, loss: float) -> None:
        """Checks the mean loss of a completed update.

        Raises:
            SpikeError: after too many rollbacks in a row.
        """
        if self._policy is None:
            return
        if self._why is not None:
            self._say(step, self._why)
        # A non-finite loss was never applied; the update guards count it.
        why = self._watch.look("loss", loss) if loss - loss == 0 else None
        if why is None or self._policy != "rollback":
            self._watch.remember("loss", loss)
            if why is not None:
                undone = "; the update stands" if self._policy == "skip" else ""
                self._say(step, f"{why}{undone}")
            self._watch.in_a_row = 0
            return
        self._say(step, why)
        self._watch.count(why)
        self._go_back(step)

    def _say(self, step: int, text: str) -> None:
        logger.warning("step %d: %s", step, text)
        self._keeper.event(f"spike in step {step}: {text}")

    def _go_back(self, step: int) -> None:
        """Restores the weights but keeps the random generators: replaying them would reuse the same draws."""
        trainer, folder = self._trainer, self._keeper.checkpoints
        with kept_generators(trainer.accelerator.device, trainer._generator):
            if folder is not None:
                load_step(trainer, folder, self._anchor)
            else:
                assert self._memory is not None
                restore(trainer, self._memory)  # type: ignore[arg-type]
        self.rollbacks += 1
        self.went_back = True
        self._say(step, f"went back to step {self._anchor}, and on with the next prompts")

    # Anchors ---------------------------------------------------------------------------------------------------------

    @property
    def kept_steps(self) -> Collection[int]:
        """Steps whose checkpoints must not be deleted."""
        return (self._anchor,) if self._policy == "rollback" else ()

    def will_save(self, step: int) -> None:
        """Moves the anchor to `step`, if due, before its checkpoint is saved, so that the checkpoint records it."""
        if self._policy == "rollback" and step % self._every == 0:
            self._previous, self._anchor = self._anchor, step

    def after_step(self, step: int) -> None:
        """Renews an in-memory anchor; with a folder, reverts to the previous anchor if the save failed."""
        if self._policy != "rollback" or step % self._every:
            return
        if self._keeper.checkpoints is None:
            self._memory, self._anchor = MemoryCheckpoint.of(self._trainer), step
        elif self._keeper.last_step != step:
            self._anchor = self._previous

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state, for checkpoints."""
        anchor = self._anchor if self._policy == "rollback" else None  # only runs that roll back have one
        return {"watch": self._watch.state_dict(), "rollbacks": self.rollbacks, "anchor": anchor}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Restores a `state_dict` saved at `step`, which becomes the anchor if the state has none."""
        self._watch.load_state_dict(state["watch"])
        self.rollbacks = state["rollbacks"]
        self._anchor = step if state["anchor"] is None else state["anchor"]
