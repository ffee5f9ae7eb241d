"""Numbers of a step that are far above those of the steps before it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class SpikeError(RuntimeError):
    """Spikes came one after the other, whatever was done about them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeSettings:
    """What counts as a spike. A number is one if it is not finite, above an absolute bound, or above a multiple of its
    running median, which is taken for at least a floor: noise around nothing is no spike.

    Raises:
        ValueError: naming the field that is out of range.
    """

    kl: float | None = 10.0
    """`objective/kl`, before the update: multiple of its median; None: no such bound."""
    kl_floor: float = 1.0
    """Least median of the KL, in nats per sequence."""
    kl_above: float | None = None
    """Absolute bound of the KL, in nats per sequence."""
    loss: float | None = 10.0
    """|`ppo/loss/total`|, after the update: multiple of its median."""
    loss_floor: float = 0.1
    """Least median of the loss."""
    loss_above: float | None = None
    """Absolute bound of the loss."""
    window: int = 50
    """Steps that the median is of."""
    least: int = 10
    """Steps that must have been seen before a multiple of their median is a bound."""
    most_in_a_row: int = 3
    """Batches in a row that may be skipped, or rolled back from, before the run ends with an error."""

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


class SpikeWatch:
    """Compares a step's numbers with those of the steps before it, the same ones on every process."""

    def __init__(self, settings: SpikeSettings) -> None:
        self.settings = settings
        self.in_a_row = 0  # batches that were skipped or rolled back from, up to now
        self._seen = {name: deque[float](maxlen=settings.window) for name in ("kl", "loss")}

    def look(self, name: str, value: float) -> str | None:
        """Why `value` is a spike of "kl" or "loss"; None if it is not."""
        settings, seen = self.settings, self._seen[name]
        factor, above = getattr(settings, name), getattr(settings, f"{name}_above")
        value = abs(value) if name == "loss" else value
        if not math.isfinite(value):
            return f"the {name} is {value}"
        if above is not None and value > above:
            return f"the {name} is {value:.4g}, above {above:g}"
        if factor is not None and len(seen) >= min(settings.least, settings.window):
            median = max(statistics.median(seen), getattr(settings, f"{name}_floor"))
            if value > factor * median:
                return f"the {name} is {value:.4g}, more than {factor:g} times {median:.4g}"
        return None

    def remember(self, name: str, value: float) -> None:
        """`value` belongs to the run from now on."""
        if math.isfinite(value):
            self._seen[name].append(abs(value) if name == "loss" else value)

    def count(self, why: str) -> None:
        """A batch was skipped or rolled back from.

        Raises:
            SpikeError: if there were too many in a row.
        """
        self.in_a_row += 1
        if self.in_a_row > self.settings.most_in_a_row:
            raise SpikeError(
                f"{self.in_a_row} batches in a row spiked; the last one since {why}. Look at the learning rate, the scores "
                "and objective/kl"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: JSON."""
        return {"in_a_row": self.in_a_row, **{name: list(seen) for name, seen in self._seen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.in_a_row = state["in_a_row"]
        for name, seen in self._seen.items():
            seen.clear()
            seen.extend(state[name])
