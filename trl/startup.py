"""Environment variables that must be set before torch is imported, and whether the machine is busy.

Our own commands call this; a script sets the variables itself (docs/how-to/command-line.md, "Threads").
"""

from __future__ import annotations

import os
import signal
import threading

WAITING = {"OMP_WAIT_POLICY": "passive"}
"""How OpenMP's threads wait for work. By default GNU's runtime spins for milliseconds before a thread sleeps, which
takes the core from whatever else runs. Fewer spins (`GOMP_SPINCOUNT`) change nothing beside a busy process; never to
spin costs about a tenth of a step of many small operations on an idle machine (`bench/under_load.py`,
docs/performance.md)."""

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


def cores_in_use(seconds: float = 0.3) -> float:
    """Number of cores that all programs use together, measured for so long."""
    import psutil

    return float(psutil.cpu_percent(interval=seconds)) / 100 * (psutil.cpu_count() or 1)


def busy_note() -> str | None:
    """A sentence if other programs use the machine, else None; call it before starting work of one's own."""
    available = cores()
    # The load is free to ask for, but an average over a minute: it still counts programs that have just ended.
    if hasattr(os, "getloadavg") and os.getloadavg()[0] < 0.5 * available:
        return None
    used = cores_in_use()
    if used < 0.25 * available:
        return None
    factor = 1 + used / available
    return f"Other programs use {used:.1f} of this machine's {available} cores: this may take up to {factor:.1f} times as long."


def spinning_note(threads: int) -> str | None:
    """A sentence if OpenMP's threads spin beside other programs, which slows a script down by far more than its share.

    Args:
        threads: number of threads that torch uses.
    """
    if threads < 2 or any(name in os.environ for name in WAITING_CHOICES) or busy_note() is None:
        return None
    return (
        "other programs use this machine, and OpenMP's threads spin while they wait for work: this run may take "
        "several times as long as it has to. Start Python with OMP_WAIT_POLICY=passive in the environment "
        "(docs/how-to/command-line.md, Threads)"
    )
