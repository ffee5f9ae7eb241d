"""Masked sums, means, variances and whitening.

Masking uses `masked_fill`, never multiplication: values off the mask are unspecified, and `0 * nan` is `nan`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trl.types import identity

Dim = int | tuple[int, ...] | None


def masked_sum(values: Tensor, mask: Tensor, dim: Dim = None) -> Tensor:
    """Sum of `values` where `mask` is True.

    Args:
        values: any shape.
        mask: bool, broadcastable to `values`.
        dim: dimensions to sum over; all if None.
    """
    selected = values.masked_fill(~mask, 0)
    return selected.sum() if dim is None else selected.sum(dim=dim)


def masked_count(values: Tensor, mask: Tensor, dim: Dim = None) -> Tensor:
    """Number of True positions of `mask` broadcast to `values`, at least 1, in the dtype of `values`."""
    mask = mask.expand_as(values)
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return count.clamp(min=1).to(values.dtype)


def masked_mean(values: Tensor, mask: Tensor, dim: Dim = None) -> Tensor:
    """Mean of `values` where `mask` is True; 0 if it is True nowhere."""
    return masked_sum(values, mask, dim) / masked_count(values, mask, dim)


def masked_moments(
    values: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] = identity
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance (with Bessel's correction) and count over all processes.

    Computed in two passes: in float32, E[x²] - E[x]² cancels catastrophically.

    Args:
        values: `[B, S]` on this process.
        mask: `[B, S]` bool.
        reduce: sums a tensor over all processes.

    Returns:
        Three scalars. The variance of a single value is 0.
    """
    count = reduce(mask.expand_as(values).sum().to(values.dtype))
    mean = reduce(masked_sum(values, mask)) / count.clamp(min=1)
    # Mask before squaring: masked afterwards, the gradient of the square would be 0 * nan.
    squares = reduce(((values - mean).masked_fill(~mask, 0) ** 2).sum())
    return mean, squares / (count - 1).clamp(min=1), count


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of `values` where `mask` is True, with Bessel's correction unless `unbiased` is False.

    The variance of fewer than two values is 0.
    """
    mean, var, count = masked_moments(values, mask)
    return var if unbiased else var * (count - 1).clamp(min=0) / count.clamp(min=1)


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    reduce: Callable[[Tensor], Tensor] = identity,
    epsilon: float = 1e-8,
) -> Tensor:
    """Scales `values` to unit variance over the mask, and to zero mean if `shift_mean`.

    Args:
        values: `[B, S]`.
        mask: `[B, S]` bool.
        shift_mean: False keeps the mean (as for rewards), True removes it (as for advantages).
        reduce: sums a tensor over all processes, so that sharding does not change the result.
        epsilon: added to the variance for numerical stability.

    Returns:
        `[B, S]`, 0 off the mask.
    """
    mean, var, _ = masked_moments(values, mask, reduce)
    white = (values - mean).masked_fill(~mask, 0) * torch.rsqrt(var + epsilon)
    if not shift_mean:
        white = white + mean
    return white.masked_fill(~mask, 0)
