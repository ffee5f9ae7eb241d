"""Log-probabilities of given responses as the decoding loop computes them: what the sampler saw, without sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl.kernels.decode_attention import decoding
from trl.kernels.packed_weights import packed_weights
from trl.rollout.fixed_decoder import decoder_for


@torch.no_grad()
def replayed_logprobs(
    model: Any, queries: Sequence[Tensor], responses: Sequence[Tensor], *, temperature: float = 1.0
) -> list[Tensor]:
    """Decodes given responses step by step, with the cache and the kernels that sample them.

    Args:
        model: a language model for which `trl.rollout.obstacle` returns None, in evaluation mode.
        queries: `B` 1-D token tensors.
        responses: `B` 1-D token tensors of at least one token, without an encoder-decoder's start token.
        temperature: divides the logits.

    Returns:
        `B` 1-D float32 tensors, one log-probability per response token.
    """
    lengths = [len(response) for response in responses]
    columns: list[Tensor] = []
    with decoding(model), packed_weights(model, rows=len(queries), tokens=max(lengths)):
        decoder = decoder_for(model, queries, lengths)
        logits = decoder.begin()
        for t in range(max(lengths)):
            # A finished row repeats its last token, so that rows stay together; what follows is cut off below.
            tokens = torch.stack([response[min(t, len(response) - 1)] for response in responses]).to(logits.device)
            scores = (logits.float() / temperature).log_softmax(dim=-1)
            columns.append(scores.gather(1, tokens[:, None]).squeeze(1))
            if t + 1 < max(lengths):
                logits = decoder.advance(tokens)
    table = torch.stack(columns, dim=1)  # [B, longest]
    return [row[:length].clone() for row, length in zip(table, lengths, strict=True)]
