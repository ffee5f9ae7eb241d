"""Where a reward function runs: here, or on a thread that is given up after a while. Standard library only."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from trl.rewards.failures import RewardFailed
from trl.rewards.signature import Binding, call, copied
from trl.rewards.values import Row, read_answer

if TYPE_CHECKING:
    from trl.types import Sample

Item = TypeVar("Item")
Result = TypeVar("Result")

# Threads given up that may still run before scoring is refused: each holds memory and perhaps a core.
_MOST_LOST = 16


# Names the random numbers of a call: rewards in processes of their own draw those that follow from it. "": no matter which.
random_stream: ContextVar[str] = ContextVar("random_stream", default="")


@contextmanager
def drawing_from(stream: str) -> Iterator[None]:
    """Inside, rewards in processes of their own draw the random numbers that `stream` names, the same each time."""
    token = random_stream.set(stream)
    try:
        yield
    finally:
        random_stream.reset(token)


class Runner(Protocol):
    """Calls one reward function."""

    @property
    def binding(self) -> Binding:
        """How the function wants to be called."""
        ...

    def run(self, samples: Sequence[Sample]) -> list[Row]:
        """One row per sample, or an exception."""
        ...

    def close(self) -> None:
        """Ends what it started."""
        ...


class Inline:
    """Calls the function on the caller's thread."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.name = name
        self.binding = Binding.of(function, name)

    def run(self, samples: Sequence[Sample]) -> list[Row]:
        """See `Runner`."""
        columns = self.binding.wanted(samples, self.name)
        answer = guarded(self.function, *self.binding.arguments(copied(samples, columns), columns))
        return read_answer(answer, [len(sample.completion_ids) for sample in samples])

    def close(self) -> None:
        """See `Runner`."""


class Threaded:
    """Calls the function on a thread of its own and gives it up after `timeout` seconds: it may go on running, since
    a thread cannot be killed, but nobody waits for it.
    """

    def __init__(self, function: Callable[..., Any], name: str, timeout: float | None) -> None:
        self.inline = Inline(function, name)
        self.binding = self.inline.binding
        self.timeout = timeout
        self.lost: list[threading.Thread] = []

    def run(self, samples: Sequence[Sample]) -> list[Row]:
        """See `Runner`.

        Raises:
            RewardFailed: if too many threads that were given up still run.
        """
        self.lost = [thread for thread in self.lost if thread.is_alive()]
        if len(self.lost) >= _MOST_LOST:
            raise RewardFailed(
                f"{len(self.lost)} calls of reward {self.inline.name!r} still run long after their timeout of "
                f"{self.timeout:g} s: isolation='process' can end them, a thread cannot be"
            )
        return call_within(self.timeout, lambda: self.inline.run(samples), given_up=self.lost)

    def close(self) -> None:
        """See `Runner`."""


def guarded(function: Callable[..., Any], positional: Sequence[Any], named: dict[str, Any]) -> Any:
    """Calls somebody's function; a process that it forks off and lets return here ends here.

    Raises:
        Whatever it raises; a `SystemExit` as a RuntimeError, since ending the process is not a reward's to decide.
    """
    home = os.getpid()
    try:
        return call(function, positional, named)
    except SystemExit as error:
        raise RuntimeError(f"the reward called sys.exit({error.code!r})") from error
    finally:
        if os.getpid() != home:
            os._exit(0)  # else there would be two trainers


def call_within(
    seconds: float | None, function: Callable[[], Result], given_up: list[threading.Thread] | None = None
) -> Result:
    """Calls `function` on a thread of its own.

    Args:
        seconds: to wait for it; None waits for ever.
        function: without arguments.
        given_up: gets the thread if it takes longer.

    Raises:
        TimeoutError: after `seconds`.
    """
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((True, function()))
        except BaseException as error:  # handed to the thread that waits
            outcome.put((False, error))

    # A daemon: one that hangs must not keep the interpreter from ending.
    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    try:
        succeeded, value = outcome.get(timeout=seconds)
    except queue.Empty:
        if given_up is not None:
            given_up.append(thread)
        raise TimeoutError(f"the call took longer than its timeout of {seconds:g} s") from None
    if not succeeded:
        raise value
    return value


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """`[function(item) for item in items]`, `threads` of them at a time.

    Raises:
        The error of the first item, in their order, that has one, once all are done. An interrupt of the caller is
        raised at once: no further item is begun.
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
            except BaseException as error:  # handed to the thread that waits
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
