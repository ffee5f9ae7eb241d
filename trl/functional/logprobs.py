"""Log-probabilities of chosen tokens and entropies of full distributions, a few rows of logits at a time.

With a vocabulary of `V` words the float32 copy, the softmax and the gradient of `[B, S, V]` logits are what fills the
memory of a language model's update. Here each exists for `chunk_rows` positions only; the backward pass computes the
softmax again from the logits and one number a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 256


def _wide(x: Tensor) -> Tensor:
    """At least float32: the log-softmax of half-precision logits loses the tail."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _ChunkedLogprobs(torch.autograd.Function):
    """[N, V] logits, [N] tokens -> [N] logprobs, [N] entropies."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, chunk_rows: int, need_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        rows = logits.shape[0]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        chosen = torch.empty(rows, dtype=dtype, device=logits.device)
        top = torch.empty_like(chosen)
        normalizer = torch.empty_like(chosen)
        entropy = torch.zeros_like(chosen)
        for start in range(0, rows, chunk_rows):
            part = slice(start, start + chunk_rows)
            x = _wide(logits[part]) / temperature if temperature != 1.0 else _wide(logits[part])
            # The largest logit is taken off first: next to a large common offset the differences would lose their digits.
            largest = x.amax(dim=-1, keepdim=True)
            x = x - largest
            weight = torch.exp(x)
            z = weight.sum(-1)
            log_z = torch.log(z)
            chosen[part] = x.gather(-1, tokens[part, None]).squeeze(-1) - log_z
            top[part], normalizer[part] = largest.squeeze(-1), log_z
            if need_entropy:
                # A logit of -inf is a word of probability 0 and adds nothing; 0 * -inf would be nan.
                entropy[part] = log_z - (weight * x.masked_fill(weight == 0, 0.0)).sum(-1) / z
        ctx.save_for_backward(logits, tokens, top, normalizer, entropy)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.set_materialize_grads(False)
        if not need_entropy:
            ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        grad_chosen, grad_entropy = grads
        logits, tokens, top, normalizer, entropy = ctx.saved_tensors
        if grad_chosen is None and grad_entropy is None:
            return None, None, None, None, None
        grad_logits = torch.empty_like(logits)
        for start in range(0, logits.shape[0], ctx.chunk_rows):
            part = slice(start, start + ctx.chunk_rows)
            log_p = (_wide(logits[part]) / ctx.temperature - top[part, None]) - normalizer[part, None]
            p = torch.exp(log_p)
            grad = torch.zeros_like(p)
            if grad_chosen is not None:  # d log p_a / dx = onehot(a) - p
                grad -= grad_chosen[part, None] * p
                grad.scatter_add_(-1, tokens[part, None], grad_chosen[part, None].to(grad.dtype))
            if grad_entropy is not None:  # dH / dx = -p (log p + H)
                log_p = log_p.masked_fill(p == 0, 0.0)
                grad -= grad_entropy[part, None] * p * (log_p + entropy[part, None])
            grad_logits[part] = grad / ctx.temperature
        return grad_logits, None, None, None, None


def token_logprobs_and_entropy(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, chunk_rows: int = CHUNK_ROWS, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` and entropies under softmax(logits / temperature).

    Args:
        logits: `[..., V]`, any floating dtype; computed in float32, or in float64 if given so.
        tokens: `[...]` int64, the token whose log-probability is wanted at each position.
        temperature: what sampling divided the logits by; > 0.
        chunk_rows: positions that stand in memory in float32 at a time.
        entropy: False spares the entropy; zeros are returned in its place.

    Returns:
        `[...]` log p(token) in nats, and `[...]` entropies in nats (≥ 0).

    Raises:
        ValueError: if the shapes do not fit or the temperature is not positive.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)} differ before the vocabulary")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    flat = logits.reshape(-1, logits.shape[-1])
    chosen, spread = _ChunkedLogprobs.apply(flat, tokens.reshape(-1), float(temperature), chunk_rows, entropy)
    return chosen.view(tokens.shape), spread.view(tokens.shape)


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """`[...]` log p(token) under softmax(logits / temperature): see `token_logprobs_and_entropy`."""
    return token_logprobs_and_entropy(logits, tokens, temperature=temperature, chunk_rows=chunk_rows, entropy=False)[0]


def entropy(logits: Tensor, *, temperature: float = 1.0, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """`[...]` entropy in nats of softmax(logits / temperature), for logits `[..., V]`."""
    anything = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs_and_entropy(logits, anything, temperature=temperature, chunk_rows=chunk_rows)[1]
