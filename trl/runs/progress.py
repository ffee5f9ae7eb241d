"""Progress display, as a bar or plain lines. Shows numbers only: model output is never written to the terminal."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

_LINE_INTERVAL = 10.0  # seconds between two plain lines
_COLUMNS = {
    "score/mean": "score",
    "objective/kl": "KL",
    "eval/score_mean": "held-out score",
    "loss": "loss",
    "eval_loss": "eval loss",
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
}


class Progress(Protocol):
    """Displays the progress of a run."""

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Called after each step."""
        ...

    def close(self) -> None:
        """Called when the run is over."""
        ...


class NoProgress:
    """Shows nothing."""

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def progress_for(show: bool | None, *, done: int, target: int, stream: TextIO | None = None) -> Progress:
    """Returns a progress bar if `stream` is a terminal and rich is installed, else plain lines.

    Args:
        show: False shows nothing; True and None are the same.
        done: steps already done.
        target: total steps of the run.
        stream: output stream; standard error if None.
    """
    if show is False:
        return NoProgress()
    stream = sys.stderr if stream is None else stream
    if stream.isatty() and importlib.util.find_spec("rich") is not None:
        return RichProgress(stream, done, target)
    return PlainProgress(stream, done, target)


class PlainProgress:
    """Prints a line for the first and last step, for each evaluation, and every ten seconds in between."""

    def __init__(self, stream: TextIO, done: int, target: int) -> None:
        self._stream, self._done, self._target = stream, done, target
        self._started = time.monotonic()
        self._last_line: float | None = None

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Prints a line if one is due."""
        now = time.monotonic()
        if step == 0:  # the evaluation before the first step, whose duration does not predict theirs
            self._started = now
            self._stream.write(f"before training: {numbers(row)}\n")
            self._stream.flush()
            return
        too_soon = self._last_line is not None and now - self._last_line < _LINE_INTERVAL
        if too_soon and step < self._target and "eval/score_mean" not in row:
            return
        self._last_line = now
        remaining = (now - self._started) / max(1, step - self._done) * (self._target - step)
        self._stream.write(f"step {step}/{self._target}  {numbers(row)}  ETA {clock(remaining)}\n")
        self._stream.flush()

    def close(self) -> None:
        """Does nothing: every line is already complete."""


class RichProgress:
    """Shows a progress bar with the remaining time and the last step's numbers."""

    def __init__(self, stream: TextIO, done: int, target: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(file=stream),
        )
        self._task = self._bar.add_task("", total=target, completed=done)
        self._bar.start()

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Advances the bar."""
        self._bar.update(self._task, completed=step, description=numbers(row))

    def close(self) -> None:
        """Stops the bar, leaving its last state on the screen."""
        self._bar.stop()


def numbers(row: Mapping[str, Any]) -> str:
    """Formats a row's score, KL, evaluation score and speed; of an offline stage, loss, accuracy and speed."""
    words = [f"{word} {_number(row[key])}" for key, word in _COLUMNS.items() if key in row]
    for key in ("time/tokens_per_second", "time/train_tokens_per_second"):
        if key in row:
            words.append(f"{float(row[key]):.0f} tokens/s")
    return "  ".join(words)


def clock(seconds: float) -> str:
    """Formats seconds as minutes or hours: 0:07, 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: Any) -> str:
    return "-" if value is None or not math.isfinite(float(value)) else f"{float(value):.3f}"
