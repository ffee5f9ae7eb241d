"""Padding, and locating responses in padded batches. Based on lengths, never on token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]


def pad(sequences: Sequence[Tensor], value: int, side: Side) -> tuple[Tensor, Tensor]:
    """Pads 1-D token sequences to the length of the longest.

    Args:
        sequences: `B` 1-D tensors of token ids.
        value: padding token id.
        side: side to pad on.

    Returns:
        `[B, T]` int64 tokens and `[B, T]` int64 attention (1 on tokens, 0 on padding).
    """
    width = max(len(s) for s in sequences)
    device = sequences[0].device
    tokens = torch.full((len(sequences), width), value, dtype=torch.int64, device=device)
    attention = torch.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        span = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        tokens[row, span] = sequence
        attention[row, span] = 1
    return tokens, attention


def response_columns(attention: Tensor, query_lengths: Sequence[int], response_lengths: Sequence[int]) -> list[slice]:
    """Columns of a `[B, S]` array at which each row's response tokens are predicted.

    Args:
        attention: `[B, T]` attention mask of query + response, padded on either side; for an encoder-decoder, of the
            decoder's tokens.
        query_lengths: number of tokens before the first predicted one, per row: the query length, or 1 for a decoder's
            start token.
        response_lengths: number of predicted tokens per row.
    """
    starts = attention.long().argmax(dim=1).tolist()
    first_columns = [start + query - 1 for start, query in zip(starts, query_lengths, strict=True)]
    return [slice(column, column + n) for column, n in zip(first_columns, response_lengths, strict=True)]


def place_on_columns(values: Sequence[Tensor], columns: Sequence[slice], like: Tensor) -> Tensor:
    """Writes one 1-D tensor per row into the given columns of a `[B, S]` tensor of zeros shaped and typed as `like`."""
    placed = torch.zeros_like(like)
    for row, (value, span) in enumerate(zip(values, columns, strict=True)):
        placed[row, span] = value.to(placed)
    return placed


class PadCollator:
    """Collator that pads `input_ids` on the tokenizer's padding side, with its pad token or, failing that, its eos."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's current pad token, else its eos token, else 0. Padding is masked, so any id works."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates examples with 1-D `input_ids` into `{"input_ids": [B, T], "attention_mask": [B, T]}`."""
        sequences = [torch.as_tensor(example["input_ids"]) for example in examples]
        tokens, attention = pad(sequences, self.pad_token_id, self.tokenizer.padding_side)
        return {"input_ids": tokens, "attention_mask": attention}
