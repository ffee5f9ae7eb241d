"""Runs reward functions in the calling thread, or in one that is abandoned on timeout. Standard library only."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from trl.rewards.failures import RewardFailed
from trl.rewards.signature import Binding, call, copy_samples
from trl.rewards.values import Row, read_answer

if TYPE_CHECKING:
    from trl.types import Sample

Item = TypeVar("Item")
Result = TypeVar("Result")

# Maximum number of abandoned threads still running; each holds memory and perhaps a core.
_MAX_ABANDONED = 16


# Seeds the random numbers of rewards in worker processes; "" leaves them unseeded.
random_stream: ContextVar[str] = ContextVar("random_stream", default="")


@contextmanager
def drawing_from(stream: str) -> Iterator[None]:
    """Within this context, rewards in worker processes seed their random generators from `stream`."""
    token = random_stream.set(stream)
    try:
        yield
    finally:
        random_stream.reset(token)


class Runner(Protocol):
    """Calls one reward function."""

    @property
    def binding(self) -> Binding:
        """How to call the function."""
        ...

    def run(self, samples: Sequence[Sample]) -> list[Row]:
        """Returns one row per sample, or raises."""
        ...

    def close(self) -> None:
        """Ends any process it started."""
        ...


class Inline:
    """Calls the function in the calling thread."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.name = name
        self.binding = Binding.of(function, name)

    def run(self, samples: Sequence[Sample]) -> list[Row]:
        """See `Runner`."""
        columns = self.binding.columns_to_pass(samples, self.name)
        answer = guarded(self.function, *self.binding.arguments(copy_samples(samples, columns), columns))
        return read_answer(answer, [len(sample.completion_ids) for sample in samples])

    def close(self) -> None:
        """See `Runner`."""


class Threaded:
    """Calls the function in a separate thread and abandons it after `timeout` seconds.

    Threads cannot be killed, so an abandoned call may keep running in the background.
    """

    def __init__(self, function: Callable[..., Any], name: str, timeout: float | None) -> None:
        self.inline = Inline(function, name)
        self.binding = self.inline.binding
        self.timeout = timeout
        self.abandoned: list[threading.Thread] = []

    def run(self, samples: Sequence[Sample]) -> list[Row]:
        """See `Runner`.

        Raises:
            RewardFailed: if too many abandoned threads are still running.
            TimeoutError: if the call takes longer than `timeout`.
        """
        self.abandoned = [thread for thread in self.abandoned if thread.is_alive()]
        if len(self.abandoned) >= _MAX_ABANDONED:
            raise RewardFailed(
                f"{len(self.abandoned)} timed-out calls of reward {self.inline.name!r} are still running "
                f"(timeout={self.timeout:g} s): a thread cannot be killed; use isolation='process'"
            )
        return call_within(self.timeout, lambda: self.inline.run(samples), abandoned=self.abandoned)

    def close(self) -> None:
        """See `Runner`."""


def guarded(function: Callable[..., Any], positional: Sequence[Any], named: dict[str, Any]) -> Any:
    """Calls a user's function; a forked child that returns from it exits here.

    Raises:
        Whatever the function raises; `SystemExit` becomes a RuntimeError, since a reward must not end the process.
    """
    parent_pid = os.getpid()
    try:
        return call(function, positional, named)
    except SystemExit as error:
        raise RuntimeError(f"the reward called sys.exit({error.code!r})") from error
    finally:
        if os.getpid() != parent_pid:
            os._exit(0)  # otherwise the child would run as a second trainer


def call_within(
    seconds: float | None, function: Callable[[], Result], abandoned: list[threading.Thread] | None = None
) -> Result:
    """Calls `function` in a separate thread and returns its result, or raises its exception.

    Args:
        seconds: timeout; None waits forever.
        function: takes no arguments.
        abandoned: the thread is appended to this list on timeout.

    Raises:
        TimeoutError: if the call takes longer than `seconds`.
    """
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((True, function()))
        except BaseException as error:  # re-raised in the waiting thread
            outcome.put((False, error))

    # A daemon, so that a hung call does not block interpreter exit.
    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    try:
        succeeded, value = outcome.get(timeout=seconds)
    except queue.Empty:
        if abandoned is not None:
            abandoned.append(thread)
        raise TimeoutError(f"the call took longer than its timeout of {seconds:g} s") from None
    if not succeeded:
        raise value
    return value


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """Returns `[function(item) for item in items]`, computed by up to `threads` threads.

    Raises:
        The exception of the first failed item, in item order, once all items are done. An interrupt propagates at once
        and no further items are started.
    """
    if threads <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, bool, Any]] = queue.SimpleQueue()
    for index in range(len(items)):
        waiting.put(index)
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, True, function(items[index])))
            except BaseException as error:  # re-raised in the waiting thread
                done.put((index, False, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=copy_context().run, args=(run,), name="reward", daemon=True).start()
    try:
        outcomes = {index: (succeeded, value) for index, succeeded, value in (done.get() for _ in items)}
    finally:
        stopped.set()
    for index in range(len(items)):
        succeeded, value = outcomes[index]
        if not succeeded:
            raise value
    return [outcomes[index][1] for index in range(len(items))]
