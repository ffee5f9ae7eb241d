"""Rows and the locations that error messages name; what becomes of rows is in test_prompts.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trl.data.readers import read_rows


def read(source: Any, max_streamed: int = 100) -> list[tuple[str, Any]]:
    return list(read_rows(source, max_streamed=max_streamed))


def test_lists_and_streams_are_numbered_from_0() -> None:
    expected = [("prompts[0]", "a"), ("prompts[1]", ["b"])]
    assert read(["a", ["b"]]) == read(("a", ["b"])) == read(iter(["a", ["b"]])) == expected


def test_jsonl_names_lines_from_1_and_skips_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff"a"\n\n{"prompt": "b\u2028c"}'.encode())
    assert read(path) == [(f"{path}:1 (row 0)", "a"), (f"{path}:3 (row 1)", {"prompt": "b\u2028c"})]


def test_a_csv_record_is_located_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "p.CSV"
    path.write_bytes(b'prompt,n\r\n"two\nlines",1\r\n\r\nlast,2\r\n')
    assert read(str(path)) == [
        (f"{path}:2 (row 0)", {"prompt": "two\nlines", "n": "1"}),
        (f"{path}:5 (row 1)", {"prompt": "last", "n": "2"}),
    ]


def test_parquet_has_rows_alone(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "n": [1, None]}), path)
    assert read(path) == [(f"{path} (row 0)", {"prompt": "a", "n": 1}), (f"{path} (row 1)", {"prompt": "b", "n": None})]


def test_a_stream_may_have_as_many_rows_as_the_limit() -> None:
    assert len(read(iter(range(3)), max_streamed=3)) == 3
    with pytest.raises(ValueError, match="more than max_streamed=2 rows"):
        read(iter(range(3)), max_streamed=2)


@pytest.mark.parametrize("source", [{"a", "b"}, b"ab", 3, None])
def test_sources_without_an_order_are_refused(source: Any) -> None:
    with pytest.raises(ValueError, match=f"prompts is of type {type(source).__name__}: expected a list"):
        read(source)


def test_a_missing_or_unknown_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist or is not a file"):
        read(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match=r"is not a path to one of \.jsonl, \.ndjson, \.csv, \.parquet"):
        read(tmp_path / "p.txt")
