"""`TrainCallback`: base class for user callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl.training.run_state import Learner


class TrainCallback:
    """Callback base class whose methods do nothing; override those you need. See `trl.protocols.Callback`."""

    def on_start(self, trainer: Learner, step: int) -> None:
        """Called before the first step of each `train` call."""

    def on_step(self, trainer: Learner, step: int, row: Mapping[str, Any]) -> bool | None:
        """Called after a step; return True to end the run."""
        return None

    def on_save(self, trainer: Learner, step: int, path: Path) -> None:
        """Called after a checkpoint is saved."""

    def on_end(self, trainer: Learner, result: Any) -> None:
        """Called after the run."""
