"""Log-probabilities and entropies from hidden states, projecting one block of rows and vocabulary at a time.

Replaces `model(...).logits` and their softmax in scoring and updating: neither the logits `[N, V]` nor their gradient
is materialised as a whole. Normalisation is online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867), and the
backward pass recomputes the projection if the logits are large. The gain is memory, not time: on two cores of an Intel
Xeon with AMX, 2,048 tokens of SmolLM2's vocabulary, forward and backward, take 71 MB instead of 386 in bfloat16 and 120
instead of 769 in float32, in 1.03 and 1.18 times the time (`python bench/projection.py`). Off with `TRL_KERNELS=off`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl.functional.logprobs import BITS, FLOOR, wide_dtype
from trl.kernels import projection_on_gpu as on_gpu
from trl.kernels.products import linear, summed_outer

# Rows per block, and bytes of a block of float32 logits: on a CPU it fits the cache.
_ROWS = {"cpu": 512, "other": 8192}
_BLOCK_BYTES = {"cpu": 2 * 2**20, "other": 256 * 2**20}
_ALIGNMENT = 128  # a GPU multiplies by a matrix whose rows have an odd length several times as slowly
# Up to this size the logits of all blocks are saved for the backward pass instead of being recomputed.
_SAVED_BYTES = {"cpu": 48 * 2**20, "other": 2 * 2**30}


def _kind(tensor: Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "other"


def _sizes(hidden: Tensor, words: int, block: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the block size: rows and vocabulary entries."""
    if block is not None:
        return block
    kind = _kind(hidden)
    rows = max(1, min(_ROWS[kind], len(hidden)))
    columns = _BLOCK_BYTES[kind] // (4 * rows)
    if kind != "cpu" and columns > _ALIGNMENT:
        columns -= columns % _ALIGNMENT
    return rows, max(1, min(words, columns))


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


def _minus(raw: Tensor, top: Tensor, *, keep: bool) -> Tensor:
    """Computes `raw` `[n, v]` minus `top` `[n]` in the dtype of `top`; may overwrite `raw` unless `keep`."""
    if raw.dtype == top.dtype and keep:
        return raw - top[:, None]
    return raw.to(top.dtype).sub_(top[:, None])


def _logits_gradient(
    x: Tensor, column: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, entropy: Tensor
) -> Tensor:
    """Computes the gradient with respect to a block of logits, in the wide dtype; overwrites `x`.

    Args:
        x: `[n, v]` log2-probabilities.
        column: `[n]` each row's token as a column of the block, possibly outside it.
        grad_logprobs: `[n]` gradient with respect to log p(token), or None.
        grad_entropy: `[n]` gradient with respect to the entropy, or None.
        entropy: `[n]` in nats.
    """
    if grad_entropy is not None:  # dH / dx = -p (log p + H)
        p = torch.exp2(x)
        grad_log_p = x.clamp_(min=FLOOR).div_(BITS).add_(entropy[:, None]).mul_(grad_entropy[:, None])
        if grad_logprobs is not None:  # d log p_a / dx = onehot(a) - p
            grad_log_p += grad_logprobs[:, None]
        grad = p.mul_(grad_log_p).neg_()
    else:
        assert grad_logprobs is not None
        grad = x.exp2_().mul_(-grad_logprobs[:, None])
    if grad_logprobs is not None:
        in_block = (column >= 0) & (column < x.shape[1])
        inside = column.clamp(0, x.shape[1] - 1)
        grad.scatter_add_(-1, inside[:, None], grad_logprobs.where(in_block, 0)[:, None].to(grad.dtype))
    return grad


class _Projected(torch.autograd.Function):
    """[N, H] hidden states, [V, H] weights, [V] bias -> [N] logprobs, [N] entropies, [N] whether most likely."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        need_entropy: bool,
        block: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, vocab_size = len(hidden), len(weight)
        row_block, vocab_block = _sizes(hidden, vocab_size, block)
        token_logits = torch.zeros(count, dtype=wide_dtype(hidden), device=hidden.device)
        top = torch.full_like(token_logits, -torch.inf)
        total, weighted = torch.zeros_like(top), torch.zeros_like(top)  # sums of w and of w x, w = 2^x
        unit = BITS / temperature
        fused = hidden.dtype != torch.float64 and on_gpu.usable(hidden.device)
        save = any(ctx.needs_input_grad) and count * vocab_size * hidden.element_size() <= _SAVED_BYTES[_kind(hidden)]
        saved: list[Tensor] = []
        for vocab in _parts(vocab_size, vocab_block):
            for rows in _parts(count, row_block):
                logits = linear(hidden[rows], weight[vocab], None if bias is None else bias[vocab])
                if save:
                    saved.append(logits)
                if fused:
                    running = {"top": top[rows], "total": total[rows], "weighted": weighted[rows]}
                    on_gpu.add_block(
                        logits,
                        tokens[rows],
                        vocab.start,
                        unit,
                        **running,
                        chosen=token_logits[rows],
                        entropy=need_entropy,
                    )
                    continue
                in_block = (tokens[rows] >= vocab.start) & (tokens[rows] < vocab.stop)
                column = (tokens[rows] - vocab.start).clamp(0, vocab.stop - vocab.start - 1)
                token_logits[rows] += logits.gather(-1, column[:, None]).squeeze(-1).where(in_block, 0)
                # Subtract the largest logit before scaling: a large common offset would cost the differences precision.
                largest = torch.maximum(top[rows], logits.amax(dim=-1)).clamp(min=FLOOR)
                shift = ((top[rows] - largest) * unit).clamp(min=FLOOR)
                x = _minus(logits, largest, keep=save).mul_(unit)
                w = torch.exp2(x)
                scale = shift.exp2()
                if need_entropy:
                    # A logit of -inf has probability 0 and contributes nothing.
                    block_weighted = torch.bmm(w[:, None], x.clamp_(min=FLOOR)[..., None]).flatten()
                    weighted[rows] = (weighted[rows] + total[rows] * shift) * scale + block_weighted
                total[rows] = total[rows] * scale + w.sum(dim=-1)
                top[rows] = largest
        log_total = total.log2()
        logprobs = (token_logits - top) / temperature - log_total / BITS
        entropy = (log_total - weighted / total) / BITS if need_entropy else weighted
        ctx.save_for_backward(hidden, weight, bias, tokens, top, log_total, entropy, *saved)
        ctx.temperature, ctx.block, ctx.fused = temperature, (row_block, vocab_block), fused
        ctx.set_materialize_grads(False)
        top1 = token_logits >= top
        ctx.mark_non_differentiable(top1, *(() if need_entropy else (entropy,)))
        return logprobs, entropy, top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads[:2]
        hidden, weight, bias, tokens, top, log_total, entropy, *saved = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 7
        # Gradients with respect to the logits before division by the temperature.
        grad_logprobs, grad_entropy = (g if g is None else g / ctx.temperature for g in (grad_logprobs, grad_entropy))
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        row_block, vocab_block = ctx.block
        count, vocab_size, wide = len(hidden), len(weight), top.dtype
        unit = BITS / ctx.temperature
        highest = top + log_total / unit  # a logit this high would have probability 1
        grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        blocks = iter(saved)
        for vocab in _parts(vocab_size, vocab_block):
            sum_weight: Tensor | None = None
            sum_bias: Tensor | None = None
            for rows in _parts(count, row_block):
                if saved:
                    logits = next(blocks)
                else:
                    logits = linear(hidden[rows], weight[vocab], None if bias is None else bias[vocab])
                if ctx.fused:
                    narrow = on_gpu.block_gradient(
                        logits,
                        tokens[rows],
                        vocab.start,
                        unit,
                        highest=highest[rows],
                        entropy=entropy[rows],
                        grad_logprobs=None if grad_logprobs is None else grad_logprobs[rows],
                        grad_entropy=None if grad_entropy is None else grad_entropy[rows],
                    )
                else:
                    narrow = _logits_gradient(
                        _minus(logits, highest[rows], keep=bool(saved)).mul_(unit),
                        tokens[rows] - vocab.start,
                        None if grad_logprobs is None else grad_logprobs[rows],
                        None if grad_entropy is None else grad_entropy[rows],
                        entropy[rows],
                    )
                if needs_bias:
                    block_bias = narrow.sum(dim=0, dtype=wide)
                    sum_bias = block_bias if sum_bias is None else sum_bias.add_(block_bias)
                narrow = narrow.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] += linear(narrow, weight[vocab], transposed=True)
                if needs_weight:
                    block_weight = summed_outer(narrow, hidden[rows])
                    if count > row_block:  # several products: accumulate in the wide dtype
                        block_weight = block_weight.to(wide)
                    sum_weight = block_weight if sum_weight is None else sum_weight.add_(block_weight)
            if grad_weight is not None:
                grad_weight[vocab] = 0 if sum_weight is None else sum_weight
            if grad_bias is not None:
                grad_bias[vocab] = 0 if sum_bias is None else sum_bias
        narrow_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return narrow_hidden, grad_weight, grad_bias, None, None, None, None


def projected_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` and entropies under softmax((hidden @ weight.T + bias) / temperature).

    Same values and gradients as `token_logprobs_and_entropy` on these logits, without materialising them.

    Args:
        hidden: `[N, H]`, any floating dtype; logits are rounded to it and then processed in float32, or in float64 for
            float64 input.
        weight: `[V, H]` of the same dtype.
        tokens: `[N]` int64.
        bias: `[V]`.
        temperature: sampling temperature, which divides the logits; > 0.
        entropy: False skips the entropy and returns zeros for it.
        block: rows and vocabulary entries per block of logits in memory; None picks a size for the device.

    Returns:
        `[N]` log p(token) in nats, and `[N]` entropies in nats (≥ 0).

    Raises:
        ValueError: if the shapes do not match or the temperature is not positive.
    """
    return projected_predictions(
        hidden, weight, tokens, bias=bias, temperature=temperature, entropy=entropy, block=block
    )[:2]


def projected_predictions(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`projected_logprobs_and_entropy`, and `[N]` whether no token is more likely than the given one."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or len(tokens) != len(hidden):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and tokens {tuple(tokens.shape)} do not "
            "match: expected [N, H], [V, H] and [N]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(narrow), weight.to(narrow), None if bias is None else bias.to(narrow)
    with torch.autocast(kind, enabled=False):
        return _Projected.apply(hidden, weight, bias, tokens, float(temperature), entropy, block)
