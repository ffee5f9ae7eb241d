"""Completion files, such as completions/step-00000012.parquet, with one row per sample of a step."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl.files import write_atomic
from trl.redaction import redact
from trl.trackers.plain import as_number, clean_text, to_json

_FILE_NAME = re.compile(r"step-(\d{8,})\.(?:parquet|jsonl)")
_REWARD_PREFIX = "reward/"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRecord:
    """One sample of one step. None marks values that were not measured."""

    prompt_id: str
    prompt: str
    completion: str
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    """Unweighted reward by component name; None where the component could not score the sample."""
    score: float | None = None
    """Total used by the step: the score plus the sum of the token rewards."""
    advantage: float | None = None
    """Mean advantage over the response's tokens."""
    kl: float | None = None
    """log p - log p_ref summed over the response's tokens, in nats."""
    length: int = 0
    """Number of response tokens."""
    finish_reason: str = ""
    """Why the response ended, such as "stop" or "length"."""
    reward_seconds: float | None = None
    error: str | None = None
    """Error that prevented scoring."""
    tokens: Mapping[str, Sequence[Any]] | None = None
    """Per token of the response: `text`, `reward`, `kl`, `advantage`, `value`; recorded for a few samples of a step."""


def write_records(folder: Path, step: int, records: Sequence[CompletionRecord]) -> Path:
    """Writes the samples of a step into `folder`, as Parquet, or as JSON lines if pyarrow is missing.

    Columns: step, prompt_id, prompt, completion, reward/NAME for every component, score, advantage, kl, length,
    finish_reason, time/reward (seconds), error and tokens (JSON). Non-finite numbers become null.

    Returns:
        Path of the file.
    """
    column_types = _columns(sorted({name for record in records for name in record.rewards}))
    # Redact lists rather than mappings: a component named "password" still holds ordinary numbers.
    names, *rows = redact(
        [list(column_types), *([_cell(record, step, name) for name in column_types] for record in records)]
    )
    if has_pyarrow():
        path, data = (
            folder / f"step-{step:08d}.parquet",
            _parquet(dict(zip(names, column_types.values(), strict=True)), rows),
        )
    else:
        path = folder / f"step-{step:08d}.jsonl"
        lines = (json.dumps(dict(zip(names, row, strict=True)), allow_nan=False) for row in rows)
        data = "".join(line + "\n" for line in lines).encode()
    write_atomic(path, data)
    return path


def read_completions(folder: str | Path, step: int) -> list[dict[str, Any]]:
    """Reads the samples of a step, each as a dict of its columns.

    Args:
        folder: run folder.
        step: step number.

    Raises:
        ValueError: if the run has no samples for that step, or the file is damaged.
        ImportError: if the file is Parquet and pyarrow is missing.
    """
    path = Path(folder) / "completions" / f"step-{step:08d}.parquet"
    if path.exists():
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(f"reading {path} needs pyarrow: pip install pyarrow") from error
        rows: list[dict[str, Any]] = pyarrow.parquet.ParquetFile(path).read().to_pylist()
        return rows
    jsonl_path = path.with_suffix(".jsonl")
    if not jsonl_path.exists():
        raise ValueError(f"{path.parent} has no completions for step {step}")
    try:
        return [json.loads(line) for line in jsonl_path.read_bytes().splitlines()]
    except ValueError as error:
        raise ValueError(f"{jsonl_path} is not valid JSON: {error}") from error


def completion_steps(folder: str | Path) -> list[int]:
    """Steps whose samples a run folder has, in order."""
    path = Path(folder) / "completions"
    steps = {step_of(entry) for entry in path.iterdir()} if path.is_dir() else set()
    return sorted(step for step in steps if step is not None)


def step_of(path: Path) -> int | None:
    """Step number of a completion file; None for any other file."""
    match = _FILE_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def has_pyarrow() -> bool:
    """Whether pyarrow is installed."""
    return importlib.util.find_spec("pyarrow") is not None


def _columns(components: Sequence[str]) -> dict[str, type]:
    """Type of every column, given explicitly because a column of nulls has no type to infer."""
    return {
        "step": int,
        "prompt_id": str,
        "prompt": str,
        "completion": str,
        **{_REWARD_PREFIX + name: float for name in components},
        "score": float,
        "advantage": float,
        "kl": float,
        "length": int,
        "finish_reason": str,
        "time/reward": float,
        "error": str,
        "tokens": str,
    }


def _cell(record: CompletionRecord, step: int, column: str) -> int | float | str | None:
    if column == "step":
        return step
    if column == "time/reward":
        value: Any = record.reward_seconds
    elif column.startswith(_REWARD_PREFIX):
        value = record.rewards.get(column.removeprefix(_REWARD_PREFIX))
    elif column == "tokens":
        value = None if record.tokens is None else to_json(record.tokens)
    else:
        value = getattr(record, column)
    if isinstance(value, str):
        return clean_text(value)
    number = as_number(value)
    return number if number is not None and math.isfinite(number) else None


def _parquet(column_types: Mapping[str, type], rows: Sequence[Sequence[Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    arrow_types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    schema = pyarrow.schema([(name, arrow_types[kind]) for name, kind in column_types.items()])
    columns = [[row[index] for row in rows] for index in range(len(column_types))]
    arrays = [pyarrow.array(column, type=kind) for column, kind in zip(columns, schema.types, strict=True)]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), buffer)
    return buffer.getvalue()
