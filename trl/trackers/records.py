"""completions/step-00000012.parquet: every sample of a step, one row each."""

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
from trl.trackers.plain import as_number, clean_text

_NAME = re.compile(r"step-(\d{8,})\.(?:parquet|jsonl)")
_REWARD = "reward/"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRecord:
    """What became of one prompt in one step. None is what was not measured."""

    prompt_id: str
    prompt: str
    completion: str
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    """By the name of the component, before weights; None where it could not score."""
    score: float | None = None
    """What the step was given: the score, and the sum of the rewards of tokens."""
    advantage: float | None = None
    """Mean over the response's tokens."""
    kl: float | None = None
    """Sum over the response's tokens of log p - log p_ref, in nats."""
    length: int = 0
    """Response tokens."""
    finish_reason: str = ""
    """Such as "stop" or "length"."""
    reward_seconds: float | None = None
    error: str | None = None
    """Why there is no score."""


def write_records(folder: Path, step: int, records: Sequence[CompletionRecord]) -> Path:
    """Writes the samples of a step into `folder`: Parquet, or JSON lines where pyarrow is missing.

    Columns: step, prompt_id, prompt, completion, reward/NAME for every component, score, advantage, kl, length,
    finish_reason, time/reward (seconds) and error. A number that is not finite becomes null.
    """
    kinds = _columns(sorted({name for record in records for name in record.rewards}))
    # Lists, not mappings: a component named "password" holds a number like any other.
    names, *rows = redact([list(kinds), *([_cell(record, step, name) for name in kinds] for record in records)])
    if parquet_is_there():
        path, data = folder / f"step-{step:08d}.parquet", _parquet(dict(zip(names, kinds.values(), strict=True)), rows)
    else:
        path = folder / f"step-{step:08d}.jsonl"
        lines = (json.dumps(dict(zip(names, row, strict=True)), allow_nan=False) for row in rows)
        data = "".join(line + "\n" for line in lines).encode()
    write_atomic(path, data)
    return path


def read_completions(folder: str | Path, step: int) -> list[dict[str, Any]]:
    """The samples of a step, a mapping by column each.

    Args:
        folder: of the run.
        step: its number.

    Raises:
        ValueError: if the run has no samples of that step.
        ImportError: if they are in a Parquet file and pyarrow is missing.
    """
    path = Path(folder) / "completions" / f"step-{step:08d}.parquet"
    if path.exists():
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(f"reading {path} needs pyarrow: pip install pyarrow") from error
        rows: list[dict[str, Any]] = pyarrow.parquet.ParquetFile(path).read().to_pylist()
        return rows
    lines = path.with_suffix(".jsonl")
    if not lines.exists():
        raise ValueError(f"{path.parent} holds no completions of step {step}")
    return [json.loads(line) for line in lines.read_bytes().splitlines()]


def step_of(path: Path) -> int | None:
    """The step whose samples a file holds; None for another file."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def parquet_is_there() -> bool:
    """Whether pyarrow can be imported now."""
    return importlib.util.find_spec("pyarrow") is not None


def _columns(components: Sequence[str]) -> dict[str, type]:
    """The kind of every column, spelt out, since one of nulls alone has no type to be guessed."""
    return {
        "step": int,
        "prompt_id": str,
        "prompt": str,
        "completion": str,
        **{_REWARD + name: float for name in components},
        "score": float,
        "advantage": float,
        "kl": float,
        "length": int,
        "finish_reason": str,
        "time/reward": float,
        "error": str,
    }


def _cell(record: CompletionRecord, step: int, column: str) -> int | float | str | None:
    if column == "step":
        return step
    if column == "time/reward":
        value: Any = record.reward_seconds
    elif column.startswith(_REWARD):
        value = record.rewards.get(column.removeprefix(_REWARD))
    else:
        value = getattr(record, column)
    if isinstance(value, str):
        return clean_text(value)
    number = as_number(value)
    return number if number is not None and math.isfinite(number) else None


def _parquet(kinds: Mapping[str, type], rows: Sequence[Sequence[Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in kinds.items()])
    columns = [[row[index] for row in rows] for index in range(len(kinds))]
    arrays = [pyarrow.array(column, type=kind) for column, kind in zip(columns, schema.types, strict=True)]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), buffer)
    return buffer.getvalue()
