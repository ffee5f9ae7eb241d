"""How far a run is, on a terminal or as plain lines. Numbers only: no text of a model comes near a terminal."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

_BETWEEN_LINES = 10.0  # seconds between two plain lines


class Progress(Protocol):
    """Shows where a run is."""

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """A step is done."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class NoProgress:
    """Shows nothing."""

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def progress_for(wanted: bool | None, *, done: int, target: int, stream: TextIO | None = None) -> Progress:
    """A bar where `stream` is a terminal and rich is installed, else plain lines; nothing if `wanted` is False.

    Args:
        wanted: whether to show anything; None: yes.
        done: steps that were done before.
        target: steps of the whole run.
        stream: where to; standard error if None.
    """
    if wanted is False:
        return NoProgress()
    stream = sys.stderr if stream is None else stream
    if stream.isatty() and importlib.util.find_spec("rich") is not None:
        return RichProgress(stream, done, target)
    return PlainProgress(stream, done, target)


class PlainProgress:
    """A line for the first step and the last, for each evaluation, and every ten seconds between them."""

    def __init__(self, stream: TextIO, done: int, target: int) -> None:
        self._stream, self._done, self._target = stream, done, target
        self._started = time.monotonic()
        self._shown: float | None = None

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Shows the step, if it is time."""
        now = time.monotonic()
        waits = self._shown is not None and now - self._shown < _BETWEEN_LINES
        if waits and step < self._target and "eval/score_mean" not in row:
            return
        self._shown = now
        left = (now - self._started) / max(1, step - self._done) * (self._target - step)
        self._stream.write(f"step {step}/{self._target}  {numbers(row)}  ETA {clock(left)}\n")
        self._stream.flush()

    def close(self) -> None:
        """Every line has ended."""


class RichProgress:
    """A bar with the time that is left, and the numbers of the last step."""

    def __init__(self, stream: TextIO, done: int, target: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(file=stream),
        )
        self._task = self._bar.add_task("", total=target, completed=done)
        self._bar.start()

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step, description=numbers(row))

    def close(self) -> None:
        """Leaves the last state on the screen."""
        self._bar.stop()


def numbers(row: Mapping[str, Any]) -> str:
    """Score, KL, speed and evaluation of a row."""
    shown = {"score": "score/mean", "KL": "objective/kl", "eval": "eval/score_mean"}
    words = [f"{word} {_number(row[key])}" for word, key in shown.items() if key in row]
    if "time/tokens_per_second" in row:
        words.append(f"{float(row['time/tokens_per_second']):.0f} tokens/s")
    return "  ".join(words)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:07, 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: Any) -> str:
    return "-" if value is None or not math.isfinite(float(value)) else f"{float(value):.3f}"
