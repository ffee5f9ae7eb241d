"""Ragged rollouts, padded on either side, with the same tokens for the same seed."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers import PAD, VOCABULARY
from trl.types import Rollout

QUERIES = (3, 5, 2)
RESPONSES = (4, 2, 6)


def pad(rows: list[Tensor], side: str, extra: int = 1) -> tuple[Tensor, Tensor]:
    """Rows of different lengths to tokens [B, T] and attention [B, T], with `extra` columns of padding alone."""
    width = max(len(row) for row in rows) + extra
    tokens = torch.full((len(rows), width), PAD)
    attention = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, place], attention[i, place] = row, True
    return tokens, attention


def make_rollout(side: str, *, seq2seq: bool = False, seed: int = 0) -> Rollout:
    """Three sequences; an encoder-decoder's responses begin with the start token 0."""
    generator = torch.Generator().manual_seed(seed)
    queries = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in QUERIES]
    responses = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in RESPONSES]
    if seq2seq:
        tokens, attention = pad([torch.cat([torch.tensor([PAD]), row]) for row in responses], side)
        encoder_tokens, encoder_attention = pad(queries, side, extra=2)
        mask = attention[:, 1:] & attention[:, :-1]
        return Rollout(
            tokens=tokens,
            attention=attention,
            mask=mask,
            encoder_tokens=encoder_tokens,
            encoder_attention=encoder_attention,
        )
    tokens, attention = pad([torch.cat(pair) for pair in zip(queries, responses, strict=True)], side)
    mask = torch.zeros_like(attention[:, 1:])
    for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
        first = int(attention[i].nonzero()[0]) + len(query) - 1
        mask[i, first : first + len(response)] = True
    return Rollout(tokens=tokens, attention=attention, mask=mask)
