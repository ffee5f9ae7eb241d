"""Programs that a test starts and that may start others: a deadline ends all of them, and shows where each was."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_TIME_TO_DUMP = 5.0  # most seconds from SIGABRT, at which Python's fault handler writes its stacks, to SIGKILL


def run_program(
    command: Sequence[str], *, cwd: str | Path, env: Mapping[str, str], timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, without a check of its exit code.

    `subprocess.run` with a timeout kills the command alone and then waits for all who hold its pipes: a launcher's ranks
    would keep it for ever. Here output goes to files, and the deadline ends the command's descendants too.

    Raises:
        AssertionError: at the deadline, with the end of both outputs and the stacks of the Python processes.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:

        def read(file: object) -> str:
            file.seek(0)  # type: ignore[attr-defined]
            return str(file.read())  # type: ignore[attr-defined]

        process = psutil.Popen(
            list(command), cwd=str(cwd), env={**env, "PYTHONFAULTHANDLER": "1"},
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
        )  # fmt: skip
        try:
            process.wait(timeout)
        except psutil.TimeoutExpired:
            end_all([*process.children(recursive=True), process])
            raise AssertionError(
                f"{' '.join(command)} did not end within {timeout:g} s\n{read(stdout)[-3000:]}\n{read(stderr)[-9000:]}"
            ) from None
        return subprocess.CompletedProcess(list(command), process.returncode, read(stdout), read(stderr))


def end_all(processes: Sequence[psutil.Process]) -> None:
    """Makes every process write its stacks, then kills it."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(processes, timeout=_TIME_TO_DUMP)
