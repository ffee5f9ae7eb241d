"""Padding, and the columns at which responses are predicted, on batches worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trl.data.collators import PadCollator, pad, place_on_columns, response_columns

SEQUENCES = [torch.tensor([5, 6, 7]), torch.tensor([8])]


@pytest.mark.parametrize(
    ("side", "tokens", "attention"),
    [
        ("right", [[5, 6, 7], [8, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
        ("left", [[5, 6, 7], [9, 9, 8]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_pad(side: Any, tokens: list[list[int]], attention: list[list[int]]) -> None:
    padded, mask = pad(SEQUENCES, 9, side)
    assert padded.tolist() == tokens and mask.tolist() == attention
    assert padded.dtype == mask.dtype == torch.int64


def test_padding_that_equals_a_token_is_still_padding() -> None:
    padded, mask = pad([torch.tensor([8, 8]), torch.tensor([8])], 8, "left")
    assert padded.tolist() == [[8, 8], [8, 8]] and mask.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_response_columns_select_what_predicts_the_response(side: Any) -> None:
    """Column s predicts token s + 1, so the tokens after the selected columns are the response."""
    queries, responses = [[5, 6], [7]], [[10, 11, 12], [13]]
    rows = [torch.tensor(query + response) for query, response in zip(queries, responses, strict=True)]
    tokens, attention = pad(rows, 0, side)
    columns = response_columns(attention, [2, 1], [3, 1])
    assert [tokens[i, 1:][columns[i]].tolist() for i in range(2)] == responses
    assert columns == ([slice(1, 4), slice(0, 1)] if side == "right" else [slice(1, 4), slice(3, 4)])


def test_response_columns_need_one_length_per_row() -> None:
    with pytest.raises(ValueError, match="zip"):
        response_columns(torch.ones(2, 3), [1], [1, 1])


def test_values_are_placed_on_their_columns_and_zeros_elsewhere() -> None:
    like = torch.full((2, 4), 7.0, dtype=torch.float64)
    placed = place_on_columns([torch.tensor([1, 2]), torch.tensor([3])], [slice(1, 3), slice(0, 1)], like)
    assert placed.tolist() == [[0.0, 1.0, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0]]
    assert placed.dtype == torch.float64 and like.eq(7).all()


@pytest.mark.parametrize(("pad_id", "eos_id", "expected"), [(4, 1, 4), (0, 1, 0), (None, 1, 1), (None, None, 0)])
def test_the_collator_pads_with_the_pad_token_or_else_the_eos_token(pad_id: Any, eos_id: Any, expected: int) -> None:
    tokenizer = SimpleNamespace(pad_token_id=pad_id, eos_token_id=eos_id, padding_side="left")
    batch = PadCollator(tokenizer)([{"input_ids": [5, 6]}, {"input_ids": torch.tensor([7])}])
    assert batch["input_ids"].tolist() == [[5, 6], [expected, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
