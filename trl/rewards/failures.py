"""Reward errors: exceptions, per-sample failure records and the error budget. Standard library only."""

from __future__ import annotations

import collections
import traceback
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl.types import Scored

_MAX_LINE = 300  # maximum characters of a one-line message
_MAX_TRACEBACK = 8000  # characters kept from the end of a traceback
# Modules on the way to the user's function: their frames say nothing about a failure of it.
_CALLERS = frozenset(
    Path(__file__).with_name(f"{name}.py") for name in ("function", "isolation", "signature", "values", "worker")
)


class RewardFailed(RuntimeError):
    """A reward failed with `on_error="raise"`, its worker process could not start, or it returned an invalid result."""


class RewardErrors(RuntimeError):
    """More samples failed than the error budget allows; the message includes the most common traceback."""


class ColumnError(ValueError):
    """A column that a reward needs is missing or unusable: a configuration error, so it is never caught per sample."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why scoring one sample failed."""

    line: str  # one line, without control characters
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Builds a failure from an exception, with its traceback."""
        if isinstance(error, RowFailed):
            return error.failure
        text = str(error)
        line = f"{type(error).__name__}: {text}" if text else type(error).__name__
        return cls(one_line(line), "".join(_formatted(error))[-_MAX_TRACEBACK:].rstrip())

    @classmethod
    def saying(cls, text: str) -> Failure:
        """Builds a failure from a message, which doubles as the traceback."""
        return cls(one_line(text), text[-_MAX_TRACEBACK:])

    def __str__(self) -> str:
        """The message, followed by the traceback if it has any frames."""
        return f"{self.line}\n{self.traceback}" if "\n" in self.traceback else self.line


class RowFailed(Exception):
    """A call failed in a worker process; `failure` applies to each of its rows."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.line)
        self.failure = failure


def _formatted(error: BaseException) -> list[str]:
    """Formats a traceback without the frames of this package that only call the user's function or check its answer."""
    trace = error.__traceback__
    while trace is not None and Path(trace.tb_frame.f_code.co_filename) in _CALLERS:
        trace = trace.tb_next
    return traceback.format_exception(type(error), error, trace)


def one_line(text: str) -> str:
    """Squeezes `text` into one line of at most 300 characters, safe to print on a terminal."""
    words = " ".join(text[: 4 * _MAX_LINE].split())
    words = "".join(c for c in words if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return words if len(words) <= _MAX_LINE else words[: _MAX_LINE - 3] + "..."


class ErrorBudget:
    """Stops a run when too many rewards fail.

    Args:
        share: maximum fraction of failed samples in the window, in [0, 1); 0 stops the run at the first error.
        window: number of most recent samples to count over; > 0. The limit is `share * window` errors even before the
            window has filled, so that one early error does not stop the run.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, share: float = 0.1, window: int = 1000) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"share={share!r} must be a number from 0 to below 1")
        if window < 1:
            raise ValueError(f"window={window!r} must be a whole number of at least 1")
        self.share = share
        self.window = window
        # One entry per sample: None, or the error's (line, traceback).
        self._recent: collections.deque[tuple[str, str] | None] = collections.deque(maxlen=window)

    @property
    def errors(self) -> int:
        """Number of errors among the last `window` samples."""
        return sum(entry is not None for entry in self._recent)

    def record(self, scored: Scored) -> None:
        """Counts the errors of a batch.

        Raises:
            RewardErrors: if more than `share` of the last `window` samples failed.
        """
        tracebacks = scored.tracebacks or [None] * len(scored.errors)
        for line, trace in zip(scored.errors, tracebacks, strict=True):
            self._recent.append(None if line is None else (line, trace or line))
            if self.errors > self.share * self.window:
                raise RewardErrors(self._message())

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to checkpoint, as JSON-serializable values."""
        return {"seen": [None if entry is None else list(entry) for entry in self._recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`; a smaller window keeps the most recent samples."""
        entries: Sequence[Sequence[str] | None] = state["seen"]
        self._recent.clear()
        self._recent.extend(None if entry is None else (entry[0], entry[1]) for entry in entries)

    def _message(self) -> str:
        failed = [entry for entry in self._recent if entry is not None]
        locations = [_location(trace) for _, trace in failed]
        location, count = collections.Counter(locations).most_common(1)[0]
        line, trace = failed[locations.index(location)]
        return (
            f"the reward failed on {len(failed)} of the last {len(self._recent)} samples; the error budget allows "
            f"share={self.share:g} of window={self.window}. Most common error, {count} times: {line}\n{trace}"
        )


def _location(trace: str) -> str:
    """Returns a traceback without its last line, whose message may vary between samples, to group equal errors."""
    return trace.rpartition("\n")[0] or trace
