"""Subprocesses that can be killed reliably together with all their descendants. POSIX only."""

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

# Environment variable inherited by descendants, to find those that left the process group.
_MARKER_VARIABLE = "TRL_REWARD_PROCESS"
_MAX_OUTPUT_BYTES = 16_384  # bytes kept from the end of the output
_CHUNK_BYTES = 1 << 16


class Killable:
    """A process in its own session; the last 16 KiB of its output are kept.

    Args:
        command: program and arguments.
        environment: environment variables; a marker is added.
        stdin: file descriptor of standard input; None for no input.
        pass_fds: file descriptors to keep open in the process.
        folder: working directory.

    Raises:
        ValueError: on platforms without process groups (Windows).
        OSError: if the process cannot be started.
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
            raise ValueError(
                f"running a reward in a separate process needs POSIX process groups, which {sys.platform} lacks"
            )
        self._marker = secrets.token_hex(16)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, _MARKER_VARIABLE: self._marker},
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
        """Process id, which is also the process group id."""
        return self._process.pid

    @property
    def tail(self) -> str:
        """End of the output read so far."""
        return self._tail.decode("utf-8", "replace").strip()

    def has_ended(self) -> bool:
        """Whether the process has exited. It is not reaped, so that its id is not reused."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def read_output(self) -> bool:
        """Reads one chunk of output; returns False if there is none, now or at end of file."""
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return False
        try:
            chunk = os.read(self.output, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        self._tail = (self._tail + chunk)[-_MAX_OUTPUT_BYTES:]
        return bool(chunk)

    def kill(self) -> str:
        """Kills the process and its descendants with SIGKILL and reaps it.

        Returns:
            How the process ended: "exited with status 3", "was killed by SIGSEGV".
        """
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                # The group is gone or, on macOS, holds only zombies.
                self._process.kill()
            for _ in range(100):  # a descendant may have forked during the scan
                if not (survivors := self._marked_pids()):
                    break
                for pid in survivors:
                    _kill(pid)
                time.sleep(0.001)
            self._process.wait()
            deadline = time.monotonic() + 0.1
            while self.read_output() and time.monotonic() < deadline:
                pass
            assert self._process.stdout is not None
            self._process.stdout.close()
        return _describe_exit(self._process.returncode)

    def _marked_pids(self) -> list[int]:
        """Returns ids of live processes that carry our marker; always empty without `/proc`, as on macOS."""
        marker = f"{_MARKER_VARIABLE}={self._marker}".encode()
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if marker in (folder / "environ").read_bytes().split(b"\0"):
                    pids.append(int(folder.name))
            except OSError:
                continue  # exited meanwhile, or another user's
        return pids


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # exited meanwhile
        os.kill(pid, signal.SIGKILL)


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
