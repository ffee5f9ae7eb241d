"""Unit-test reward for generated code: the fraction of tests it passes."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import select
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trl.protocols import Sandbox
from trl.rewards.failures import ColumnError
from trl.rewards.isolation import in_threads
from trl.rewards.killable import Killable

if TYPE_CHECKING:
    from trl.types import Sample

logger = logging.getLogger(__name__)

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)

# Prints the number of passed tests on its last line, after a secret token withheld from the code: code that exits early
# or prints a result itself passes nothing.
_HARNESS = """
def main():
    import json, os, sys
    request = json.loads(sys.stdin.read())
    write, leave, out = os.write, os._exit, os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    token, code, tests = request["token"], request["code"], request["tests"]
    del request
    names, passed = {"__name__": "solution"}, 0
    try:
        exec(compile(code, "solution.py", "exec"), names)
    except BaseException:
        tests = []
    for test in tests:
        try:
            exec(compile(test, "test.py", "exec"), dict(names))
            passed += 1
        except BaseException:
            pass
    write(out, f"\\n{token} {passed}\\n".encode())
    leave(0)
main()
"""

_LIMITS = """
import resource
def limit(name, value):
    most = resource.getrlimit(name)[1]
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(name, (value, value))
limit(resource.RLIMIT_CPU, {cpu})
limit(resource.RLIMIT_AS, {memory})
limit(resource.RLIMIT_FSIZE, {file})
limit(resource.RLIMIT_NOFILE, 64)
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_NPROC, 0)
del resource, limit
"""


class UnitTestReward:
    """Scores the code in a completion by the fraction of its tests that pass, 0 to 1.

    The code is the completion's last fenced block, or the whole completion if it has none. Each test is Python source
    that sees the code's names and raises if the code is wrong (`assert add(1, 2) == 3`). Code that fails to load, times
    out or exits the process passes nothing. Code can still forge a result by searching the process's memory for the
    secret token: inspect the best-scored completions.

    A model under training may write code that does anything. The code therefore runs in `sandbox` or, with
    `unsafe_local=True`, in a local process: killable, limited in time, memory and file size, in an empty folder,
    without your environment variables and (unless you are root) without child processes, but with access to your files
    and network.

    Args:
        sandbox: runs the programs in isolation; see `trl.protocols.Sandbox`.
        unsafe_local: run the programs on this machine without a sandbox.
        column: dataset column with the tests, a string or a list of strings; None or empty makes the sample unscorable.
        seconds: time limit for code and tests together.
        memory: memory limit of the process in bytes, with `unsafe_local` only.
        all_or_nothing: score 1 if every test passes, else 0.
        concurrency: programs run at a time.

    Raises:
        ValueError: unless exactly one of `sandbox` and `unsafe_local` is given, or if an argument is out of range.
    """

    def __init__(
        self,
        sandbox: Sandbox | None = None,
        *,
        unsafe_local: bool = False,
        column: str = "tests",
        seconds: float = 10.0,
        memory: int = 1 << 30,
        all_or_nothing: bool = False,
        concurrency: int = 1,
    ) -> None:
        if (sandbox is None) != unsafe_local:
            raise ValueError(
                "UnitTestReward runs code written by a model: pass either sandbox=, or unsafe_local=True to run it on "
                f"this machine with your permissions; got sandbox={sandbox!r} and unsafe_local={unsafe_local}"
            )
        if not 0 < seconds < float("inf") or memory < 1 or concurrency < 1:
            raise ValueError(f"seconds={seconds}, memory={memory} and concurrency={concurrency} must be positive")
        if sandbox is None:
            warning = (
                "UnitTestReward(unsafe_local=True) runs code written by a model on this machine, with access to your "
                "files and network"
            )
            warnings.warn(warning, UserWarning, stacklevel=2)
            logger.warning(warning)
            sandbox = _LocalProcess(memory)
        self.sandbox = sandbox
        self.column = column
        self.seconds = seconds
        self.all_or_nothing = all_or_nothing
        self.concurrency = concurrency

    def __call__(self, samples: Sequence[Sample]) -> list[float | Exception | None]:
        """Returns one score per sample: None without tests, the exception if the sandbox fails."""
        if lacking := [i for i, sample in enumerate(samples) if self.column not in sample.columns]:
            raise ColumnError(f"UnitTestReward needs the column {self.column!r}, which sample {lacking[0]} lacks")
        return in_threads(self._score, samples, self.concurrency)

    def _score(self, sample: Sample) -> float | Exception | None:
        tests = _tests(sample.columns[self.column])
        if not tests:
            return None
        token = secrets.token_hex(16)
        request = json.dumps({"token": token, "code": code_of(sample.completion), "tests": tests})
        try:
            output = self.sandbox.run(_HARNESS, request, seconds=self.seconds)
        except Exception as error:
            return error
        passed = _passed(output or "", token, len(tests))
        return float(passed == len(tests)) if self.all_or_nothing else passed / len(tests)


def code_of(completion: str) -> str:
    """Returns the last fenced code block of a completion, or the whole text if it has none."""
    blocks = _FENCED.findall(completion)
    return blocks[-1] if blocks else completion


def _tests(value: Any) -> list[str]:
    tests = [value] if isinstance(value, str) and value else list(value or [])
    if non_strings := [test for test in tests if not isinstance(test, str)]:
        raise ColumnError(f"a test is of type {type(non_strings[0]).__name__}; expected Python source as a string")
    return tests


def _passed(output: str, token: str, test_count: int) -> int:
    match = re.search(rf"^{token} (\d+)\s*\Z", output, re.MULTILINE)
    return min(int(match[1]), test_count) if match else 0


class _LocalProcess:
    """Runs a program without a sandbox: a local process with resource limits, in an empty folder."""

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def run(self, program: str, text: str, *, seconds: float) -> str | None:
        """See `trl.protocols.Sandbox`."""
        limits = _LIMITS.format(cpu=int(seconds) + 1, memory=self.memory, file=1 << 24)
        deadline = time.monotonic() + seconds
        with tempfile.TemporaryDirectory(prefix="reward-") as folder, tempfile.TemporaryFile() as stdin:
            stdin.write(text.encode("ascii"))
            stdin.seek(0)
            environment = {"PATH": os.defpath, "HOME": folder, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
            command = [sys.executable, "-I", "-c", limits + program]
            process = Killable(command, environment=environment, stdin=stdin.fileno(), folder=folder)
            has_output = True
            try:
                while not process.has_ended():
                    if time.monotonic() > deadline:
                        return None
                    if has_output and select.select([process.output], [], [], 0.02)[0]:
                        has_output = process.read_output()
                    elif not has_output:
                        time.sleep(0.002)
            finally:
                process.kill()
            return process.tail
