"""What a user's callback begins with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl.training.run_state import Learner


class TrainCallback:
    """A callback that does nothing: override what you need. See `trl.protocols.Callback`."""

    def on_start(self, trainer: Learner, step: int) -> None:
        """Before the first step of a call of `train`."""

    def on_step(self, trainer: Learner, step: int, row: Mapping[str, Any]) -> bool | None:
        """After a step; True ends the run."""
        return None

    def on_save(self, trainer: Learner, step: int, path: Path) -> None:
        """After a checkpoint."""

    def on_end(self, trainer: Learner, result: Any) -> None:
        """After the run."""
