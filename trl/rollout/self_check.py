"""Whether our own decoding loop can drive a model: found out by a trial, not looked up in a list of models."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trl.kernels.decode_attention import decoding
from trl.kernels.kv_cache import GrowingLayer, growing_cache
from trl.kernels.packed_weights import LEAST_TOKENS, packed_weights
from trl.rollout.decoders import decoder_for, start_token

# Tolerance of a trial: RMS error over the logits' standard deviation, by bytes per weight. Rounding to bfloat16 alone moves
# the logits by 0.25, relative to float32.
CHECK_TOLERANCE = {8: 1e-3, 4: 1e-3, 2: 0.5}


def obstacle(model: Any) -> str | None:
    """Returns why the engine cannot drive a model, or None if it can.

    Decodes a few tokens after two short prompts of different lengths and compares the logits with plain forward passes
    over each sequence, without cache and padding. The tolerance is `CHECK_TOLERANCE`.
    """
    name = type(model).__name__
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if not callable(supports) or not supports() or getattr(model, "_is_stateful", False):
        return f"{name} keeps its state in another way than in a key-value cache"
    if not model.config.is_encoder_decoder:
        kinds = {type(layer) for layer in growing_cache(model.config).layers}
        if strange := kinds - {GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer}:
            return f"{name} has layers whose state is a {sorted(kind.__name__ for kind in strange)}"
    try:
        gap = _gap(model)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        return f"{name} could not be decoded step by step: {type(error).__name__}: {error}"
    if not gap <= CHECK_TOLERANCE.get(model.get_input_embeddings().weight.element_size(), 0.5):
        return f"{name} decoded step by step is off its own forward pass by {gap:.1e} standard deviations of its logits"
    return None


@torch.no_grad()
def _gap(model: Any) -> float:
    """Returns the largest relative RMS error of a row of logits, decoding against plain forward passes."""
    words = model.get_input_embeddings().weight.shape[0]
    device = next(model.parameters()).device
    # Tokens from the middle of the vocabulary: special tokens are at its ends.
    word = [words // 2 + i % max(1, words // 4) for i in range(12)]
    queries = [torch.tensor(word[:3], device=device), torch.tensor(word[3:8], device=device)]
    given = [
        torch.tensor([a, b], device=device) for a, b in ((word[8], word[9]), (word[10], word[11]), (word[0], word[5]))
    ]
    with decoding(model), packed_weights(model, rows=len(queries), tokens=LEAST_TOKENS):
        decoder = decoder_for(model, queries, [4] * len(queries))
        seen = [decoder.begin(), *(decoder.advance(tokens) for tokens in given[:2])]
        decoder.keep(torch.tensor([1], device=device))
        seen.append(decoder.advance(given[2][1:]))
    largest = 0.0
    for row, query in enumerate(queries):
        steps = len(given) if row == 1 else len(given) - 1
        written = torch.stack([tokens[row] for tokens in given[:steps]])
        if model.config.is_encoder_decoder:
            begin = torch.tensor([start_token(model)], device=device)
            tokens = torch.cat([begin, written])[None]
            plain = model(input_ids=query[None], decoder_input_ids=tokens, use_cache=False).logits[0]
        else:
            plain = model(input_ids=torch.cat([query, written])[None], use_cache=False).logits[0, len(query) - 1 :]
        decoded = torch.stack([logits[row if len(logits) > 1 else 0] for logits in seen[: steps + 1]])
        gap = (decoded.float() - plain.float()).square().mean(dim=-1).sqrt() / plain.float().std(dim=-1)
        largest = max(largest, gap.max().item())
    return largest
