"""Wraps a reward function with isolation, concurrency and error handling."""

from __future__ import annotations

import collections
import logging
import math
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from trl.redaction import redact
from trl.rewards.failures import ColumnError, Failure, RewardFailed
from trl.rewards.isolated import Process
from trl.rewards.isolation import Inline, Runner, Threaded, in_threads
from trl.rewards.signature import resolve, with_every_column
from trl.rewards.values import Row, fits_float32
from trl.types import Sample, Scored

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Where a reward function runs and how its failures are handled.

    Raises:
        ValueError: if the settings contradict each other or are out of range.
    """

    on_error: Literal["raise", "skip", "penalty"] = "raise"
    """On failure: "raise" `RewardFailed`, "skip" the sample (its score is None), or score it `penalty` ("penalty")."""
    penalty: float | None = None
    """Score of a sample whose reward failed, for `on_error="penalty"`; the error is still reported."""
    isolation: Literal["none", "thread", "process"] = "none"
    """Where calls run: "none" in the caller, "thread" abandons them on timeout, "process" kills them on timeout."""
    timeout: float | None = None
    """Seconds per call, that is per `rows_per_call` samples."""
    start_timeout: float = 120.0
    """Seconds for a worker process to import the function's module."""
    concurrency: int = 1
    """Concurrent calls, each in its own thread (or process)."""
    rows_per_call: int | None = None
    """Samples per call, which fail together; None splits the batch evenly over `concurrency` calls."""

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip", "penalty"):
            raise ValueError(f"on_error={self.on_error!r} must be 'raise', 'skip' or 'penalty'")
        if self.isolation not in ("none", "thread", "process"):
            raise ValueError(f"isolation={self.isolation!r} must be 'none', 'thread' or 'process'")
        if (self.penalty is None) != (self.on_error != "penalty"):
            raise ValueError(
                f"penalty={self.penalty!r} and on_error={self.on_error!r} contradict each other: set a penalty if and "
                "only if on_error='penalty'"
            )
        if self.penalty is not None and not fits_float32(self.penalty):
            raise ValueError(f"penalty={self.penalty!r} must be a finite number that float32 can hold (up to 3.4e38)")
        if self.timeout is not None and self.isolation == "none":
            raise ValueError(f"timeout={self.timeout:g} needs isolation='thread' or 'process'")
        for name in ("timeout", "start_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be a positive, finite number of seconds")
        for name in ("concurrency", "rows_per_call"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


class FunctionReward:
    """Scores samples with a reward function under a guard.

    Args:
        function: `f(prompts, completions, **columns)`, `f(samples)`, or "module:function"; synchronous or asynchronous.
            It gets the columns named in its signature, and token ids if it names `prompt_ids` or `completion_ids`. It
            returns one value per sample: a number, None (unscorable), one number per completion token, or an exception
            (the sample failed).
        name: component name in statistics.
        guard: where the function runs and how its failures are handled.

    Raises:
        ValueError: if the function's signature does not fit a reward, or a worker process could not import it.
    """

    def __init__(self, function: str | Callable[..., Any], name: str, guard: Guard) -> None:
        self.name = name
        self.guard = guard
        runners = [_runner(function, name, guard) for _ in range(guard.concurrency)]
        self._runners: list[Runner] = runners
        # Each call takes one runner: a worker process serves one call at a time.
        self._idle_runners: queue.SimpleQueue[Runner] = queue.SimpleQueue()
        for runner in runners:
            self._idle_runners.put(runner)

    @property
    def reads_ids(self) -> bool:
        """Whether the function receives token ids. Starts the worker with `isolation="process"`."""
        return self._runners[0].binding.reads_ids

    def score(self, samples: Sequence[Sample]) -> Scored:
        """Scores samples in order.

        Raises:
            RewardFailed: if a sample fails and `on_error` is "raise"; under any `on_error` if no worker can start or
                too many timed-out threads are still running.
            ColumnError: if a column that the function needs is missing or cannot be passed to it.
        """
        if not samples:
            return Scored(scores=[], components={self.name: []}, token_rewards=[], seconds=[], errors=[], tracebacks=[])
        size = self.guard.rows_per_call or math.ceil(len(samples) / self.guard.concurrency)
        if size < len(samples) and not self._runners[0].binding.samples:
            samples = with_every_column(samples)
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]
        rows: list[Row] = []
        seconds: list[float] = []
        for part, (part_rows, part_seconds) in zip(
            parts, in_threads(self._call, parts, self.guard.concurrency), strict=True
        ):
            rows += part_rows
            seconds += [part_seconds] * len(part)
        self._warn_about([row for row in rows if isinstance(row, Failure)], len(rows))
        return self._scored(rows, seconds)

    def close(self) -> None:
        """Ends any worker processes."""
        for runner in self._runners:
            runner.close()

    def _call(self, samples: Sequence[Sample]) -> tuple[list[Row], float]:
        started = time.perf_counter()
        rows: list[Row]
        with self._idle_runner() as runner:
            try:
                rows = runner.run(samples)
            except (ColumnError, RewardFailed):
                raise
            except Exception as error:
                rows = [Failure.of(error)] * len(samples)
        seconds = time.perf_counter() - started
        if self.guard.on_error == "raise":
            for row, sample in zip(rows, samples, strict=True):
                if isinstance(row, Failure):
                    raise RewardFailed(f"reward {self.name!r} failed on {_describe(sample)}: {row}")
        return rows, seconds

    @contextmanager
    def _idle_runner(self) -> Iterator[Runner]:
        runner = self._idle_runners.get()
        try:
            yield runner
        finally:
            self._idle_runners.put(runner)

    def _warn_about(self, failures: Sequence[Failure], count: int) -> None:
        if failures:
            line, times = collections.Counter(failure.line for failure in failures).most_common(1)[0]
            logger.warning(
                "reward %r failed on %d of %d samples (on_error=%r). Most common error, %d times: %s",
                self.name, len(failures), count, self.guard.on_error, times, redact(line),
            )  # fmt: skip

    def _scored(self, rows: Sequence[Row], seconds: list[float]) -> Scored:
        failed = [isinstance(row, Failure) for row in rows]
        values = [self.guard.penalty if has_failed else row for has_failed, row in zip(failed, rows, strict=True)]
        scores: list[float | None] = []
        totals: list[float | None] = []
        tokens: list[list[float] | None] = []
        for value in values:
            assert not isinstance(value, Failure)
            scores.append(0.0 if isinstance(value, list) else value)
            totals.append(math.fsum(value) if isinstance(value, list) else value)
            tokens.append(value if isinstance(value, list) else None)
        return Scored(
            scores=scores,
            components={self.name: totals},
            token_rewards=tokens,
            seconds=seconds,
            errors=[row.line if isinstance(row, Failure) else None for row in rows],
            tracebacks=[row.traceback if isinstance(row, Failure) else None for row in rows],
        )


def _runner(function: str | Callable[..., Any], name: str, guard: Guard) -> Runner:
    if guard.isolation == "process":
        return Process(function, name, guard.timeout, guard.start_timeout)
    resolved = resolve(function) if isinstance(function, str) else function
    return Inline(resolved, name) if guard.isolation == "none" else Threaded(resolved, name, guard.timeout)


def _describe(sample: Sample) -> str:
    return f"the completion {sample.completion[:80]!r}"
