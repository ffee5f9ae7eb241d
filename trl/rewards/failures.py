"""What is known about a reward that failed, and when there are too many of them. Standard library only."""

from __future__ import annotations

import collections
import traceback
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl.types import Scored

_LINE = 300  # characters of an error in one line
_TRACEBACK = 8000  # characters of a traceback, its end


class RewardFailed(RuntimeError):
    """A reward failed and its `on_error` is "raise", or what it needs to run could not be started."""


class RewardErrors(RuntimeError):
    """More rewards failed than the error budget allows; the message has the commonest traceback."""


class ColumnError(ValueError):
    """The samples lack a column that a reward needs, or have it in a form that it cannot be given: no sample's fault."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one sample has no score."""

    line: str  # one line, without control characters
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What `error` says, with its traceback."""
        if isinstance(error, RowFailed):
            return error.failure
        text = str(error)
        line = f"{type(error).__name__}: {text}" if text else type(error).__name__
        return cls(one_line(line), "".join(traceback.format_exception(error))[-_TRACEBACK:].rstrip())

    @classmethod
    def saying(cls, text: str) -> Failure:
        """One without a traceback of its own."""
        return cls(one_line(text), text[-_TRACEBACK:])


class RowFailed(Exception):
    """A call failed elsewhere: the failure of each of its rows."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.line)
        self.failure = failure


def one_line(text: str) -> str:
    """`text` on one line of at most 300 characters, without control characters: it ends up on terminals."""
    words = " ".join(text[: 4 * _LINE].split())
    words = "".join(c for c in words if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return words if len(words) <= _LINE else words[: _LINE - 3] + "..."


class ErrorBudget:
    """Stops a run whose rewards fail too often.

    Args:
        share: of `window` samples, from 0 (the first error stops the run) to below 1.
        window: samples that are looked back on; > 0. The limit is `share * window` errors also while fewer samples were
            seen, so that one error at the start is not a share of 1.

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
        # One entry per sample: None, or the error's line and traceback.
        self._seen: collections.deque[tuple[str, str] | None] = collections.deque(maxlen=window)

    @property
    def errors(self) -> int:
        """Errors among the last `window` samples."""
        return sum(entry is not None for entry in self._seen)

    def record(self, scored: Scored) -> None:
        """Counts the errors of a batch.

        Raises:
            RewardErrors: if more than `share` of the last `window` samples failed.
        """
        tracebacks = scored.tracebacks or [None] * len(scored.errors)
        for line, trace in zip(scored.errors, tracebacks, strict=True):
            self._seen.append(None if line is None else (line, trace or line))
            if self.errors > self.share * self.window:
                raise RewardErrors(self._message())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: JSON."""
        return {"seen": [None if entry is None else list(entry) for entry in self._seen]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; with a smaller window, from its end."""
        entries: Sequence[Sequence[str] | None] = state["seen"]
        self._seen.clear()
        self._seen.extend(None if entry is None else (entry[0], entry[1]) for entry in entries)

    def _message(self) -> str:
        failed = [entry for entry in self._seen if entry is not None]
        places = [_place(trace) for _, trace in failed]
        place, count = collections.Counter(places).most_common(1)[0]
        line, trace = failed[places.index(place)]
        return (
            f"{len(failed)} of the last {len(self._seen)} samples have a reward error; at most {self.share:.0%} of "
            f"{self.window} are allowed. The commonest, {count} times: {line}\n{trace}"
        )


def _place(trace: str) -> str:
    """A traceback without its last line, which may differ from sample to sample: the same error at another number."""
    return trace.rpartition("\n")[0] or trace
