"""Defers SIGTERM and SIGINT so that the loop can stop cleanly between two steps."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SignalWatch:
    """Context manager that records the first SIGTERM or SIGINT; a later SIGINT raises KeyboardInterrupt at once.

    Python handles signals only in the main thread: in any other, this does nothing and `received` stays None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is not threading.main_thread():
            logger.info("not in the main thread: SIGTERM and SIGINT keep their handlers")
            return self
        for number in _SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            # None: the handler was not installed from Python and cannot be restored from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous_handlers.clear()

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number


def raise_for(number: int) -> None:
    """Raises a signal's exception: KeyboardInterrupt for SIGINT (130 in a shell), else SystemExit(128 + number)."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
