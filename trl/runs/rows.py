"""Metrics rows of a managed run, and the timing of its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from trl.runs.samples import totals
from trl.trackers.plain import as_number
from trl.types import Scored


def numbers_of(stats: Mapping[str, Any], scored: Scored) -> dict[str, Any]:
    """Collects the scalars of a step and its rewards into a row; timings get the prefix `time/`.

    Args:
        stats: statistics from `PPOTrainer.step`; arrays are dropped.
        scored: scores of the samples of all processes.
    """
    known = [total for total in totals(scored) if total is not None]
    mean = math.fsum(known) / len(known) if known else math.nan
    spread = math.sqrt(math.fsum((total - mean) ** 2 for total in known) / len(known)) if known else math.nan
    row = {
        (rest if (rest := key.partition("/")[2]).startswith("time/") else key): number
        for key, value in stats.items()
        if (number := as_number(value)) is not None
    }
    return {"score/mean": mean, "score/std": spread, **row, **scored.statistics()}


class Clock:
    """Times the parts of a step, in seconds."""

    def __init__(self) -> None:
        self._last = self._started = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Ends the part `name` and records its duration."""
        now = time.perf_counter()
        self.laps[f"time/{name}"], self._last = now - self._last, now

    def total(self) -> float:
        """Seconds since the step began; also recorded as `time/step`."""
        self.laps["time/step"] = time.perf_counter() - self._started
        return self.laps["time/step"]


class Logged:
    """Tracker that forwards to accelerate's trackers, as selected by `PPOConfig.log_with`."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Forwards a row."""
        self._accelerator.log(dict(row), step=step)

    def close(self) -> None:
        """Does nothing: the trackers belong to the trainer, which may still use them."""
