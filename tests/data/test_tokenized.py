"""Rows of tokens and their packing: worked out by hand, and nothing lost or counted twice."""

from __future__ import annotations

import random
from typing import Any

import pytest

from trl.data.tokenized import STRATEGIES, Piece, StreamedRows, TokenRows, Tokens, pack


def rows() -> TokenRows:
    lengths = [4, 2, 3]
    parts = [
        Tokens(ids=[10 * i + j for j in range(n)], counted=[j > 1 or i == 1 for j in range(n)])
        for i, n in enumerate(lengths)
    ]
    return TokenRows(parts)


def test_rows_have_labels_where_they_count() -> None:
    data = rows()
    assert len(data) == 3 and data.column_names == ["input_ids", "labels"]
    assert data[0] == {"input_ids": [0, 1, 2, 3], "labels": [-100, -100, 2, 3]}
    assert data[-2] == {"input_ids": [10, 11], "labels": [10, 11]}
    assert [len(row["input_ids"]) for row in data] == [4, 2, 3]
    with pytest.raises(IndexError, match="row 3 of 3"):
        data[3]
    assert len(TokenRows([])) == 0


def test_best_fit_by_hand() -> None:
    packed = rows().pack(6, "bfd")  # 4 and 2 fill a row, 3 gets its own
    assert packed.column_names == ["input_ids", "labels", "seq_lengths"]
    assert packed[0] == {
        "input_ids": [0, 1, 2, 3, 10, 11],
        "labels": [-100, -100, 2, 3, -100, 11],  # 10 would be predicted from another sequence
        "seq_lengths": [4, 2],
    }
    assert packed[1]["input_ids"] == [20, 21, 22] and len(packed) == 2
    # 3 goes where 3 is left, not where 4 is.
    assert pack([7, 6, 3], 10) == [[Piece(0, 0, 7), Piece(2, 0, 3)], [Piece(1, 0, 6)]]


def test_what_exceeds_a_row_is_cut_off_split_or_wrapped() -> None:
    assert pack([5, 2], 4, "bfd") == [[Piece(0, 0, 4)], [Piece(1, 0, 2)]]
    assert pack([5, 2], 4, "bfd_split") == [[Piece(0, 0, 4)], [Piece(1, 0, 2), Piece(0, 4, 5)]]
    assert pack([5, 2], 4, "wrapped") == [[Piece(0, 0, 4)], [Piece(0, 4, 5), Piece(1, 0, 2)]]
    with pytest.raises(ValueError, match="packing_strategy='ffd' must be one of bfd, bfd_split, wrapped"):
        pack([1], 4, "ffd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length=0"):
        pack([1], 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_token_is_packed_once(strategy: Any) -> None:
    lengths = [random.randint(1, 30) for _ in range(300)]
    packed = pack(lengths, 20, strategy)
    assert max(sum(p.stop - p.start for p in row) for row in packed) <= 20
    seen = sorted((p.row, i) for row in packed for p in row for i in range(p.start, p.stop))
    limit = 20 if strategy == "bfd" else 30
    assert seen == [(row, i) for row, n in enumerate(lengths) for i in range(min(n, limit))]
    full = sum(min(n, limit) for n in lengths) / (20 * len(packed))
    assert full > 0.97


def test_streams_are_packed_chunk_by_chunk_and_begin_again() -> None:
    def encode(located: Any) -> Any:
        return (Tokens(ids=row, counted=[True] * len(row)) for _, row in located)

    stream = StreamedRows(
        lambda: [("", [1, 2]), ("", [3]), ("", [4])], encode, lambda part: part.pack(3, "bfd"), chunk=2
    )
    for _ in range(2):
        assert [row["input_ids"] for row in stream] == [[1, 2, 3], [4]]
