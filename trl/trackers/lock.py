"""One writer per run."""

from __future__ import annotations

import errno
import logging
import os
import socket
import weakref
from pathlib import Path

logger = logging.getLogger(__name__)


class RunLocked(RuntimeError):
    """Another process writes this run."""


class RunLock:
    """Holds a lock on a file until `release`, or until this process is gone, however it went.

    The lock is the kernel's (`flock`), so that what a killed process held is free at once; the process id in the file
    only tells people who holds it. A forked child does not inherit it.

    Args:
        path: of the lock file; made if missing, and left in place for good, since removing it would let two processes
            lock two files of the same name.

    Raises:
        RunLocked: if another process, or another `RunLock` of this one, holds it; names the process.
    """

    def __init__(self, path: Path) -> None:
        self.left_by: str | None = None
        """The process that held the lock last, if it ended without releasing it."""
        self._descriptor: int | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._descriptor, path)
            self.left_by = _content(self._descriptor) or None
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BaseException:
            self._close()
            raise
        if hasattr(os, "register_at_fork"):
            # The child's copy of the descriptor would keep the lock of a parent that is gone.
            mine = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _forget(mine()))

    def release(self) -> None:
        """Lets others write; a second call does nothing."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            self._close()

    def __del__(self) -> None:
        self._close()  # a run that was forgotten can be opened again in the same process

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _forget(lock: RunLock | None) -> None:
    if lock is not None:
        lock._close()


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        logger.warning("%s is not locked, since this system has no flock: see to it that a run has one writer", path)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            logger.warning("%s is not locked (%s): see to it that a run has one writer", path, error)
            return
        holder = _content(descriptor) or "another process"
        raise RunLocked(f"the run {path.parent} is being written by {holder}; a run has one writer") from error


def _content(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    text = os.read(descriptor, 200).decode("utf-8", "replace")
    return "".join(character for character in text if character.isprintable())
