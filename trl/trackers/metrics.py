"""metrics.jsonl: one row of numbers per step, and how to read and cut it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl.redaction import redact
from trl.trackers.plain import as_number

OF_THE_MACHINE = ("time/", "memory/")
"""Keys that begin with these hold times, speeds and memory. They alone may differ between two runs of one seed."""

_RESERVED = ("step", "nonfinite")


def metrics_line(row: Mapping[str, Any], step: int) -> str:
    """A row as a line of JSON: `step`, then every number of `row` in its order.

    A number that is not finite is written as null, and its key listed under `nonfinite`, so that it is not mistaken for one
    that was not measured. What is no number (texts, arrays, tables) is left out. Floats are written so that they read back
    to the same bits.

    Raises:
        ValueError: if `row` has a key that the line itself needs, or `step` is no step.
    """
    for name in _RESERVED:
        if name in row and (name != "step" or row[name] != step):
            raise ValueError(f"a row of metrics must not have a key {name!r}: the line of step {step} needs it")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"step={step!r} must be a whole number of at least 0")
    values = {str(key): as_number(value) for key, value in row.items() if key != "step"}
    names = redact(list(values))  # of the keys alone: what stands under them is numbers
    measured = {name: value for name, value in zip(names, values.values(), strict=True) if value is not None}
    nonfinite = [key for key, value in measured.items() if not math.isfinite(value)]
    line = {"step": step} | {key: None if key in nonfinite else value for key, value in measured.items()}
    return json.dumps(line | ({"nonfinite": nonfinite} if nonfinite else {}), allow_nan=False)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The complete rows of a run, in order; safe while the run is being written.

    Args:
        folder: of the run.

    Raises:
        ValueError: naming file and line of what is no row although rows follow it.
    """
    path = Path(folder) / "metrics.jsonl"
    return [row for row, _ in complete_rows(path, path.read_bytes() if path.exists() else b"")]


def complete_rows(path: Path, data: bytes) -> list[tuple[dict[str, Any], int]]:
    """Every row with the offset of the byte after its line, up to a tail that a killed or powerless machine left."""
    rows: list[tuple[dict[str, Any], int]] = []
    broken: int | None = None
    start, number = 0, 0
    while (end := data.find(b"\n", start)) >= 0:
        number += 1
        row = _row(data[start:end])
        start = end + 1
        if row is None:
            broken = broken or number
        elif broken is not None:
            raise ValueError(f"{path}:{broken} is no row of metrics, although rows follow it")
        else:
            rows.append((row, start))
    return rows


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without times and memory: what a resumed run and an uninterrupted one have in common, to the bit."""
    kept = {key: value for key, value in row.items() if not key.startswith(OF_THE_MACHINE)}
    nonfinite = [key for key in kept.pop("nonfinite", ()) if not key.startswith(OF_THE_MACHINE)]
    return kept | ({"nonfinite": nonfinite} if nonfinite else {})


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # also what is not UTF-8
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool)
    return row if is_row else None
