"""Runs a reward function in a worker process that can be killed at any time."""

from __future__ import annotations

import json
import os
import selectors
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trl.rewards.failures import ColumnError, Failure, RewardFailed, RowFailed
from trl.rewards.isolation import random_stream
from trl.rewards.killable import Killable
from trl.rewards.signature import Binding, path_of
from trl.rewards.values import Row, decode, decode_failure

if TYPE_CHECKING:
    from trl.types import Sample

_BOOTSTRAP = "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); from trl.rewards.worker import main; main()"
_MAX_ANSWER_BYTES = 1 << 28  # maximum size of an answer in bytes
_GRACE = 0.25  # seconds after the timeout for the worker to print where it hung
_TICK = 0.05  # seconds between checks that the worker is alive


class Process:
    """Calls a function in a worker process, started on first use and restarted after a timeout or crash.

    Samples and rows travel as JSON. The function's output is discarded, except for its end, which is part of the error
    if the process dies.

    Args:
        function: "module:function", or a function at the top level of a module.
        name: name of the reward, for messages.
        timeout: seconds per call; None waits forever.
        start_timeout: seconds for the worker to import the module.

    Raises:
        ValueError: if another process could not import the function by name.
    """

    def __init__(
        self, function: str | Callable[..., Any], name: str, timeout: float | None, start_timeout: float
    ) -> None:
        self.path = function if isinstance(function, str) else path_of(function)
        self.name = name
        self.timeout = timeout
        self.start_timeout = start_timeout
        self._worker: _Worker | None = None
        self._binding: Binding | None = None

    @property
    def binding(self) -> Binding:
        """How to call the function; starts the worker if needed."""
        self._running_worker()
        assert self._binding is not None
        return self._binding

    def run(self, samples: Sequence[Sample]) -> list[Row]:
        """See `Runner`.

        Raises:
            RowFailed: if the function raised, timed out or crashed the worker. After a timeout or crash, the worker
                and its children are killed.
            RewardFailed: if the worker cannot be started.
            ColumnError: if a column is missing or not JSON-serializable.
        """
        worker = self._running_worker()
        assert self._binding is not None
        columns = self._binding.columns_to_pass(samples, self.name)
        stream_name = random_stream.get()
        stream_key = f"{stream_name}/{self.name}" if stream_name else None
        message = _request(samples, self._binding, columns, self.timeout, self.name, stream_key)
        lengths = [len(sample.completion_ids) for sample in samples]
        try:
            answer = worker.exchange(message, self.timeout)
        except BaseException:  # timeout, crash or interrupt: a late answer must not reach the next call
            self.close()
            raise
        if "failure" in answer:
            raise RowFailed(decode_failure(answer["failure"]))
        return decode(answer.get("rows"), lengths)

    def close(self) -> None:
        """Kills the worker and its children."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _running_worker(self) -> _Worker:
        if self._worker is None:
            worker = _Worker(self.path)
            try:
                greeting = worker.exchange(None, self.start_timeout)
            except RowFailed as error:
                worker.close()
                reason = error.failure.traceback
                raise RewardFailed(
                    f"the worker process of reward {self.name!r} ({self.path}) could not start: {reason}"
                ) from error
            except BaseException:
                worker.close()
                raise
            if "failure" in greeting:
                worker.close()
                failure = decode_failure(greeting["failure"])
                raise RewardFailed(f"reward {self.name!r} ({self.path}) cannot be imported: {failure.traceback}")
            self._binding = Binding.from_json(greeting["binding"])
            self._worker = worker
        return self._worker


class _Worker:
    """A running worker process with its request and answer pipes."""

    def __init__(self, path: str) -> None:
        worker_requests, self.requests = os.pipe()
        self.answers, worker_answers = os.pipe()
        try:
            folders = "\n".join(folder for folder in sys.path if isinstance(folder, str))
            command = [sys.executable, "-c", _BOOTSTRAP, folders, path, str(worker_requests), str(worker_answers)]
            self.process = Killable(command, environment=os.environ, pass_fds=(worker_requests, worker_answers))
        except BaseException:
            os.close(self.requests)
            os.close(self.answers)
            raise
        finally:
            os.close(worker_requests)
            os.close(worker_answers)
        os.set_blocking(self.requests, False)
        os.set_blocking(self.answers, False)

    def exchange(self, message: bytes | None, seconds: float | None) -> dict[str, Any]:
        """Sends a message, if any, and waits for the next answer while draining the worker's output.

        Raises:
            RowFailed: if the worker does not answer within `seconds`, dies, or sends an invalid answer.
        """
        start = time.monotonic()
        unsent, answer, printing = memoryview(message or b""), bytearray(), True
        while not answer.endswith(b"\n"):
            ended = self.process.has_ended()  # checked before reading the pipes, so that no last answer is missed
            ready = self._ready(writing=bool(unsent), printing=printing)
            if self.requests in ready:
                unsent = unsent[_write(self.requests, unsent) :]
            if self.process.output in ready:
                printing = self.process.read_output()
            if self.answers in ready:
                chunk = os.read(self.answers, 1 << 16)
                if not chunk:  # the worker died or closed its end: no answer will come
                    raise self._failed(start, seconds)
                answer += chunk
                if len(answer) > _MAX_ANSWER_BYTES:
                    raise RowFailed(
                        Failure.saying(f"ValueError: the reward's answer exceeds {_MAX_ANSWER_BYTES} bytes")
                    )
            elif ended or (seconds is not None and time.monotonic() > start + seconds + _GRACE):
                raise self._failed(start, seconds)
        return _parse(bytes(answer))

    def _failed(self, start: float, seconds: float | None) -> RowFailed:
        """Kills the process and returns an error that says how it ended or that it timed out."""
        timed_out = seconds is not None and time.monotonic() > start + seconds
        exit_deadline = time.monotonic() + _TICK
        while not (timed_out or self.process.has_ended()) and time.monotonic() < exit_deadline:
            time.sleep(0.001)  # its pipes are closed, so it is about to exit: its own status says more than our SIGKILL
        ending = self.process.kill()
        line = f"TimeoutError: the call took longer than its timeout of {seconds:g} s" if timed_out else ""
        line = line or f"the reward's process {ending}"
        tail = self.process.tail
        return RowFailed(Failure(line, f"{line}; end of its output:\n{tail}" if tail else line))

    def close(self) -> None:
        """Kills the process and closes the pipes."""
        self.process.kill()
        os.close(self.requests)
        os.close(self.answers)

    def _ready(self, writing: bool, printing: bool) -> set[int]:
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            if printing:
                selector.register(self.process.output, selectors.EVENT_READ)
            if writing:
                selector.register(self.requests, selectors.EVENT_WRITE)
            return {key.fd for key, _ in selector.select(_TICK)}


def _request(
    samples: Sequence[Sample],
    binding: Binding,
    columns: Sequence[str],
    timeout: float | None,
    name: str,
    stream_key: str | None,
) -> bytes:
    rows = []
    for sample in samples:
        row: dict[str, Any] = {"prompt": sample.prompt, "completion": sample.completion}
        row["prompt_ids"] = sample.prompt_ids if binding.reads_ids else ()
        row["completion_ids"] = sample.completion_ids if binding.reads_ids else ()
        row["columns"] = {column: sample.columns[column] for column in columns if column in sample.columns}
        rows.append(row)
    request: dict[str, Any] = {"samples": rows, "columns": columns, "seconds": timeout, "numbers": stream_key}
    request["lengths"] = [len(sample.completion_ids) for sample in samples]
    try:
        return json.dumps(request).encode("ascii") + b"\n"
    except (TypeError, ValueError) as error:
        raise ColumnError(
            f"a column of reward {name!r} ({', '.join(columns)}) cannot be sent to its worker process as JSON: {error}"
        ) from error


def _write(descriptor: int, data: memoryview) -> int:
    try:
        return os.write(descriptor, data)
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(data)  # the worker is gone: the missing answer will report it


def _parse(answer: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(answer)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise RowFailed(Failure.saying("ValueError: the reward's process sent an invalid answer"))
    return parsed
