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
    """What the step was given."""
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


_NOBODY = CompletionRecord(prompt_id="", prompt="", completion="")


def write_records(folder: Path, step: int, records: Sequence[CompletionRecord]) -> Path:
    """Writes the samples of a step into `folder`: Parquet, or JSON lines where pyarrow is missing.

    Columns: step, prompt_id, prompt, completion, reward/NAME for every component, score, advantage, kl, length,
    finish_reason, time/reward (seconds) and error. A number that is not finite becomes null.
    """
    components = sorted({name for record in records for name in record.rewards})
    # Lists, not mappings: a component named "password" holds a number like any other.
    names, *cells = redact(
        [[*_row(_NOBODY, step, components)], *(list(_row(r, step, components).values()) for r in records)]
    )
    rows = [dict(zip(names, row, strict=True)) for row in cells]
    if parquet_is_there():
        path, data = folder / f"step-{step:08d}.parquet", _parquet(rows, [n for n in names if n.startswith(_REWARD)])
    else:
        path = folder / f"step-{step:08d}.jsonl"
        data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
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


def _row(record: CompletionRecord, step: int, components: Sequence[str]) -> dict[str, Any]:
    return {
        "step": step,
        "prompt_id": clean_text(record.prompt_id),
        "prompt": clean_text(record.prompt),
        "completion": clean_text(record.completion),
        **{_REWARD + name: _finite(record.rewards.get(name)) for name in components},
        "score": _finite(record.score),
        "advantage": _finite(record.advantage),
        "kl": _finite(record.kl),
        "length": int(record.length),
        "finish_reason": clean_text(record.finish_reason),
        "time/reward": _finite(record.reward_seconds),
        "error": None if record.error is None else clean_text(record.error),
    }


def _finite(value: Any) -> float | None:
    number = as_number(value)
    return float(number) if number is not None and math.isfinite(number) else None


def _parquet(rows: list[dict[str, Any]], components: Sequence[str]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    # Spelt out, since a column of nulls alone has no type to be guessed.
    texts, numbers = ("prompt_id", "prompt", "completion"), ("score", "advantage", "kl")
    schema = pyarrow.schema(
        [
            ("step", pyarrow.int64()),
            *((name, pyarrow.string()) for name in texts),
            *((_REWARD + name, pyarrow.float64()) for name in components),
            *((name, pyarrow.float64()) for name in numbers),
            ("length", pyarrow.int64()),
            ("finish_reason", pyarrow.string()),
            ("time/reward", pyarrow.float64()),
            ("error", pyarrow.string()),
        ]
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue()
