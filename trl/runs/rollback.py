"""What a managed run does about spikes: says so, leaves the batch alone, or goes back to where it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from trl.runs.keeper import Keeper
from trl.runs.memory import MemoryCheckpoint
from trl.runs.options import TrainOptions
from trl.runs.spikes import SpikeSettings, SpikeWatch
from trl.state.rng import kept_generators
from trl.training.processes import sum_over_processes
from trl.training.resume import load_step, restore
from trl.training.run_state import Learner

logger = logging.getLogger(__name__)


class SpikePolicy:
    """Looks at the KL before an update and at the loss after it, with the same answer on every process.

    A run that rolls back goes on with the next prompts and the next random numbers, from the weights of its anchor: the
    newest checkpoint of a step that is a multiple of `every`. Others do not count, so that a run that was stopped and resumed
    in between goes back to where the run without an interruption does.

    Args:
        trainer: a PPOTrainer.
        options: of the run.
        keeper: of its checkpoints; where it has no folder, the anchor is in memory.
        every: steps between two anchors.
    """

    def __init__(self, trainer: Learner, options: TrainOptions, keeper: Keeper, every: int) -> None:
        self._trainer, self._keeper, self._every = trainer, keeper, every
        self._policy = options.on_spike
        self._watch = SpikeWatch(options.spike or SpikeSettings())
        self._anchor = 0
        self._memory: MemoryCheckpoint | None = None
        self._previous = 0  # the anchor before, should the save of this one fail
        self._why: str | None = None  # the last batch's KL is a spike
        self._mean_kl = 0.0
        self.rollbacks = 0
        self.went_back = False
        """Whether the last batch's policy was discarded: its scores are not those of the weights now."""

    def begin(self, step: int, extra: Callable[[], Mapping[str, Any]]) -> None:
        """Makes the first anchor, where the run begins."""
        if self._policy != "rollback":
            return
        if self._keeper.checkpoints is None:
            self._memory = MemoryCheckpoint.of(self._trainer)
        elif self._keeper.last_step is None:
            self._keeper.save(0, extra(), None)

    def refuse(self, kl: Tensor, counted: Tensor) -> str | None:
        """Why a batch is not to be learnt from, before anything was changed; None if it is.

        Args:
            kl: `[B]` of each sequence to the reference.
            counted: `[B]` bool: which of them count.
        """
        self.went_back = False
        sums = torch.stack([kl[counted].sum(), counted.sum().to(kl)])
        total, count = sum_over_processes(self._trainer.accelerator, sums).tolist()
        self._mean_kl = mean = total / max(count, 1)
        self._why = why = None if self._policy is None else self._watch.look("kl", mean)
        if why is None or self._policy == "warn":
            self._watch.remember("kl", mean)
        return None if self._policy == "warn" else why

    def declined(self, step: int, why: str) -> dict[str, float]:
        """The batch was left alone; returns what is known of it.

        Raises:
            SpikeError: if there were too many in a row.
        """
        self._say(step, f"{why}: the batch is not learnt from")
        self._watch.count(why)
        if self._policy == "rollback":
            self._go_back(step)
        return {"objective/kl": self._mean_kl}

    def after_update(self, step: int, stats: Mapping[str, Any]) -> None:
        """Looks at the loss of an update that was made.

        Raises:
            SpikeError: if there were too many rollbacks in a row.
        """
        if self._policy is None:
            return
        if self._why is not None:
            self._say(step, self._why)
        loss = float(stats["ppo/loss/total"])
        # A loss that is not finite was not learnt from, and is counted elsewhere.
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
        """The next random numbers are the run's: the same ones again would make the same samples of other prompts."""
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
        """Steps whose checkpoints have to stay."""
        return (self._anchor,) if self._policy == "rollback" else ()

    def will_save(self, step: int) -> None:
        """A checkpoint of `step` is about to be made, and says where its run goes back to."""
        if self._policy == "rollback" and step % self._every == 0:
            self._previous, self._anchor = self._anchor, step

    def after_step(self, step: int) -> None:
        """Without a folder, the anchor is renewed here; with one, it is where the last save worked."""
        if self._policy != "rollback" or step % self._every:
            return
        if self._keeper.checkpoints is None:
            self._memory, self._anchor = MemoryCheckpoint.of(self._trainer), step
        elif self._keeper.last_step != step:
            self._anchor = self._previous

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: JSON."""
        anchor = self._anchor if self._policy == "rollback" else None  # other runs have none
        return {"watch": self._watch.state_dict(), "rollbacks": self.rollbacks, "anchor": anchor}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Goes on from `state_dict`, which was saved at `step`: the anchor of a run that did not roll back until then."""
        self._watch.load_state_dict(state["watch"])
        self.rollbacks = state["rollbacks"]
        self._anchor = step if state["anchor"] is None else state["anchor"]
