"""Position and counters of a managed run, as its checkpoints hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl.data import PromptSampler
from trl.redaction import redact
from trl.rewards.failures import ErrorBudget
from trl.runs.inputs import RunInputs
from trl.runs.rollback import SpikePolicy
from trl.state.checkpoints import Checkpoint
from trl.training.processes import share_json

_VERSION = 1  # format version of the loop's state in a checkpoint


@dataclass(kw_only=True)
class LoopState:
    """State that the loop carries from step to step, apart from the trainer's own."""

    accelerator: Any
    inputs: RunInputs
    sampler: PromptSampler
    budgets: Sequence[ErrorBudget]  # of this process's reward
    spikes: SpikePolicy
    step: int = 0
    empty_in_a_row: int = 0  # consecutive batches without a score
    skipped_batches: int = 0  # batches that were not trained on
    best_eval: float = -math.inf

    def extra(self) -> dict[str, Any]:
        """The state as JSON, for a checkpoint's `extra`. Every process must call this."""
        return {
            "run": {
                "version": _VERSION,
                "prompts": self.inputs.fingerprint,
                "data": self.inputs.digests,
                "sampler": self.sampler.state_dict(),
                # Tracebacks may contain secrets.
                "budgets": share_json(self.accelerator, [redact(budget.state_dict()) for budget in self.budgets]),
                "spikes": self.spikes.state_dict(),
                "counts": {"empty_in_a_row": self.empty_in_a_row, "skipped_batches": self.skipped_batches},
                "best_eval": self.best_eval if math.isfinite(self.best_eval) else None,
            }
        }

    def differences(self, checkpoint: Checkpoint) -> list[str]:
        """Reasons why a checkpoint belongs to a different run, apart from those found by the trainer."""
        state = checkpoint.state["extra"].get("run")
        if state is None or state["version"] != _VERSION:
            return ["it was not saved by `train` of this version"]
        reasons = []
        if state["prompts"] != self.inputs.fingerprint:
            reasons.append("its prompts have other ids or tokens")
        if (seed := state["sampler"]["seed"]) != self.sampler.seed:
            reasons.append(f"seed was {seed}, is {self.sampler.seed}, which changes the order of the prompts")
        if (group_size := checkpoint.state["config"].get("group_size", 1)) != self.inputs.group_size:
            reasons.append(
                f"group_size was {group_size}, is {self.inputs.group_size}, which changes the order of the prompts"
            )
        return reasons

    def restore(self, checkpoint: Checkpoint) -> list[str]:
        """Restores the state in a checkpoint; returns messages about changed data."""
        state = checkpoint.state["extra"]["run"]
        self.sampler.load_state_dict(state["sampler"])
        saved_budgets = state["budgets"][self.accelerator.process_index]
        for budget, saved in zip(self.budgets, saved_budgets, strict=False):
            budget.load_state_dict(saved)
        self.spikes.load_state_dict(state["spikes"], checkpoint.step)
        self.step = checkpoint.step
        self.empty_in_a_row = state["counts"]["empty_in_a_row"]
        self.skipped_batches = state["counts"]["skipped_batches"]
        self.best_eval = -math.inf if state["best_eval"] is None else state["best_eval"]
        return self._changed_data(state.get("data"))

    def _changed_data(self, saved: Mapping[str, Any] | None) -> list[str]:
        """Messages about allowed changes that affect the results: reward columns and held-out prompts."""
        if saved is None:
            return []
        messages = []
        for part, now in self.inputs.digests.items():
            before = saved[part]
            if names := [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]:
                messages.append(f"{part} have changed; the new data is used: {', '.join(names)}")
        return messages
