"""Whether a run goes on, and how it ended if not: by its lock, its summary and its events."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trl.trackers.lock import is_being_written

State = Literal["new", "running", "finished", "stopped", "failed", "killed"]

_SIGNALS = ("SIGINT", "SIGTERM")
_TAIL = 65536  # bytes of events.log that are read: more than the longest event
_FAILED = re.compile(r"\S+ (failed (?:in|after) step \d+: .*)")
_OPENED = re.compile(r"\S+ run (?:created|opened)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """State of a run."""

    state: State
    """"new": no step and no reason; "stopped": by a signal; "killed": ended without a word."""
    reason: str = ""
    """The summary's: "steps", "callback", "SIGINT", "SIGTERM"; "" without a summary."""
    error: str = ""
    """Of a failed run: "failed in step 3: ValueError: ..."."""


def read_ending(folder: str | Path) -> Ending:
    """Tells the state of a run.

    A summary stays until a resumed run has begun, so it outweighs the failure of an attempt to resume.

    Args:
        folder: run folder.

    Raises:
        ValueError: if `summary.json` is damaged; names it.
    """
    path = Path(folder)
    reason = str(read_summary(path).get("reason") or "")
    if reason and reason not in _SIGNALS:
        return Ending(state="finished", reason=reason)
    if is_being_written(path):
        return Ending(state="running", reason=reason)
    if reason:
        return Ending(state="stopped", reason=reason)
    if error := _failure(path / "events.log"):
        return Ending(state="failed", error=error)
    rows = path / "metrics.jsonl"
    return Ending(state="killed" if rows.is_file() and rows.stat().st_size else "new")


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Contents of `summary.json`; empty until the run has ended.

    Raises:
        ValueError: if the file is damaged; names it.
    """
    path = Path(folder) / "summary.json"
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _failure(events: Path) -> str:
    """The error that ended the run since it was last opened; "" if there was none."""
    if not events.is_file():
        return ""
    with events.open("rb") as file:
        file.seek(max(0, events.stat().st_size - _TAIL))
        lines = file.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        if match := _FAILED.match(line):
            return match[1]
        if _OPENED.match(line):
            break
    return ""
