"""Detection of spikes in KL and loss relative to recent steps."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Values to observe before the bounds apply. The loss jumps when the first samples score, so it needs more.
_EARLIEST = {"kl": 1, "loss": 3}


class SpikeError(RuntimeError):
    """Raised when too many consecutive batches spike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeSettings:
    """Thresholds that define a spike.

    A value spikes if it is not finite, exceeds an absolute bound, or exceeds a multiple of its running median. The
    median is raised to at least a floor, so that noise around zero does not count.

    Raises:
        ValueError: if a field is out of range; the message names it.
    """

    kl: float | None = 10.0
    """Bound on `objective/kl`, checked before the update, as a multiple of its median. None: no such bound."""
    kl_floor: float = 1.0
    """Minimum used for the median KL, in nats per sequence."""
    kl_above: float | None = None
    """Absolute bound on the KL, in nats per sequence. None: no such bound."""
    loss: float | None = 10.0
    """Bound on |`ppo/loss/total`|, checked after the update, as a multiple of its median. None: no such bound."""
    loss_floor: float = 0.1
    """Minimum used for the median of the absolute loss."""
    loss_above: float | None = None
    """Absolute bound on the loss. None: no such bound."""
    window: int = 50
    """Number of recent steps in the median."""
    least: int = 10
    """Number of steps to observe before the median bounds apply. Until then, a value spikes above the same multiple of
    the largest value so far."""
    most_in_a_row: int = 3
    """Consecutive batches that may be skipped or rolled back before the run ends with an error."""

    def __post_init__(self) -> None:
        for name in ("kl", "loss"):
            value = getattr(self, name)
            if value is not None and not value > 1:
                raise ValueError(f"{name}={value!r} must be a factor above 1, or None")
        for name in ("kl_floor", "loss_floor", "kl_above", "loss_above"):
            value = getattr(self, name)
            if not (value is None and name.endswith("above")) and not (value is not None and value > 0):
                raise ValueError(f"{name}={value!r} must be a number above 0")
        for name in ("window", "least", "most_in_a_row"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


class SpikeDetector:
    """Compares a step's KL and loss with those of recent steps. Its inputs must be the same on every process."""

    def __init__(self, settings: SpikeSettings) -> None:
        self.settings = settings
        self.in_a_row = 0  # consecutive batches skipped or rolled back so far
        self._history = {name: deque[float](maxlen=settings.window) for name in ("kl", "loss")}

    def spike(self, name: str, value: float) -> str | None:
        """Why `value` of "kl" or "loss" is a spike; None if it is not."""
        settings, history = self.settings, self._history[name]
        factor, above = getattr(settings, name), getattr(settings, f"{name}_above")
        value = abs(value) if name == "loss" else value
        if not math.isfinite(value):
            return f"the {name} is {value}"
        if above is not None and value > above:
            return f"the {name} is {value:.4g}, above {above:g}"
        if factor is None or len(history) < min(settings.least, settings.window, _EARLIEST[name]):
            return None
        # The first steps of a healthy run may multiply a median of small values, but hardly the largest value so far.
        typical = statistics.median(history) if len(history) >= min(settings.least, settings.window) else max(history)
        typical = max(typical, getattr(settings, f"{name}_floor"))
        if value > factor * typical:
            return f"the {name} is {value:.4g}, more than {factor:g} times {typical:.4g}"
        return None

    def remember(self, name: str, value: float) -> None:
        """Adds `value` to the history that the median is computed from."""
        if math.isfinite(value):
            self._history[name].append(abs(value) if name == "loss" else value)

    def count(self, reason: str) -> None:
        """Counts a batch that was skipped or rolled back.

        Raises:
            SpikeError: if there are too many in a row.
        """
        self.in_a_row += 1
        if self.in_a_row > self.settings.most_in_a_row:
            raise SpikeError(
                f"{self.in_a_row} batches in a row spiked (most_in_a_row={self.settings.most_in_a_row}); the last "
                f"because {reason}. Check the learning rate, the scores and objective/kl"
            )

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state, for checkpoints."""
        return {"in_a_row": self.in_a_row, **{name: list(history) for name, history in self._history.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self.in_a_row = state["in_a_row"]
        for name, history in self._history.items():
            history.clear()
            history.extend(state[name])
