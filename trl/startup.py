"""Environment variables that must be set before torch is imported, and whether the machine is busy.

Our own commands call this; a script sets the variables itself (docs/how-to/command-line.md, "Threads").
"""

from __future__ import annotations

import os
import signal
import threading

WAITING = {"OMP_WAIT_POLICY": "passive"}
"""How OpenMP's threads wait for work. By default GNU's runtime spins for milliseconds before a thread sleeps, which takes the
core from whatever else runs. Fewer spins (`GOMP_SPINCOUNT`) change nothing beside a busy process; never to spin costs about a
tenth of a step of many small operations on an idle machine (`bench/under_load.py`, docs/performance.md)."""

WAITING_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_OTHER_DEFAULTS = {"TOKENIZERS_PARALLELISM": "false"}


def set_defaults() -> None:
    """Sets the variables that the user has not set. Call it before torch or tokenizers is imported."""
    if not any(name in os.environ for name in WAITING_CHOICES):
        os.environ.update(WAITING)
    for name, value in _OTHER_DEFAULTS.items():
        os.environ.setdefault(name, value)


def end_on_next_interrupt() -> None:
    """Lets another Ctrl-C end the process at once, while what the first one asks for is done."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_note() -> str | None:
    """A sentence if other programs use the machine, else None; call it before starting work of one's own."""
    if not hasattr(os, "getloadavg"):
        return None
    load, available = os.getloadavg()[0], cores()
    if load < 0.5 * available:
        return None
    return f"The machine is busy (load {load:.1f} on {available} cores): expect it to take up to {1 + load / available:.1f} times as long."
