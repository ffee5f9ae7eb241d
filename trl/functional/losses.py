"""PPO's policy and value losses, as tallies over the counted tokens, and importance weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trl.types import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """Result of `policy_loss`."""

    loss: Tally  # negated clipped surrogate
    clipped: Tally  # 1 for tokens where the clipped surrogate gives the larger loss
    ratio: Tensor  # [B, S] π / π_old, detached; 1 off the mask


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """Result of `value_loss`."""

    loss: Tally  # half the larger squared error
    clipped: Tally  # 1 for tokens where the clipped value has the larger error
    error: Tally  # squared error of the unclipped value, detached


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
    """Negated clipped surrogate (PPO, Schulman et al. 2017, eq. 7).

    Args:
        logprobs: `[B, S]` under the policy; the only input that receives gradients.
        old_logprobs: `[B, S]` under the policy before the update.
        advantages: `[B, S]`.
        mask: `[B, S]` bool.
        clip_range: ε: the ratio is clipped to [1 - ε, 1 + ε].
        dual_clip: c > 1 bounds the loss by -c · A where A < 0 (Ye et al. 2020, eq. 5, arXiv:1912.09729).
        weights: `[B, S]` importance weights π_old / π_sampler, correcting for a different sampler; detached.

    Raises:
        ValueError: if `dual_clip` is not above 1.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be > 1")
    advantages = advantages.detach().masked_fill(~mask, 0.0)
    ratio = torch.exp((logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0))
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    if weights is not None:
        loss = loss * weights.detach().masked_fill(~mask, 0.0)
    return PolicyLoss(
        loss=Tally.of(loss, mask),
        clipped=Tally.of((clipped > unclipped).to(loss.dtype), mask),
        ratio=ratio.detach(),
    )


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float) -> ValueLoss:
    """Clipped value loss: half the larger squared error of the value and of the value clipped around its old one.

    Args:
        values: `[B, S]` from the critic; the only input that receives gradients.
        old_values: `[B, S]` before the update.
        returns: `[B, S]` targets.
        mask: `[B, S]` bool.
        clip_range: maximum distance of the clipped value from the old value.
    """
    values = values.masked_fill(~mask, 0.0)
    old_values = old_values.detach().masked_fill(~mask, 0.0)
    returns = returns.detach().masked_fill(~mask, 0.0)
    clipped_values = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return ValueLoss(
        loss=Tally.of(0.5 * torch.maximum(unclipped, clipped), mask),
        clipped=Tally.of((clipped > unclipped).to(unclipped.dtype), mask),
        error=Tally.of(unclipped.detach(), mask),
    )


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """Truncated importance weights π_old / π_sampler, for tokens sampled from another distribution.

    Truncation bounds the variance at the cost of bias (Ionides 2008, "Truncated importance sampling").

    Args:
        old_logprobs: `[B, S]` under the policy before the update.
        sampler_logprobs: `[B, S]` under the sampling distribution.
        mask: `[B, S]` bool.
        cap: upper bound of the weights.

    Returns:
        `[B, S]` detached weights, 1 off the mask.
    """
    log_ratio = (old_logprobs - sampler_logprobs).detach().masked_fill(~mask, 0.0)
    return log_ratio.exp().clamp(max=cap).masked_fill(~mask, 1.0)
