"""Reading and writing metrics.jsonl, which has one row of numbers per step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl.redaction import redact
from trl.trackers.plain import as_number

MACHINE_PREFIXES = ("time/", "memory/")
"""Key prefixes of times, speeds and memory, the only values that may differ between two runs with the same seed."""

_RESERVED = ("step", "nonfinite")


def metrics_line(row: Mapping[str, Any], step: int) -> str:
    """Serialises a row as a line of JSON: `step`, then the numbers of `row` in order.

    Non-finite numbers are written as null and their keys listed under `nonfinite`, to tell them from missing
    measurements. Values that are not numbers (strings, arrays, tables) are left out. Floats round-trip exactly.

    Raises:
        ValueError: if `row` has a reserved key, or `step` is not a non-negative integer.
    """
    for name in _RESERVED:
        if name in row and (name != "step" or row[name] != step):
            raise ValueError(f"the metrics row of step {step} uses the reserved key {name!r}: rename it")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"step={step!r} must be a whole number of at least 0")
    values = {str(key): as_number(value) for key, value in row.items() if key != "step"}
    names = redact(list(values))  # keys only: the values are numbers
    measured = {name: value for name, value in zip(names, values.values(), strict=True) if value is not None}
    nonfinite = [key for key, value in measured.items() if not math.isfinite(value)]
    line = {"step": step} | {key: None if key in nonfinite else value for key, value in measured.items()}
    return json.dumps(line | ({"nonfinite": nonfinite} if nonfinite else {}), allow_nan=False)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Reads the complete rows of a run, in order; safe while the run is being written.

    Args:
        folder: run folder.

    Raises:
        ValueError: if an invalid line is followed by rows; names file and line.
    """
    path = Path(folder) / "metrics.jsonl"
    return [row for row, _ in complete_rows(path, path.read_bytes() if path.exists() else b"")]


def complete_rows(path: Path, data: bytes) -> list[tuple[dict[str, Any], int]]:
    """Rows with the byte offset after each one's line, ignoring a damaged tail left by a crash or power loss."""
    rows: list[tuple[dict[str, Any], int]] = []
    damaged_line: int | None = None
    start, number = 0, 0
    while (end := data.find(b"\n", start)) >= 0:
        number += 1
        row = _parse_row(data[start:end])
        start = end + 1
        if row is None:
            damaged_line = damaged_line or number
        elif damaged_line is not None:
            raise ValueError(f"{path}:{damaged_line} is not a metrics row, although valid rows follow it")
        else:
            rows.append((row, start))
    return rows


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """Drops times and memory from a row; the rest is bit-identical in a resumed and an uninterrupted run."""
    reproducible = {key: value for key, value in row.items() if not key.startswith(MACHINE_PREFIXES)}
    nonfinite = [key for key in reproducible.pop("nonfinite", ()) if not key.startswith(MACHINE_PREFIXES)]
    return reproducible | ({"nonfinite": nonfinite} if nonfinite else {})


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # includes invalid UTF-8
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool)
    return row if is_row else None
