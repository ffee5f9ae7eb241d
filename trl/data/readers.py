"""Reads rows from files, datasets and streams, each with its location for error messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from io import IOBase
from itertools import islice
from pathlib import Path
from typing import Any

from trl.data.loader import is_hub_dataset

Located = tuple[str, Any]  # "prompts.jsonl:3 (row 2)", the row

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")


def read_rows(source: Any, *, max_streamed: int, name: str = "prompts") -> Iterator[Located]:
    """Yields the rows of a source in order, each with its location: file and line, and the row's index from 0.

    Args:
        source: a path to a JSONL, CSV (with header) or Parquet file; a `datasets.Dataset`; a sequence of rows; or a
            stream of rows, such as an iterable dataset, a generator or any other iterable.
        max_streamed: maximum number of rows in a stream.
        name: the caller's argument that holds `source`, for locations and error messages.

    Raises:
        ValueError: if `source` is of another type, a file's content does not match its suffix (the message gives the
            location), or a stream has too many rows.
        ImportError: if the source is a Parquet file and pyarrow is missing.
    """
    if isinstance(source, str | Path):
        return _file_rows(Path(source), name)
    if is_hub_dataset(source):
        return _numbered(source.with_format(None), name)  # Python values, regardless of the format set on the dataset
    if isinstance(source, Mapping):
        keys = ", ".join(map(str, list(source)[:8]))
        raise ValueError(
            f"{name} is a {type(source).__name__} with the keys {keys}, not a list of rows: pass one of its splits, or "
            "a list with one mapping per row"
        )
    if isinstance(source, Sized) and hasattr(source, "__getitem__") and not isinstance(source, bytes):
        return _numbered((source[index] for index in range(len(source))), name)
    # Sets have no order that another process or a later run would reproduce; open files yield lines with line endings.
    if isinstance(source, set | frozenset | bytes | IOBase) or not isinstance(source, Iterable):
        raise ValueError(
            f"{name} is of type {type(source).__name__}: expected a list, a datasets.Dataset, an iterable of rows in a "
            f"fixed order, or a path to one of {', '.join(SUFFIXES)}"
        )
    return _limited(source, max_streamed, name)


def _numbered(rows: Iterable[Any], name: str) -> Iterator[Located]:
    return ((f"{name}[{index}]", row) for index, row in enumerate(rows))


def _limited(stream: Iterable[Any], max_rows: int, name: str) -> Iterator[Located]:
    rows = iter(stream)
    yield from _numbered(islice(rows, max_rows), name)
    if next(rows, rows) is not rows:
        raise ValueError(
            f"{name} is a stream ({type(stream).__name__}) of more than max_streamed={max_rows} rows and may be "
            "infinite; all rows are held in memory. Limit it with dataset.take(n) or itertools.islice, or raise "
            "max_streamed"
        )


def _file_rows(path: Path, name: str) -> Iterator[Located]:
    if "\0" in str(path):
        raise ValueError(f"{name}={str(path)!r} is not a valid path: it contains a NUL character")
    suffix = path.suffix.lower()
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if suffix not in readers:
        raise ValueError(
            f"{name}={str(path)!r} is not a path to one of {', '.join(SUFFIXES)}; pass a single row in a list"
        )
    if not path.is_file():
        raise ValueError(f"{name}={str(path)!r} does not exist or is not a file")
    return readers[suffix](path)


def _jsonl_rows(path: Path) -> Iterator[Located]:
    """Reads one JSON value per line. Only line feeds end a line, since JSON strings may contain other separators."""
    index = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            location = f"{path}:{number} (row {index})"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise ValueError(f"{location} is not valid UTF-8: {error}") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{location} is not valid JSON: {error.msg} at column {error.colno}") from error
            except RecursionError as error:
                raise ValueError(f"{location} is nested too deeply") from error
            yield location, row
            index += 1


def _csv_rows(path: Path) -> Iterator[Located]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        rows = _csv_cells(path, reader)
        header = next(rows, ("", []))[1]
        if len(set(header)) < len(header):
            raise ValueError(f"{path}:1 has duplicate column names: {', '.join(header)}")
        index = 0
        for line, cells in rows:
            if not cells:  # an empty line
                continue
            location = f"{path}:{line} (row {index})"
            if len(cells) != len(header):
                raise ValueError(
                    f"{location} has {len(cells)} cells, but the header has {len(header)}: {', '.join(header)}"
                )
            yield location, dict(zip(header, cells, strict=True))
            index += 1


def _csv_cells(path: Path, reader: Any) -> Iterator[tuple[str, list[str]]]:
    """Yields each record's first line number and its cells; a quoted cell may span several lines."""
    while True:
        line = str(reader.line_num + 1)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{line} is not valid CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{line} or a line shortly after it is not valid UTF-8: {error}") from error
        if cells is None:
            return
        yield line, cells


def _parquet_rows(path: Path) -> Iterator[Located]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        batches: Iterable[Any] = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for index, row in enumerate(rows):
            yield f"{path} (row {index})", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a valid Parquet file: {error}") from error
