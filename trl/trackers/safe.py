"""`SafeTracker`: isolates the run from trackers that fail, hang or fall behind."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from trl.redaction import redact
from trl.trackers.plain import as_number

if TYPE_CHECKING:
    from trl.protocols import Tracker

logger = logging.getLogger(__name__)


class NullTracker:
    """Discards all rows."""

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class SafeTracker:
    """Runs a tracker on its own thread, behind a bounded queue.

    `log` never blocks and never raises. The tracker's first exception is logged and all are counted in `failures`; rows
    dropped because the queue was full or `close` timed out are counted in `dropped`. Rows arrive in order, with secrets
    redacted. The tracker must not draw from the global random generators, since the run uses them.

    Args:
        tracker: anything with `log(row, step)` and `close()`.
        name: name used in messages; the tracker's class name if None.
        capacity: maximum number of queued rows.
        close_timeout: maximum seconds that `close` waits for the tracker to take the remaining rows.

    Raises:
        ValueError: if `capacity` or `close_timeout` is out of range.
    """

    def __init__(
        self, tracker: Tracker, *, name: str | None = None, capacity: int = 256, close_timeout: float = 5.0
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1")
        if not 0 <= close_timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"close_timeout={close_timeout} must be 0 or more seconds")
        self.name = name or type(tracker).__name__
        self.failures = 0
        self.dropped = 0
        self._tracker = tracker
        self._capacity = capacity
        self._close_timeout = close_timeout
        self._rows: deque[tuple[dict[str, Any], int]] = deque()
        self._condition = threading.Condition()
        self._closing = False
        # A daemon thread, so that a hanging tracker does not keep the interpreter from exiting.
        self._thread = threading.Thread(target=self._run, name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Queues a row for the tracker's thread. The mapping is copied; arrays in it are not."""
        with self._condition:
            dropped = self._closing or len(self._rows) >= self._capacity
            if dropped:
                self.dropped += 1
                first = self.dropped == 1
            else:
                self._rows.append((dict(row), step))
                self._condition.notify()
        if dropped and first:
            reason = "is closed" if self._closing else f"is behind by {self._capacity} rows"
            logger.warning("tracker %s %s: dropping rows, starting at step %d", self.name, reason, step)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    def close(self) -> None:
        """Waits up to `close_timeout` seconds for the tracker, then drops the rows it has not taken; once."""
        deadline = time.monotonic() + self._close_timeout
        with self._condition:
            if self._closing:
                return
            self._closing = True
            self._condition.notify()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._condition:
            undelivered = len(self._rows)
            self.dropped += undelivered
            self._rows.clear()
        if self._thread.is_alive():
            logger.warning(
                "tracker %s did not finish within %g s: dropping %d rows", self.name, self._close_timeout, undelivered
            )

    def __enter__(self) -> SafeTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while (item := self._next_row()) is not None:
            row, step = item
            self._call_tracker(partial(self._forward, row, step), f"log of step {step}")
        self._call_tracker(self._tracker.close, "close")

    def _forward(self, row: dict[str, Any], step: int) -> None:
        numbers = {key: value for key, value in row.items() if as_number(value) is not None}
        others = {key: value for key, value in row.items() if key not in numbers}
        self._tracker.log(numbers | redact(others), step)

    def _next_row(self) -> tuple[dict[str, Any], int] | None:
        """Waits for the oldest row; None once closed and empty."""
        with self._condition:
            self._condition.wait_for(lambda: self._rows or self._closing)
            return self._rows.popleft() if self._rows else None

    def _call_tracker(self, call: Callable[[], None], description: str) -> None:
        try:
            call()
        except (Exception, SystemExit):  # no error of a tracker's client may stop the run
            self.failures += 1
            if self.failures == 1:
                formatted = redact(traceback.format_exc().rstrip())  # a client's error may quote its key
                logger.warning(
                    "tracker %s failed (%s); further failures are only counted\n%s", self.name, description, formatted
                )
