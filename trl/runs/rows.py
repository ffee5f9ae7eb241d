"""Metrics rows of a managed run, and the timing of its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from trl.runs.samples import totals
from trl.trackers import CompletionRecord
from trl.trackers.plain import as_number
from trl.types import Scored, mean_and_std


def quantile(ordered: Sequence[float], share: float) -> float:
    """Quantile of sorted values, by linear interpolation between neighbours; NaN without values."""
    if not ordered:
        return math.nan
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


_QUANTILES = {"p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}


def scalars_of(stats: Mapping[str, Any], scored: Scored, records: Sequence[CompletionRecord]) -> dict[str, Any]:
    """Collects the scalars of a step and its rewards into a row; timings get the prefix `time/`.

    Args:
        stats: statistics of the trainer's step; arrays are dropped.
        scored: scores of the samples of all processes.
        records: the samples of all processes.
    """
    known = [total for total in totals(scored) if total is not None]
    mean, std = mean_and_std(known)
    ordered = sorted(known)
    row = {
        (rest if (rest := key.partition("/")[2]).startswith("time/") else key): number
        for key, value in stats.items()
        if (number := as_number(value)) is not None
    }
    return {
        "score/mean": mean,
        "score/std": std,
        **{f"score/{name}": quantile(ordered, share) for name, share in _QUANTILES.items()},
        **row,
        "tokens/truncated": sum(record.finish_reason == "length" for record in records) / len(records),
        **scored.statistics(),
    }


class Clock:
    """Times the parts of a step, in seconds."""

    def __init__(self) -> None:
        self._last = self._started = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Ends the part `name` and adds its duration to what the part has taken so far."""
        now = time.perf_counter()
        key = f"time/{name}"
        self._laps[key], self._last = self._laps.get(key, 0.0) + now - self._last, now

    def times(self, records: Sequence[CompletionRecord]) -> dict[str, float]:
        """Seconds of the parts and of the step so far, and its speed over the samples of all processes."""
        seconds = time.perf_counter() - self._started
        return {
            **self._laps,
            "time/step": seconds,
            "time/tokens_per_second": sum(record.length for record in records) / seconds,
            "time/samples_per_second": len(records) / seconds,
        }
