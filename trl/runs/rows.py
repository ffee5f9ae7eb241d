"""A step as a row of numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from trl.runs.samples import totals
from trl.trackers.plain import as_number
from trl.types import Scored


def numbers_of(stats: Mapping[str, Any], scored: Scored) -> dict[str, Any]:
    """Every number that a step and its rewards have; what is a time stands under `time/`.

    Args:
        stats: as from `PPOTrainer.step`; arrays are left out.
        scored: of the samples of all processes.
    """
    known = [total for total in totals(scored) if total is not None]
    mean = math.fsum(known) / len(known) if known else math.nan
    spread = math.sqrt(math.fsum((total - mean) ** 2 for total in known) / len(known)) if known else math.nan
    row = {
        (key.removeprefix("ppo/") if key.startswith("ppo/time/") else key): number
        for key, value in stats.items()
        if (number := as_number(value)) is not None
    }
    return {"score/mean": mean, "score/std": spread, **row, **scored.statistics()}


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self._last = self._started = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The part `name` ends here."""
        now = time.perf_counter()
        self.laps[f"time/{name}"], self._last = now - self._last, now

    def total(self) -> float:
        """Seconds since the step began."""
        self.laps["time/step"] = time.perf_counter() - self._started
        return self.laps["time/step"]


class Logged:
    """The trackers of `PPOConfig.log_with`, which are accelerate's."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Passes a row on."""
        self._accelerator.log(dict(row), step=step)

    def close(self) -> None:
        """They belong to the trainer, which may go on."""
