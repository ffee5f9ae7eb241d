"""Padding, and where in a padded batch the responses stand. Everything follows from lengths, never from token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]


def pad(sequences: Sequence[Tensor], value: int, side: Side) -> tuple[Tensor, Tensor]:
    """Pads 1-D token sequences to one width.

    Args:
        sequences: `B` tensors of token ids, of any lengths.
        value: the id that fills the rest.
        side: where the filling goes.

    Returns:
        `[B, T]` int64 tokens and `[B, T]` int64 attention (1 on tokens, 0 on padding).
    """
    width = max(len(s) for s in sequences)
    device = sequences[0].device
    tokens = torch.full((len(sequences), width), value, dtype=torch.int64, device=device)
    attention = torch.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        tokens[row, where] = sequence
        attention[row, where] = 1
    return tokens, attention


def response_columns(attention: Tensor, query_lengths: Sequence[int], response_lengths: Sequence[int]) -> list[slice]:
    """The columns of `[B, S]` at which each row's response tokens are predicted.

    Args:
        attention: `[B, T]` of query + response, padded on either side. For an encoder-decoder, of the decoder's tokens.
        query_lengths: tokens before the first predicted one, per row: the query's, or 1 for the token that starts a
            decoder.
        response_lengths: predicted tokens per row.
    """
    starts = attention.long().argmax(dim=1).tolist()
    first = [start + query - 1 for start, query in zip(starts, query_lengths, strict=True)]
    return [slice(column, column + n) for column, n in zip(first, response_lengths, strict=True)]


def place_on_columns(values: Sequence[Tensor], columns: Sequence[slice], like: Tensor) -> Tensor:
    """Writes one 1-D tensor per row onto its columns of a `[B, S]` tensor of zeros with the dtype of `like`."""
    placed = torch.zeros_like(like)
    for row, (value, where) in enumerate(zip(values, columns, strict=True)):
        placed[row, where] = value.to(placed)
    return placed


class PadCollator:
    """Pads examples with `input_ids` on the tokenizer's side with its pad token, or with eos where it has none."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's pad token as it is now, else its eos token, else 0: padding is masked, so any id will do."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`{"input_ids": [B, T], "attention_mask": [B, T]}` of examples that hold 1-D `input_ids`."""
        sequences = [torch.as_tensor(example["input_ids"]) for example in examples]
        tokens, attention = pad(sequences, self.pad_token_id, self.tokenizer.padding_side)
        return {"input_ids": tokens, "attention_mask": attention}
