"""Log-probabilities and entropies from hidden states, projecting one block of rows and vocabulary at a time.

Replaces `model(...).logits` and their softmax in scoring and updating: neither the logits `[N, V]` nor their gradient is
materialised as a whole. Normalisation is online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867), and the backward
pass recomputes the projection if the logits are large. The gain is memory, not time: on two cores of an Intel Xeon with
AMX, 2,048 tokens of SmolLM2's vocabulary, forward and backward, take 71 MB instead of 386 in bfloat16 and 120 instead of
769 in float32, in 1.03 and 1.18 times the time (`python bench/projection.py`). Off with `TRL_KERNELS=off`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl.functional.logprobs import BITS, FLOOR, wide_dtype
from trl.kernels.products import linear, summed_outer

# Rows per block, and bytes of a block of float32 logits: on a CPU it fits the cache.
_ROWS = {"cpu": 512, "other": 8192}
_BLOCK_BYTES = {"cpu": 2 * 2**20, "other": 256 * 2**20}
# Up to this size the logits of all blocks are saved for the backward pass instead of being recomputed.
_KEPT_BYTES = 48 * 2**20


def _sizes(hidden: Tensor, words: int, block: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the block size: rows and vocabulary entries."""
    if block is not None:
        return block
    kind = hidden.device.type if hidden.device.type in _ROWS else "other"
    rows = max(1, min(_ROWS[kind], len(hidden)))
    return rows, max(1, min(words, _BLOCK_BYTES[kind] // (4 * rows)))


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


def _minus(raw: Tensor, top: Tensor, *, keep: bool) -> Tensor:
    """Computes `raw` `[n, v]` minus `top` `[n]` in the dtype of `top`; may overwrite `raw` unless `keep`."""
    if raw.dtype == top.dtype and keep:
        return raw - top[:, None]
    return raw.to(top.dtype).sub_(top[:, None])


class _Projected(torch.autograd.Function):
    """[N, H] hidden states, [V, H] weights, [V] bias -> [N] logprobs of tokens, [N] entropies."""

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
    ) -> tuple[Tensor, Tensor]:
        count, words = len(hidden), len(weight)
        size, step = _sizes(hidden, words, block)
        chosen = torch.zeros(count, dtype=wide_dtype(hidden), device=hidden.device)
        top = torch.full_like(chosen, -torch.inf)
        total, slope = torch.zeros_like(chosen), torch.zeros_like(chosen)  # sums of w and of w x, w = 2^x
        unit = BITS / temperature
        keep = any(ctx.needs_input_grad) and count * words * hidden.element_size() <= _KEPT_BYTES
        kept: list[Tensor] = []
        for some in _parts(words, step):
            for rows in _parts(count, size):
                raw = linear(hidden[rows], weight[some], None if bias is None else bias[some])
                if keep:
                    kept.append(raw)
                here = (tokens[rows] >= some.start) & (tokens[rows] < some.stop)
                place = (tokens[rows] - some.start).clamp(0, some.stop - some.start - 1)
                chosen[rows] += raw.gather(-1, place[:, None]).squeeze(-1).where(here, 0)
                # Subtract the largest logit before scaling: a large common offset would cost the differences precision.
                largest = torch.maximum(top[rows], raw.amax(dim=-1)).clamp(min=FLOOR)
                shift = ((top[rows] - largest) * unit).clamp(min=FLOOR)
                x = _minus(raw, largest, keep=keep).mul_(unit)
                w = torch.exp2(x)
                scale = shift.exp2()
                if need_entropy:
                    # A logit of -inf has probability 0 and contributes nothing.
                    added = torch.bmm(w[:, None], x.clamp_(min=FLOOR)[..., None]).flatten()
                    slope[rows] = (slope[rows] + total[rows] * shift) * scale + added
                total[rows] = total[rows] * scale + w.sum(dim=-1)
                top[rows] = largest
        log_total = total.log2()
        chosen = (chosen - top) / temperature - log_total / BITS
        entropy = (log_total - slope / total) / BITS if need_entropy else slope
        ctx.save_for_backward(hidden, weight, bias, tokens, top, log_total, entropy, *kept)
        ctx.temperature, ctx.block = temperature, (size, step)
        ctx.set_materialize_grads(False)
        if not need_entropy:
            ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_chosen, grad_entropy = grads
        hidden, weight, bias, tokens, top, log_total, entropy, *kept = ctx.saved_tensors
        if grad_chosen is None and grad_entropy is None:
            return (None,) * 7
        # Gradients with respect to the logits before division by the temperature.
        grad_chosen, grad_entropy = (g if g is None else g / ctx.temperature for g in (grad_chosen, grad_entropy))
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        size, step = ctx.block
        count, words, wide = len(hidden), len(weight), top.dtype
        unit = BITS / ctx.temperature
        highest = top + log_total / unit  # a logit this high would have probability 1
        grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        grad_bias = torch.empty_like(bias) if wants_bias else None
        blocks = iter(kept)
        for some in _parts(words, step):
            sum_weight: Tensor | None = None
            sum_bias: Tensor | None = None
            for rows in _parts(count, size):
                if kept:
                    raw = next(blocks)
                else:
                    raw = linear(hidden[rows], weight[some], None if bias is None else bias[some])
                x = _minus(raw, highest[rows], keep=bool(kept)).mul_(unit)
                if grad_entropy is not None:  # dH / dx = -p (log p + H)
                    p = torch.exp2(x)
                    outer = x.clamp_(min=FLOOR).div_(BITS).add_(entropy[rows, None]).mul_(grad_entropy[rows, None])
                    if grad_chosen is not None:  # d log p_a / dx = onehot(a) - p
                        outer += grad_chosen[rows, None]
                    grad = p.mul_(outer).neg_()
                else:
                    assert grad_chosen is not None
                    grad = x.exp2_().mul_(-grad_chosen[rows, None])
                if grad_chosen is not None:
                    here = (tokens[rows] >= some.start) & (tokens[rows] < some.stop)
                    place = (tokens[rows] - some.start).clamp(0, some.stop - some.start - 1)
                    grad.scatter_add_(-1, place[:, None], grad_chosen[rows].where(here, 0)[:, None].to(wide))
                if wants_bias:
                    added = grad.sum(dim=0)
                    sum_bias = added if sum_bias is None else sum_bias.add_(added)
                narrow = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] += linear(narrow, weight[some], transposed=True)
                if wants_weight:
                    added = summed_outer(narrow, hidden[rows])
                    if count > size:  # several products: accumulate in the wide dtype
                        added = added.to(wide)
                    sum_weight = added if sum_weight is None else sum_weight.add_(added)
            if grad_weight is not None:
                grad_weight[some] = 0 if sum_weight is None else sum_weight
            if grad_bias is not None:
                grad_bias[some] = 0 if sum_bias is None else sum_bias
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
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or len(tokens) != len(hidden):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and tokens {tuple(tokens.shape)} do not fit "
            "together: [N, H], [V, H] and [N] are expected"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(narrow), weight.to(narrow), None if bias is None else bias.to(narrow)
    with torch.autocast(kind, enabled=False):
        found = _Projected.apply(hidden, weight, bias, tokens, float(temperature), entropy, block)
    return found[0], found[1]
