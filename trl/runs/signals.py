"""Defers SIGTERM and SIGINT so that the loop can stop cleanly between two steps."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NOTICE = b"\nfinishing this step and saving it; Ctrl-C again stops at once\n"


class SignalWatch:
    """Context manager that records the first SIGTERM or SIGINT; a later SIGINT raises KeyboardInterrupt at once.

    Python handles signals only in the main thread: in any other, this does nothing and `received` stays None.

    Args:
        announce: on the first SIGINT, say on standard error that the run stops after this step.
    """

    def __init__(self, announce: bool = False) -> None:
        self.received: int | None = None
        self._announce = announce
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
            if self._announce and number == signal.SIGINT:
                os.write(2, _NOTICE)  # unbuffered: the handler may have interrupted a write


def raise_for(number: int) -> None:
    """Raises a signal's exception: KeyboardInterrupt for SIGINT (130 in a shell), else SystemExit(128 + number)."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
