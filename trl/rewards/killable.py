"""Processes that can be ended whatever they do, with every process that they started. POSIX only."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Inherited by whatever the process starts, so that a child which has left the process group is found too.
_MARK = "TRL_REWARD_PROCESS"
_MOST_OUTPUT = 16_384  # bytes of what it printed that are kept, its end
_CHUNK = 1 << 16


class Killable:
    """A process in a session of its own, its output read into a tail of a few kilobytes.

    Args:
        command: program and arguments.
        environment: of the process; a mark is added.
        stdin: a file descriptor, or None for no input.
        pass_fds: descriptors that stay open in it.
        folder: where it starts.

    Raises:
        ValueError: where there are no process groups (Windows).
        OSError: if it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        stdin: int | None = None,
        pass_fds: Sequence[int] = (),
        folder: str | None = None,
    ) -> None:
        if os.name != "posix":
            raise ValueError(f"a reward in a process of its own needs POSIX process groups; this is {sys.platform}")
        self._mark = secrets.token_hex(16)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, _MARK: self._mark},
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            cwd=folder,
        )
        assert self._process.stdout is not None
        self.output = self._process.stdout.fileno()
        os.set_blocking(self.output, False)
        self._tail = b""

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its group."""
        return self._process.pid

    @property
    def tail(self) -> str:
        """The end of what it printed."""
        return self._tail.decode("utf-8", "replace").strip()

    def has_ended(self) -> bool:
        """Whether the process itself has; it stays a zombie, so that its number is not given to another."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def read_output(self) -> bool:
        """Takes one piece of what it printed; False if there is none now, or never will be."""
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return False
        try:
            piece = os.read(self.output, _CHUNK)
        except BlockingIOError:
            return False
        self._tail = (self._tail + piece)[-_MOST_OUTPUT:]
        return bool(piece)

    def kill(self) -> str:
        """Ends it and its descendants, at once and for good.

        Returns:
            How the process itself ended: "exited with status 3", "was killed by SIGSEGV".
        """
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                # The group is gone, or (macOS) holds nothing but zombies.
                self._process.kill()
            for _ in range(100):  # a child may have been forking while we looked
                if not (left := self._marked()):
                    break
                for pid in left:
                    _kill(pid)
                time.sleep(0.001)
            self._process.wait()
            deadline = time.monotonic() + 0.1
            while self.read_output() and time.monotonic() < deadline:
                pass
            assert self._process.stdout is not None
            self._process.stdout.close()
        return _ending(self._process.returncode)

    def _marked(self) -> list[int]:
        """Living processes with our mark (Linux; elsewhere there is no way to look)."""
        mark = f"{_MARK}={self._mark}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue  # ended meanwhile, or somebody else's
        return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # ended meanwhile
        os.kill(pid, signal.SIGKILL)


def _ending(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
