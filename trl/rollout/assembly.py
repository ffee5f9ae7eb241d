"""Joins queries and responses into a padded `Rollout`, and splits an engine's `Rollout` into them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl.types import Rollout

Side = Literal["left", "right"]


def assemble(
    contexts: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    pad_token: int,
    side: Side,
    encoded: Sequence[Tensor] | None = None,
    logprobs: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
    policy_version: int = 0,
) -> Rollout:
    """Builds the rollout of `B` sampled responses.

    Args:
        contexts: `B` 1-D tensors that the responses follow: the queries, or an encoder-decoder's start tokens.
        responses: `B` 1-D tensors of at least one token, on the rollout's device.
        pad_token: fills `tokens` where there is no token.
        side: side to pad on.
        encoded: `B` 1-D queries that an encoder read.
        logprobs: one number per response token, as computed by the engine.
        values: one number per response token, likewise.
        policy_version: version of the weights that sampled the responses.

    Returns:
        A rollout whose mask covers every response token.
    """
    device = responses[0].device
    contexts = [context.to(device) for context in contexts]
    rows = [torch.cat(pair) for pair in zip(contexts, responses, strict=True)]
    tokens, attention = padded(rows, pad_token, side)
    context_lengths = torch.tensor([[len(context)] for context in contexts], device=device)  # [B, 1]
    mask = (attention & (attention.cumsum(dim=1) > context_lengths))[:, 1:]
    inputs: dict[str, Tensor] = {}
    if encoded is not None:
        queries = padded([query.to(device) for query in encoded], pad_token, side)
        inputs = dict(zip(("encoder_tokens", "encoder_attention"), queries, strict=True))

    def scattered(numbers: Sequence[Tensor] | None) -> Tensor | None:
        if numbers is None:
            return None
        flat = torch.cat(list(numbers))  # in the order of the mask's True entries
        return flat.new_zeros(mask.shape).masked_scatter_(mask, flat)

    return Rollout(
        tokens=tokens,
        attention=attention,
        mask=mask,
        group=same_queries(contexts if encoded is None else encoded).to(device),
        sampler_logprobs=scattered(logprobs),
        values=scattered(values),
        policy_version=policy_version,
        **inputs,
    )


def rollout_rows(rollout: Rollout) -> tuple[list[Tensor], list[Tensor]]:
    """Splits an engine's rollout into `B` 1-D queries and `B` 1-D responses, in the form `step` takes.

    A decoder's query is every token before its first response token; an encoder-decoder's response begins with the
    decoder's start token.
    """
    rows = _unpadded(rollout.tokens, rollout.attention)
    if rollout.encoder_tokens is not None and rollout.encoder_attention is not None:
        return _unpadded(rollout.encoder_tokens, rollout.encoder_attention), rows
    lengths = rollout.mask.sum(dim=1).tolist()
    return (
        [row[: len(row) - length].clone() for row, length in zip(rows, lengths, strict=True)],
        [row[len(row) - length :].clone() for row, length in zip(rows, lengths, strict=True)],
    )


def same_queries(queries: Sequence[Tensor]) -> Tensor:
    """`[B]` int64 group of each query, equal for equal tokens."""
    padded = pad_sequence(list(queries), batch_first=True, padding_value=-1)
    return padded.unique(dim=0, return_inverse=True)[1]


def padded(rows: Sequence[Tensor], pad_token: int, side: Side) -> tuple[Tensor, Tensor]:
    """Pads 1-D rows to `[B, T]` int64 tokens and their bool attention."""
    rows = [row.long() for row in rows]
    tokens = pad_sequence(rows, batch_first=True, padding_value=pad_token, padding_side=side)
    ones = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return tokens, pad_sequence(ones, batch_first=True, padding_side=side)


def _unpadded(tokens: Tensor, attention: Tensor) -> list[Tensor]:
    """Copies each row of `[B, T]` tokens without its padding."""
    return [row[is_token] for row, is_token in zip(tokens, attention, strict=True)]
