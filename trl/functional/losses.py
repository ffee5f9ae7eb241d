"""The losses of PPO, as tallies: a sum over the counted tokens, and how many they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trl.types import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """What `policy_loss` returns."""

    loss: Tally  # of the negated, clipped surrogate
    clipped: Tally  # of tokens at which the clipped surrogate is the larger loss
    ratio: Tensor  # [B, S] π / π_old, detached; 1 off the mask


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """What `value_loss` returns."""

    loss: Tally  # of half the larger squared error
    clipped: Tally  # of tokens at which the clipped value has the larger error
    error: Tally  # of the squared error of the unclipped value, detached


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate of Schulman et al. 2017, eq. 7, negated.

    Args:
        logprobs: `[B, S]` under the policy; gradients flow here alone.
        old_logprobs: `[B, S]` under the policy before the update.
        advantages: `[B, S]`.
        mask: `[B, S]` bool.
        clip_range: ε: the ratio is clipped to [1 - ε, 1 + ε].
        dual_clip: c > 1 bounds the loss by -c · A where A < 0 (Ye et al. 2020, eq. 5, arXiv:1912.09729).
        weights: `[B, S]` importance weights π_old / π_sampler that correct for another sampler; used detached.

    Raises:
        ValueError: if `dual_clip` is not above 1.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be > 1")
    advantages = advantages.detach().masked_fill(~mask, 0.0)
    ratio = torch.exp((logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    if weights is not None:
        loss = loss * weights.detach().masked_fill(~mask, 0.0)
    return PolicyLoss(
        loss=Tally.of(loss, mask),
        clipped=Tally.of((clipped > plain).to(loss.dtype), mask),
        ratio=ratio.detach(),
    )


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float) -> ValueLoss:
    """Half the larger of two squared errors: of the value, and of the value held near its old one.

    Args:
        values: `[B, S]` under the critic; gradients flow here alone.
        old_values: `[B, S]` before the update.
        returns: `[B, S]` targets.
        mask: `[B, S]` bool.
        clip_range: the value is held within ± this of its old one.
    """
    values = values.masked_fill(~mask, 0.0)
    old_values = old_values.detach().masked_fill(~mask, 0.0)
    returns = returns.detach().masked_fill(~mask, 0.0)
    held = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
    plain, clipped = (values - returns) ** 2, (held - returns) ** 2
    return ValueLoss(
        loss=Tally.of(0.5 * torch.maximum(plain, clipped), mask),
        clipped=Tally.of((clipped > plain).to(plain.dtype), mask),
        error=Tally.of(plain.detach(), mask),
    )


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """π_old / π_sampler for tokens that another distribution sampled, truncated from above.

    Truncation bounds the variance at the price of a bias (Ionides 2008, "Truncated importance sampling").

    Args:
        old_logprobs: `[B, S]` under the policy that is about to be updated.
        sampler_logprobs: `[B, S]` under the distribution that was sampled from.
        mask: `[B, S]` bool.
        cap: the largest weight.

    Returns:
        `[B, S]` detached weights, 1 off the mask.
    """
    gap = (old_logprobs - sampler_logprobs).detach().masked_fill(~mask, 0.0)
    return gap.exp().clamp(max=cap).masked_fill(~mask, 1.0)
