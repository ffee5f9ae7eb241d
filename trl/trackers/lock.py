"""File lock that ensures a single writer per run."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import weakref
from pathlib import Path

logger = logging.getLogger(__name__)


class RunLocked(RuntimeError):
    """Raised when another process is writing this run."""


class RunLock:
    """Exclusive lock on a file, held until `release` or until the process ends for any reason.

    Uses the kernel's `flock`, so a killed process releases its lock at once; the process id in the file is only for
    people to read. Forked children do not inherit the lock.

    Args:
        path: lock file; created if missing and never removed, since otherwise two processes could lock two files of the
            same name.

    Raises:
        RunLocked: if another process, or another `RunLock` in this process, holds the lock; names the holder.
    """

    def __init__(self, path: Path) -> None:
        self.unreleased_by: str | None = None
        """Previous holder of the lock, if it ended without releasing it."""
        self._descriptor: int | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._descriptor, path)
            self.unreleased_by = _read_holder(self._descriptor) or None
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BaseException:
            self._close()
            raise
        if hasattr(os, "register_at_fork"):
            # A child's copy of the descriptor would keep the lock after the parent has ended.
            weak_self = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _forget(weak_self()))

    def release(self) -> None:
        """Releases the lock; further calls do nothing."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            self._close()

    def __del__(self) -> None:
        self._close()  # an unreferenced run can be reopened in the same process

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_being_written(folder: Path) -> bool:
    """Whether a living process of this machine says that it is writing the run; of other machines, whether any does.

    Reads the lock file and does not touch the lock: a reader must not get into a writer's way.
    """
    path = folder / ".lock"
    holder = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    match = re.fullmatch(r"process (\d+) on (.+)", holder)
    if match is None:
        return False
    if match[2] != socket.gethostname() or os.name != "posix":
        return True
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def _forget(lock: RunLock | None) -> None:
    if lock is not None:
        lock._close()


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        logger.warning(
            "cannot lock %s, since this system has no flock: make sure that only one process writes the run", path
        )
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            logger.warning("cannot lock %s (%s): make sure that only one process writes the run", path, error)
            return
        holder = _read_holder(descriptor) or "another process"
        raise RunLocked(
            f"the run {path.parent} is being written by {holder}; only one process may write a run"
        ) from error


def _read_holder(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    text = os.read(descriptor, 200).decode("utf-8", "replace")
    return "".join(character for character in text if character.isprintable())
