"""Token log-probabilities and entropies, computed over chunks of logit rows to save memory.

With a vocabulary of `V` words, the float32 copy, the softmax and the gradient of `[B, S, V]` logits dominate the memory
of a language model's update. Here the float32 buffers cover only `chunk_rows` positions at a time, and the backward
pass recomputes the softmax from the logits and a few saved numbers per row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of a float32 chunk: small enough for a CPU's cache, large enough to keep a GPU busy.
_CHUNK_BYTES = {"cpu": 4 * 2**20, "other": 256 * 2**20}
# Bits per nat: exp(x) is computed as exp2(x * BITS) where torch's exp takes three times as long on some CPUs.
BITS = 1 / math.log(2)
FLOOR = -1e30  # replaces a logit of -inf where 0 * -inf would be nan


def _rows_of_chunk(logits: Tensor, chunk_rows: int | None) -> int:
    """Number of rows of `[N, V]` logits to hold in float32 at a time."""
    if chunk_rows is not None:
        return chunk_rows
    size = _CHUNK_BYTES.get(logits.device.type, _CHUNK_BYTES["other"])
    return max(1, size // (4 * logits.shape[-1]))


def wide_dtype(logits: Tensor) -> torch.dtype:
    """Dtype to compute in, at least float32: a half-precision log-softmax loses the tail."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _ChunkedLogprobs(torch.autograd.Function):
    """`[N, V]` logits, `[N]` tokens -> `[N]` logprobs, `[N]` entropies, using at most two chunk-sized buffers."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, chunk_rows: int, need_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        rows, words = logits.shape
        logprobs = torch.empty(rows, dtype=wide_dtype(logits), device=logits.device)
        top, normalizer, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs), torch.zeros_like(logprobs)
        buffers = [logprobs.new_empty(min(chunk_rows, rows), words) for _ in range(2 if need_entropy else 1)]
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, min(rows, start + chunk_rows))
            scaled = buffers[0][: chunk.stop - start].copy_(logits[chunk])
            if temperature != 1.0:
                scaled /= temperature
            # Subtract the largest logit first: a large common offset would cost the differences their precision.
            largest = scaled.amax(dim=-1, keepdim=True)
            scaled -= largest
            token_logits = scaled.gather(-1, tokens[chunk, None]).squeeze(-1)
            weights = torch.exp(scaled, out=buffers[-1][: len(scaled)])
            total = weights.sum(-1)
            log_total = torch.log(total)
            logprobs[chunk] = token_logits - log_total
            top[chunk], normalizer[chunk] = largest.squeeze(-1), log_total
            if need_entropy:
                # A logit of -inf has probability 0 and adds nothing.
                entropy[chunk] = (
                    log_total - torch.bmm(weights[:, None], scaled.clamp_(min=FLOOR)[..., None]).flatten() / total
                )
        ctx.save_for_backward(logits, tokens, top, normalizer, entropy)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.set_materialize_grads(False)
        if not need_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        grad_logprobs, grad_entropy = grads
        logits, tokens, top, normalizer, entropy = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None
        rows, words = logits.shape
        grad_logits = torch.empty_like(logits)
        buffers = [top.new_empty(min(ctx.chunk_rows, rows), words) for _ in range(2)]
        for start in range(0, rows, ctx.chunk_rows):
            chunk = slice(start, min(rows, start + ctx.chunk_rows))
            log_p = buffers[0][: chunk.stop - start].copy_(logits[chunk])
            if ctx.temperature != 1.0:
                log_p /= ctx.temperature
            log_p -= top[chunk, None]
            log_p -= normalizer[chunk, None]
            p = torch.exp(log_p, out=buffers[1][: len(log_p)])
            if grad_entropy is not None:  # dH / dx = -p (log p + H)
                coefficient = log_p.clamp_(min=FLOOR).add_(entropy[chunk, None]).mul_(grad_entropy[chunk, None])
                if grad_logprobs is not None:  # d log p_a / dx = onehot(a) - p
                    coefficient += grad_logprobs[chunk, None]
                grad = p.mul_(coefficient).neg_()
            else:
                assert grad_logprobs is not None
                grad = p.mul_(grad_logprobs[chunk, None]).neg_()
            if grad_logprobs is not None:
                grad.scatter_add_(-1, tokens[chunk, None], grad_logprobs[chunk, None].to(grad.dtype))
            grad_logits[chunk] = grad.div_(ctx.temperature)
        return grad_logits, None, None, None, None


def token_logprobs_and_entropy(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, chunk_rows: int | None = None, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` and entropies under softmax(logits / temperature).

    Args:
        logits: `[..., V]`, any floating dtype; computed in float32, or in float64 for float64 logits.
        tokens: `[...]` int64, the token to score at each position.
        temperature: sampling temperature, > 0.
        chunk_rows: positions to hold in float32 at a time; None picks a size for the device.
        entropy: False skips the entropy and returns zeros instead.

    Returns:
        `[...]` log p(token) in nats, and `[...]` entropies in nats (≥ 0).

    Raises:
        ValueError: if the shapes do not match or the temperature is not positive.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and tokens of shape {tuple(tokens.shape)} must have the same shape "
            "but for the vocabulary dimension"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    flat = logits.reshape(-1, logits.shape[-1])
    logprobs, entropies = _ChunkedLogprobs.apply(
        flat, tokens.reshape(-1), float(temperature), _rows_of_chunk(flat, chunk_rows), entropy
    )
    return logprobs.view(tokens.shape), entropies.view(tokens.shape)


def token_logprobs(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, chunk_rows: int | None = None
) -> Tensor:
    """`[...]` log p(token) under softmax(logits / temperature): see `token_logprobs_and_entropy`."""
    return token_logprobs_and_entropy(logits, tokens, temperature=temperature, chunk_rows=chunk_rows, entropy=False)[0]


def entropy(logits: Tensor, *, temperature: float = 1.0, chunk_rows: int | None = None) -> Tensor:
    """`[...]` entropy in nats of softmax(logits / temperature), for logits `[..., V]`."""
    any_tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs_and_entropy(logits, any_tokens, temperature=temperature, chunk_rows=chunk_rows)[1]
