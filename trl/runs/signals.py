"""SIGTERM and SIGINT as a wish that the loop grants between two steps."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class SignalWatch:
    """Notes the first SIGTERM or SIGINT while it is entered; a second SIGINT raises KeyboardInterrupt at once.

    Signals can be watched by the main thread alone: in another one nothing is changed, and `received` stays None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is not threading.main_thread():
            logger.info("not in the main thread: SIGTERM and SIGINT do what they did before")
            return self
        for number in _WATCHED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: set by another language than Python, which cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number


def raise_for(number: int) -> None:
    """Ends the program as its signal asks: KeyboardInterrupt for SIGINT (130 in a shell), else SystemExit(128 + number)."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
